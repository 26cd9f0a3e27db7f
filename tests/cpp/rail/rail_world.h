// Ranks of different nodes, each with a device and an engine: what the conformance suite runs on. All of them are in this
// process, or one of them, where an engine can do no more. Each engine's test binary defines make_rail_world.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/non_copyable.h"
#include "device/runtime.h"
#include "rail/engine.h"

namespace deep_ep::testing {

struct RailOptions {
    int num_ranks = 2;
    size_t window_bytes = 0;
    uint64_t seed = 0;              // of the schedule and the network, where the engine has them
    uint32_t ring_capacity = 4096;  // where the engine has a ring
    bool is_near = false;           // stores reach the windows of peers, where the engine lets a test choose
};

class RailWorld : NonCopyable {
public:
    using Launch = std::function<void(int rank, dev::Stream stream)>;

    virtual ~RailWorld() = default;

    // Those of this process: the only ones that may be asked for.
    virtual std::vector<int> own_ranks() const = 0;
    virtual rail::Engine& engine(int rank) = 0;
    virtual dev::Device& device(int rank) = 0;
    // Starts a kernel of each own rank, calls `beside` while they run, and returns when those of all ranks have ended.
    // Throws what the executor or an engine has found.
    virtual void run(const Launch& launch, const std::function<void()>& beside) = 0;
    void run(const Launch& launch) {
        run(launch, [] {});
    }
    // How many ranks a world has that a test wants to have `wanted` of: as many, unless the processes say otherwise.
    static int num_ranks(int wanted);
    // Of each round of a test: seeds where they mean something.
    static std::vector<uint64_t> seeds();
    // For waits in kernels; 0: none, since the executor reports who waits in vain.
    static uint64_t timeout_ns();
};

inline std::vector<int> all_ranks(int num_ranks) {
    std::vector<int> ranks;
    for (int rank = 0; rank < num_ranks; ++rank) ranks.push_back(rank);
    return ranks;
}

std::unique_ptr<RailWorld> make_rail_world(const RailOptions& options);

}  // namespace deep_ep::testing
