// What a Buffer is made with.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "device/runtime.h"
#include "layout/topology.h"
#include "rail/make_engine.h"

namespace deep_ep::runtime {

constexpr int64_t kLendPartOfData = -1;

struct BufferOptions {
    int rank;
    int num_ranks;
    int64_t num_data_bytes;         // of the high-throughput mode
    int64_t num_low_latency_bytes;  // of the low-latency mode
    double timeout_s;
    double warn_s;
    bool is_shrinkable;            // low latency: a peer that does not come is masked
    int64_t num_lend_bytes = 0;    // for tensors that peers write and read in place; kLendPartOfData: some of the data
    int ranks_per_node = 0;        // 0: all ranks share a node
    int64_t num_rail_bytes = 0;    // of data in the rail window, where there are several nodes; 0: see plan_rail
    rail::EngineChoice rail = {};  // that carries them
    double rail_gb_per_s = 0.0;    // that a rank's NICs carry, 10^9 bytes a second, the same on every rank; 0: unknown
    dev::Placement heap = dev::Placement::kDevice;
    // Another one in tests.
    std::function<std::unique_ptr<rail::Engine>(const std::shared_ptr<dev::Device>&, const rail::EngineOptions&)>
        make_engine = &rail::make_engine;

    layout::Topology topology() const {
        return {
            .num_ranks = num_ranks, .ranks_per_node = ranks_per_node > 0 ? ranks_per_node : num_ranks, .rank = rank};
    }
};

}  // namespace deep_ep::runtime
