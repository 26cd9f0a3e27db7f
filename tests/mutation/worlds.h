// What the scenarios have in common: small devices, schedules by seed, and the errors that they expect.
#pragma once

#include <functional>
#include <string>

#include "core/error.h"
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
    for (int rank = 0; rank < 2; ++rank)
        if (std::string found = expect_failure("rank 1", [&] { world.buffer(rank).check(); }); !found.empty())
            return found;
    return "";
}

// After a dispatch of all ranks, a call of rank 0 to which rank 1 does not come: rank 0 must name it.
inline std::string call_alone(World& world, const Problem& problem, const std::function<void(RankTensors&)>& call) {
    auto ranks = world.dispatched(problem);
    call(ranks[0]);
    world.run();
    return expect_failure("never entered this call: rank 1", [&] { world.buffer(0).check(); });
}

}  // namespace deep_ep::test
