// Ranks over the engine `host`, on loopback.
#pragma once

#include <memory>
#include <vector>

#include "rail/host/host_engine.h"
#include "rail/rail_world.h"
#include "rail/test_device.h"

namespace deep_ep::testing {

// Engines of `num_ranks`, connected to each other.
std::vector<std::unique_ptr<rail::host::HostEngine>> make_engines(
    const std::vector<std::shared_ptr<dev::Device>>& devices, const rail::host::HostOptions& options);

// Gathers the addresses and connects: what the group's exchange does elsewhere. Returns what each rank's connect() threw.
std::vector<std::string> connect_all(const std::vector<std::unique_ptr<rail::host::HostEngine>>& engines);

}  // namespace deep_ep::testing
