// What the scenarios have in common: small devices, schedules by seed, and the errors that they expect.
#pragma once

#include <functional>
#include <string>

#include "core/error.h"
#include "device/launch.h"
#include "device/prim.h"
#include "support/world.h"

namespace deep_ep::test {

// Odd seeds run without bulk copies: both ways through the kernels. ThreadSanitizer keeps some 127 CUDA threads apart:
// one or two small blocks a rank.
inline simt::DeviceOptions small_device(uint64_t seed) {
    return {.num_sms = 2, .has_bulk_copy = seed % 2 == 0, .useful_block_threads = 64};
}

// A seed decides how bulk copies end, too.
inline simt::SchedulerOptions varied(uint64_t seed) {
    simt::SchedulerOptions options = seeded(seed);
    options.bulk = seed % 4 == 0 ? simt::BulkMode::kEager : simt::BulkMode::kRandom;
    return options;
}

inline simt::SchedulerOptions impatient(uint64_t seed) {
    simt::SchedulerOptions options = varied(seed);
    options.idle = simt::IdlePolicy::kAdvanceClock;
    options.bulk = simt::BulkMode::kLate;
    return options;
}

inline std::string expect_failure(const std::string& text, const std::function<void()>& call) {
    try {
        call();
    } catch (const Error& error) {
        return std::string(error.what()).find(text) != std::string::npos ? "" : error.what();
    }
    return "nothing was thrown, expected: " + text;
}

// Both ranks of a call that rank 1 has refused must name it.
inline std::string expect_refusal_of_rank_1(World& world) {
    for (int rank : {1, 0})  // rank 0 would wait for the reason, which rank 1 tells
        if (std::string found = expect_failure("rank 1", [&] { world.buffer(rank).check(); }); !found.empty())
            return found;
    return "";
}

// One thread that passes time, little by little: what it writes keeps the executor from taking it for one that waits, and the
// clock from leaping.
struct DelayKernel {
    struct Params {
        uint64_t delay_ns;
        uint64_t* now;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        const uint64_t start_ns = prim::clock_ns();
        for (uint64_t now = start_ns; now - start_ns < params.delay_ns; now = prim::clock_ns()) {
            prim::store<prim::Order::kRelaxed, prim::Scope::kGpu>(params.now, now);
            prim::pause();
        }
    }
};

// What is launched for the rank next begins so much later.
inline void pass_time(World& world, int rank, uint64_t delay_ns) {
    static uint64_t now;
    dev::LaunchConfig config;
    config.name = "delay";
    dev::launch<DelayKernel>(config, world.stream(rank), {delay_ns, &now});
}

// After a dispatch of all ranks, a call of rank 0 to which rank 1 does not come: rank 0 must name it.
inline std::string call_alone(World& world, const Problem& problem, const std::function<void(RankTensors&)>& call) {
    auto ranks = world.dispatched(problem);
    call(ranks[0]);
    world.run();
    return expect_failure("never entered this call: rank 1", [&] { world.buffer(0).check(); });
}

}  // namespace deep_ep::test
