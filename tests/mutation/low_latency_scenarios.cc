// Low latency: banks that are used again, two calls open at a time, peers that may be left out.
#include "mutation/scenarios.h"
#include "support/low_latency_world.h"

namespace deep_ep::test {
namespace {

World make_world(const LowLatencyProblem& problem, uint64_t seed, bool is_shrinkable = false) {
    simt::SchedulerOptions options;
    options.seed = seed;
    return World(problem.num_ranks(), 0, options, 100, low_latency_bytes(problem), is_shrinkable, {{.num_sms = 2}});
}

LowLatencyProblem small_problem(uint64_t seed) {
    LowLatencyProblem problem{
        .num_tokens = {3, 5}, .num_max_tokens = 6, .num_experts = 4, .num_topk = 2, .hidden = 128};
    problem.is_fp8 = seed % 2 == 0;
    problem.uses_logfmt = seed % 3 == 1;
    problem.seed = seed;
    return problem;
}

std::string three_round_trips(World& world, const LowLatencyProblem& problem) {
    for (int repeat = 0; repeat < 3; ++repeat)
        if (std::string difference = low_latency_round_trip(world, problem); !difference.empty()) return difference;
    return "";
}

std::string round_trips(uint64_t seed) {
    World world = make_world(small_problem(seed), seed);
    return three_round_trips(world, small_problem(seed));
}

// Nobody is masked; but every table is decided on.
std::string shrinkable(uint64_t seed) {
    World world = make_world(small_problem(seed), seed, true);
    return three_round_trips(world, small_problem(seed));
}

// Two calls are always open, so that a rank sends the next call before it has received the last: only the word that says
// so keeps a peer from writing the bank too early.
std::string one_way(uint64_t seed) {
    LowLatencyProblem problem{
        .num_tokens = {5, 0}, .num_max_tokens = 6, .num_experts = 2, .num_topk = 1, .hidden = 128};
    problem.only_expert = 1;
    problem.drop_probability = 0.0;
    problem.seed = seed;
    World world = make_world(problem, seed);
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

constexpr Scenario kScenarios[] = {
    {"low_latency", round_trips},
    {"low_latency_shrinkable", shrinkable},
    {"low_latency_one_way", one_way},
};

}  // namespace

std::span<const Scenario> low_latency_scenarios() { return kScenarios; }

}  // namespace deep_ep::test
