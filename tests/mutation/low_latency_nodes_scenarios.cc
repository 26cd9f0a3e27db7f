// Low latency across nodes: banks and staging that are used again, both forms of combine, far ranks that do not come.
#include "internode/low_latency_nodes.h"
#include "mutation/scenarios.h"
#include "mutation/worlds.h"

namespace deep_ep::test {
namespace {

NodesOptions small_nodes(int num_nodes, int ranks_per_node, uint64_t seed) {
    NodesOptions options{.num_nodes = num_nodes, .ranks_per_node = ranks_per_node};
    options.scheduler = seeded(seed);
    options.network_seed = seed;
    options.max_posted = seed % 5 == 4 ? 2 : 4096;
    options.device = {.num_sms = seed % 2 == 0 ? 2 : 1, .has_bulk_copy = false, .useful_block_threads = 64};
    return options;
}

LowLatencyProblem small_problem(const NodesOptions& options, uint64_t seed) {
    LowLatencyProblem problem{.num_tokens = {}, .num_max_tokens = 5, .num_experts = 2 * options.num_ranks()};
    for (int rank = 0; rank < options.num_ranks(); ++rank) problem.num_tokens.push_back(rank % 2 == 0 ? 3 : 5);
    problem.hidden = 128;
    problem.is_fp8 = seed % 2 == 0;
    problem.uses_logfmt = seed % 3 == 1;
    problem.seed = seed;
    return problem;
}

LowLatencyProblem small_problem(const NodesOptions& options, uint64_t seed, int num_experts, int num_topk) {
    LowLatencyProblem problem = small_problem(options, seed);
    problem.num_experts = num_experts;
    problem.num_topk = num_topk;
    return problem;
}

std::string three_round_trips(const NodesOptions& options, const LowLatencyProblem& problem) {
    LowLatencyNodes nodes(options, problem);
    for (Launches launches : {Launches::kOne, Launches::kTwo, Launches::kOne})
        if (std::string difference = low_latency_round_trip(nodes.world(), problem, launches); !difference.empty())
            return difference;
    return "";
}

EP_SCENARIO(low_latency_nodes_round_trips, seed) {
    const NodesOptions options = small_nodes(2, 1, seed);
    return three_round_trips(options, small_problem(options, seed));
}

// Blocks of two warps, and more entries than one of them has lanes: the table that a warp puts is the work of both.
EP_SCENARIO(low_latency_nodes_several_warps, seed) {
    NodesOptions options = small_nodes(2, 1, seed);
    options.device.num_sms = 1;
    options.device.useful_block_threads = 128;
    return three_round_trips(options, small_problem(options, seed, 16, 8));
}

EP_SCENARIO(low_latency_nodes_neighbours_too, seed) {
    const NodesOptions options = small_nodes(2, 2, seed);
    return three_round_trips(options, small_problem(options, seed));
}

// More top-k entries than slots by entry are for; and rows that find no place in staging.
EP_SCENARIO(low_latency_nodes_by_source, seed) {
    const NodesOptions options = small_nodes(2, 1, seed);
    return three_round_trips(options, small_problem(options, seed, 36, 17));
}

// A rank of three sends further rows than staging has places for.
EP_SCENARIO(low_latency_nodes_crowded_staging, seed) {
    const NodesOptions options = small_nodes(3, 1, seed);
    LowLatencyProblem problem = small_problem(options, seed);
    problem.num_topk = 8;
    problem.only_expert = 3;
    problem.drop_probability = 0;
    return three_round_trips(options, problem);
}

EP_SCENARIO(low_latency_nodes_dropped_entries, seed) {
    const NodesOptions options = small_nodes(2, 1, seed);
    const LowLatencyProblem problem = small_problem(options, seed);
    LowLatencyNodes nodes(options, problem);
    for (int round = 0; round < 3; ++round) {
        const Launches launches = (static_cast<uint64_t>(round) + seed) % 2 == 0 ? Launches::kOne : Launches::kTwo;
        auto ranks = make_low_latency_inputs(problem);
        run_on(Call::kDispatch, nodes.world(), problem, ranks, all_ranks(problem), launches);
        fill_expert_rows(problem, ranks);
        for (auto& tensors : ranks)
            for (size_t i = 0; i < tensors.topk_idx.size(); ++i)
                if (i % 3 == 0 || i / 3 % 2 == 1) tensors.topk_idx[i] = -1;
        run_on(Call::kCombine, nodes.world(), problem, ranks, all_ranks(problem), launches);
        if (std::string difference = check_low_latency_combine(problem, ranks); !difference.empty()) return difference;
    }
    return "";
}

// Two calls open at a time, received in another order by every second rank. With neighbours, rows lie in each other's windows.
EP_SCENARIO(low_latency_nodes_two_open_calls, seed) {
    const NodesOptions options = small_nodes(2, seed % 2 == 0 ? 2 : 1, seed);
    const LowLatencyProblem problem = small_problem(options, seed);
    LowLatencyNodes nodes(options, problem);
    World& world = nodes.world();
    for (int round = 0; round < 3; ++round) {
        MicroBatch a{world, problem}, b{world, problem};
        const auto receive = [&](int rank) {
            (rank % 2 == 0 ? a : b).receive(Call::kDispatch, rank);
            (rank % 2 == 0 ? b : a).receive(Call::kDispatch, rank);
        };
        if (std::string difference = run_both(Call::kDispatch, a, b, receive); !difference.empty()) return difference;
    }
    return "";
}

EP_SCENARIO(low_latency_nodes_clean, seed) {
    const NodesOptions options = small_nodes(2, 2, seed);
    const LowLatencyProblem problem = small_problem(options, seed);
    LowLatencyNodes nodes(options, problem);
    for (int round = 0; round < 2; ++round) {
        for (int rank = 0; rank < options.num_ranks(); ++rank)
            nodes.world().buffer(rank).low_latency().clean(nodes.world().stream(rank));
        nodes.world().run();
        nodes.world().check_all();
        if (std::string difference = low_latency_round_trip(nodes.world(), problem, Launches::kOne);
            !difference.empty())
            return difference;
    }
    return "";
}

// Whoever has cleaned knows that all others have ended what they launched before.
EP_SCENARIO(low_latency_nodes_clean_with_a_slow_rank, seed) {
    NodesOptions options = small_nodes(2, 2, seed);
    options.scheduler = {.slow_device = static_cast<int>(seed) % 4};
    const LowLatencyProblem problem = small_problem(options, seed);
    LowLatencyNodes nodes(options, problem);
    World& world = nodes.world();
    const int slow = options.scheduler.slow_device;
    if (std::string difference = low_latency_round_trip(world, problem, Launches::kOne); !difference.empty())
        return difference;
    std::string found;
    nodes.run([&] {
        const dev::Event launched_before = world.device(slow).create_event();
        auto ranks = make_low_latency_inputs(problem);
        for (int rank = 0; rank < options.num_ranks(); ++rank)
            launch(Call::kDispatch, world, problem, ranks, rank, Launches::kOne);
        world.device(slow).record_event(launched_before, world.stream(slow));
        for (int rank = 0; rank < options.num_ranks(); ++rank)
            world.buffer(rank).low_latency().clean(world.stream(rank));
        for (int rank = 0; rank < options.num_ranks(); ++rank) {
            world.device(rank).synchronize_stream(world.stream(rank));
            if (!world.device(slow).query_event(launched_before)) found = "a clean ended before all had entered it";
        }
        world.device(slow).destroy_event(launched_before);
    });
    return found;
}

// The last rank, of another node, does not come.
EP_SCENARIO(low_latency_nodes_absent_rank, seed) {
    NodesOptions options = small_nodes(2, 2, seed);
    options.scheduler = impatient(seed);
    options.timeout_s = 2.0;
    const LowLatencyProblem problem = small_problem(options, seed);
    LowLatencyNodes nodes(options, problem);
    auto ranks = make_low_latency_inputs(problem);
    run_on(Call::kDispatch, nodes.world(), problem, ranks, {0, 1, 2});
    for (int rank : {0, 1, 2})
        if (std::string difference = expect_failure("rank 3 of node 1", [&] { nodes.world().buffer(rank).check(); });
            !difference.empty())
            return difference;
    return "";
}

// Rank 2 does not come to a clean, and rank 1 comes late: rank 0 gives up first, by a lane that is not the one which tells.
EP_SCENARIO(low_latency_nodes_failure_in_clean, seed) {
    constexpr uint64_t kTimeoutNs = 100'000;
    NodesOptions options = small_nodes(3, 1, seed);
    options.scheduler = impatient(seed);
    options.timeout_s = kTimeoutNs * 1e-9;
    LowLatencyNodes nodes(options, small_problem(options, seed));
    World& world = nodes.world();
    pass_time(world, 1, kTimeoutNs / 2);
    for (int rank : {0, 1}) world.buffer(rank).low_latency().clean(world.stream(rank));
    world.run();
    return expect_failure("aborted, rank 0 of node 0 gave up", [&] { world.buffer(1).check(); });
}

// No scenario masks a far rank: puts to it may be under way when its staging is written again, which is a race by design of rows
// that nobody reads (docs/protocols/low_latency_nodes.md), and ThreadSanitizer would end every run with it.

}  // namespace

}  // namespace deep_ep::test
