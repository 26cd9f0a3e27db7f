// The one place that knows which engines this build has.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "device/runtime.h"
#include "rail/engine.h"

namespace deep_ep::rail {

// What users choose.
struct EngineChoice {
    std::string name = "host";
    std::string interface = {};  // to listen on, a name or an address; empty: the one that reaches `reach`
    std::string reach = {};      // a host; empty: the first interface that is no loopback
};

struct EngineOptions {
    EngineChoice choice;
    int rank;
    size_t window_bytes;  // the same on every rank
    double timeout_s;     // for connecting, and for a peer's machine to answer
    bool shares_window =
        false;  // ranks of the same node are to load from it, if the engine can; the same on every rank
};

// Throws InvalidArgument where there is no such engine, or where it does not fit this machine; TransportError where the
// machine refuses what it needs.
std::unique_ptr<Engine> make_engine(const std::shared_ptr<dev::Device>& device, const EngineOptions& options);

}  // namespace deep_ep::rail
