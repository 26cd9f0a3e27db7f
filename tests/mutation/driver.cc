// Runs the protocols on mutated kernels: driver ID. Exit status 0: nothing was noticed; 1: something was. Under
// ThreadSanitizer a race ends the process with its own status.
//
// The scenarios are the smallest that need every ordering: windows that wrap, banks that are used again by traffic in
// one direction only (nothing but the protocol's own flags orders it), rows that arrive late.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "core/error.h"
#include "layout/intranode.h"
#include "mutation/mutant.h"
#include "support/low_latency_world.h"

namespace deep_ep::test {
namespace {

// ThreadSanitizer remembers the accesses of some 256 threads: one or two SMs a rank keep the interesting ones among them.
simt::DeviceOptions small_device{.num_sms = 2};

simt::SchedulerOptions seeded(uint64_t seed) {
    simt::SchedulerOptions options;
    options.seed = seed;
    return options;
}

World make_world(int num_ranks, int64_t data_bytes, uint64_t seed, int64_t low_latency_bytes = 0) {
    return World(num_ranks, data_bytes, seeded(seed), 100, low_latency_bytes, false, small_device);
}

int64_t region_for(const Problem& problem, uint64_t window) {
    const auto slot = layout::SlotLayout::for_dispatch(static_cast<uint64_t>(problem.hidden) * 2,
                                                       static_cast<uint64_t>(problem.num_topk), 0);
    return static_cast<int64_t>(
        layout::WindowLayout::bytes_for(static_cast<uint64_t>(problem.num_ranks()), slot.bytes, window));
}

std::string wrapping_windows(uint64_t seed) {
    const Problem problem{
        .num_tokens = {11, 7}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    World world = make_world(2, region_for(problem, 2), seed);
    std::string difference = round_trip(world, problem);
    return difference.empty() ? round_trip(world, problem) : difference;
}

// Only rank 1 receives, call after call: its reads must end before rank 0 writes the bank again.
std::string one_way_traffic(uint64_t seed) {
    Problem problem{
        .num_tokens = {6, 0}, .num_experts = 2, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .only_rank = 1};
    problem.seed = seed;
    World world = make_world(2, 1 << 14, seed);
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    world.dispatch(problem, ranks);
    for (int repeat = 0; repeat < 4; ++repeat)
        for (int rank = 0; rank < 2; ++rank)
            world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, true);
    world.run();
    for (int rank = 0; rank < 2; ++rank) world.buffer(rank).check();
    return check_dispatch(problem, ranks, true);
}

std::string three_ranks(uint64_t seed) {
    const Problem problem{.num_tokens = {5, 0, 9}, .num_experts = 3, .hidden = 16, .num_scales = 1, .seed = seed};
    World world = make_world(3, 1 << 14, seed);
    return round_trip(world, problem);
}

// Several blocks and warps count, scan and report: more tokens than one tile, more experts than one warp has lanes.
std::string many_tokens_and_experts(uint64_t seed) {
    Problem problem{.num_tokens = {600, 2}, .num_experts = 200, .num_topk = 1, .hidden = 8, .num_sms = 1, .seed = seed};
    World world = make_world(2, 1 << 20, seed);
    return round_trip(world, problem);
}

std::string low_latency(uint64_t seed) {
    LowLatencyProblem problem{
        .num_tokens = {3, 5}, .num_max_tokens = 6, .num_experts = 4, .num_topk = 2, .hidden = 128};
    problem.is_fp8 = seed % 2 == 0;
    problem.seed = seed;
    World world = make_world(2, 0, seed, low_latency_bytes(problem));
    for (int repeat = 0; repeat < 3; ++repeat)
        if (std::string difference = low_latency_round_trip(world, problem); !difference.empty()) return difference;
    return "";
}

// Two calls are always open, so that a rank sends the next call before it has received the last: only the word that says
// so keeps a peer from writing the bank too early.
std::string low_latency_one_way(uint64_t seed) {
    LowLatencyProblem problem{
        .num_tokens = {5, 0}, .num_max_tokens = 6, .num_experts = 2, .num_topk = 1, .hidden = 128};
    problem.only_expert = 1;
    problem.drop_probability = 0.0;
    problem.seed = seed;
    World world = make_world(2, 0, seed, low_latency_bytes(problem));
    auto ranks = make_low_latency_inputs(problem);
    for (int rank = 0; rank < 2; ++rank) {
        LowLatencyTensors& tensors = ranks[static_cast<size_t>(rank)];
        for (int repeat = 0; repeat < 3; ++repeat) {
            send_dispatch(world, problem, tensors, rank);
            const uint64_t first = tensors.dispatch_ticket;
            send_dispatch(world, problem, tensors, rank);
            tensors.dispatch_ticket = first;
            receive_dispatch(world, problem, tensors, rank);
            ++tensors.dispatch_ticket;
            receive_dispatch(world, problem, tensors, rank);
        }
    }
    world.run();
    for (int rank = 0; rank < 2; ++rank) world.buffer(rank).check();
    return check_low_latency_dispatch(problem, ranks);
}

int run(int id) {
    mutant::active = id;
    const std::pair<const char*, std::function<std::string(uint64_t)>> scenarios[] = {
        {"wrapping windows", wrapping_windows}, {"one-way traffic", one_way_traffic},
        {"three ranks", three_ranks},           {"many tokens and experts", many_tokens_and_experts},
        {"low latency", low_latency},           {"low latency, one way", low_latency_one_way},
    };
    for (const uint64_t seed : {0, 1, 2, 100, 101}) {
        small_device.has_bulk_copy = seed < 100;  // both ways through the high-throughput kernels
        for (const auto& [name, scenario] : scenarios) {
            std::string found;
            try {
                found = scenario(seed);
            } catch (const std::exception& error) {
                found = error.what();
            }
            if (found.empty()) continue;
            std::printf("%s, seed %d: %s\n", name, static_cast<int>(seed), found.c_str());
            return 1;
        }
    }
    return 0;
}

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) { return deep_ep::test::run(argc > 1 ? std::atoi(argv[1]) : 0); }
