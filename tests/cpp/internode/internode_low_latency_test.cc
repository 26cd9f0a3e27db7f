// Low latency across nodes over the engine `sim`: the calls of low_latency_test.cc, with far ranks.
#include <doctest/doctest.h>

#include <utility>

#include "internode/low_latency_nodes.h"
#include "support/seeds.h"

namespace deep_ep::test {
namespace {

using Topology = std::pair<int, int>;  // nodes, ranks of each

LowLatencyProblem problem_of(const NodesOptions& options, uint64_t seed = 1) {
    LowLatencyProblem problem{.num_tokens = {}, .num_max_tokens = 8, .num_experts = 2 * options.num_ranks()};
    for (int rank = 0; rank < options.num_ranks(); ++rank)
        problem.num_tokens.push_back(rank == 1 ? 0
                                               : 8 - static_cast<int>((static_cast<uint64_t>(rank) * 3 + seed) % 5));
    problem.hidden = 128;
    problem.seed = seed;
    return problem;
}

void check_round_trip(const NodesOptions& options, const LowLatencyProblem& problem) {
    for (Launches launches : {Launches::kOne, Launches::kTwo}) {
        CAPTURE(static_cast<int>(launches));
        LowLatencyNodes nodes(options, problem);
        for (int round = 0; round < 2; ++round) CHECK_EQ(low_latency_round_trip(nodes.world(), problem, launches), "");
    }
}

TEST_CASE("low latency across nodes: any topology") {
    for (const Topology& topology : {Topology{2, 1}, {2, 2}, {3, 2}, {4, 1}, {2, 4}}) {
        const int num_nodes = topology.first, ranks_per_node = topology.second;
        CAPTURE(num_nodes);
        CAPTURE(ranks_per_node);
        NodesOptions options{.num_nodes = num_nodes, .ranks_per_node = ranks_per_node};
        check_round_trip(options, problem_of(options));
        if (ranks_per_node == 1) continue;
        options.shares_windows = false;
        check_round_trip(options, problem_of(options));
    }
}

TEST_CASE("low latency across nodes: one free SM is enough (pitfall 38)") {
    for (uint64_t seed : {0, 1}) {
        CAPTURE(seed);
        NodesOptions options;
        options.scheduler.seed = seed;
        options.scheduler.max_resident_blocks = 1;
        options.network_seed = seed;
        check_round_trip(options, problem_of(options, seed + 1));
        options.shares_windows = false;
        check_round_trip(options, problem_of(options, seed + 1));
    }
}

// Nodes of three: ranks of the last one stand in two groups of 32, and it gets one copy all the same.
TEST_CASE("low latency across nodes: more ranks than a warp has lanes") {
    const NodesOptions options{
        .num_nodes = 11,
        .ranks_per_node = 3,
        .device = {.num_sms = 1, .has_bulk_copy = false, .useful_block_threads = 64},
    };
    LowLatencyProblem problem = problem_of(options);
    problem.num_max_tokens = 8;
    problem.num_topk = 8;
    problem.num_experts = options.num_ranks();
    LowLatencyNodes nodes(options, problem);
    CHECK_EQ(low_latency_round_trip(nodes.world(), problem, Launches::kOne), "");
}

// Bytes that `rank` has put to the far rank `peer` by a dispatch, then a combine, of one launch each.
struct Sent {
    uint64_t dispatch, combine;
};

Sent expected_bytes(const NodesOptions& options, const LowLatencyProblem& problem,
                    const std::vector<LowLatencyTensors>& ranks, int rank, int peer) {
    const layout::Topology place{options.num_ranks(), options.ranks_per_node, rank};
    const auto num_tokens = [&](int of) { return problem.num_tokens[static_cast<size_t>(of)]; };
    const auto has_entry = [&](int source, int token, int first, int count) {
        for (int k = 0; k < problem.num_topk; ++k) {
            const auto expert =
                ranks[static_cast<size_t>(source)].topk_idx[static_cast<size_t>(token * problem.num_topk + k)];
            const int64_t owner = expert < 0 ? -1 : expert / problem.num_local_experts();
            if (owner >= first && owner < first + count) return true;
        }
        return false;
    };
    const auto count_tokens = [&](int source, int first, int count) {
        uint64_t found = 0;
        for (int token = 0; token < num_tokens(source); ++token)
            found += has_entry(source, token, first, count) ? 1 : 0;
        return found;
    };
    const auto hidden = static_cast<uint64_t>(problem.hidden), num_topk = static_cast<uint64_t>(problem.num_topk);
    const uint64_t own_entries = static_cast<uint64_t>(num_tokens(rank)) * num_topk;
    const auto rounded = [](uint64_t bytes) { return layout::align_up(bytes, 16); };
    const uint64_t row = problem.is_fp8 ? rounded(hidden + 4 * hidden / 128) : 2 * hidden;
    const bool is_on_rail = place.index_of(peer) == place.index();
    const uint64_t copies =
        !options.shares_windows ? count_tokens(rank, peer, 1)
        : is_on_rail ? count_tokens(rank, place.node_of(peer) * options.ranks_per_node, options.ranks_per_node)
                     : 0;
    const uint64_t table = rounded(16 + 4 * static_cast<uint64_t>(problem.num_experts) + 4 * own_entries);
    const uint64_t weights =
        rounded(16 + 4 * static_cast<uint64_t>(problem.num_max_tokens) * num_topk + 4 * own_entries);
    return {table + copies * row, weights + count_tokens(peer, rank, 1) * 2 * hidden};
}

TEST_CASE(
    "low latency across nodes: bytes on the rail are those of the formula: a row once for each node, or each rank") {
    for (const bool shares_windows : {true, false})
        for (const bool is_fp8 : {true, false}) {
            CAPTURE(shares_windows);
            CAPTURE(is_fp8);
            const NodesOptions options{.num_nodes = 3, .ranks_per_node = 2, .shares_windows = shares_windows};
            LowLatencyProblem problem = problem_of(options);
            problem.num_topk = 4;
            problem.is_fp8 = is_fp8;
            LowLatencyNodes nodes(options, problem);
            auto ranks = make_low_latency_inputs(problem);
            const auto check = [&](uint64_t Sent::*first, uint64_t Sent::*second) {
                for (int rank = 0; rank < options.num_ranks(); ++rank)
                    for (int peer = 0; peer < options.num_ranks(); ++peer) {
                        if (peer / options.ranks_per_node == rank / options.ranks_per_node) continue;
                        CAPTURE(rank);
                        CAPTURE(peer);
                        const Sent sent = expected_bytes(options, problem, ranks, rank, peer);
                        CHECK_EQ(nodes.engine(rank).sent_to(peer).num_bytes,
                                 sent.*first + (second == nullptr ? 0 : sent.*second));
                    }
            };
            run_on(Call::kDispatch, nodes.world(), problem, ranks, all_ranks(problem), Launches::kOne);
            CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
            check(&Sent::dispatch, nullptr);
            fill_expert_rows(problem, ranks);
            run_on(Call::kCombine, nodes.world(), problem, ranks, all_ranks(problem), Launches::kOne);
            CHECK_EQ(check_low_latency_combine(problem, ranks), "");
            check(&Sent::dispatch, &Sent::combine);
        }
}

TEST_CASE("low latency across nodes: random schedules and networks give the same bits") {
    for (uint64_t seed = 1; seed <= num_seeds(12); ++seed) {
        CAPTURE(seed);
        const NodesOptions options{.num_nodes = seed % 3 == 0 ? 3 : 2,
                                   .ranks_per_node = seed % 2 == 0 ? 1 : 2,
                                   .scheduler = seeded(seed),
                                   .network_seed = seed,
                                   .max_posted = seed % 4 == 1 ? size_t{2} : size_t{4096},
                                   .shares_windows = seed % 5 != 0};
        LowLatencyProblem problem = problem_of(options, seed);
        problem.is_fp8 = seed % 2 == 1;
        problem.uses_logfmt = seed % 3 == 1;
        check_round_trip(options, problem);
    }
}

TEST_CASE("low latency across nodes: formats, and combine by source where entries have no slots") {
    const NodesOptions options{.num_nodes = 2, .ranks_per_node = 2, .scheduler = seeded(7), .network_seed = 3};
    for (int hidden : {128, 512, 640}) {
        CAPTURE(hidden);
        LowLatencyProblem problem = problem_of(options);
        problem.hidden = hidden;
        check_round_trip(options, problem);
        problem.is_fp8 = problem.rounds_scales = problem.uses_logfmt = true;
        problem.packs_scales = hidden == 512;
        check_round_trip(options, problem);
        problem.num_topk = 17;
        problem.num_experts = 40;
        check_round_trip(options, problem);
    }
    LowLatencyProblem many = problem_of(options);
    many.num_topk = 40;
    many.num_experts = 80;
    NodesOptions more = options;
    more.num_more_bytes = 1 << 20;
    check_round_trip(more, many);
}

TEST_CASE("low latency across nodes: all tokens to one expert, once and often, and nothing at all") {
    const NodesOptions options{.num_nodes = 2, .ranks_per_node = 2};
    LowLatencyProblem problem = problem_of(options);
    problem.only_expert = 6;
    problem.drop_probability = 0;
    check_round_trip(options, problem);
    problem.num_topk = 8;  // more rows for far owners than staging has places: some wait for weights and are summed
    check_round_trip(options, problem);
    problem.num_topk = 3;
    problem.only_expert = -1;
    problem.drop_probability = 1;
    check_round_trip(options, problem);
}

TEST_CASE("low latency across nodes: two micro-batches overlap through hooks, called in either order") {
    for (uint64_t seed : {0, 3, 5, 8}) {
        CAPTURE(seed);
        const NodesOptions options{
            .num_nodes = 2, .ranks_per_node = 2, .scheduler = seeded(seed), .network_seed = seed};
        const LowLatencyProblem first = problem_of(options, 3);
        LowLatencyProblem second = problem_of(options, 4);
        second.is_fp8 = true;
        LowLatencyNodes nodes(options, first);
        World& world = nodes.world();
        for (int round = 0; round < 3; ++round) {
            MicroBatch a{world, first}, b{world, second};
            const auto is_swapped = [&](int rank) { return (static_cast<uint64_t>(rank) + seed) % 2 == 0; };
            const auto receive_dispatch = [&](int rank) {
                (is_swapped(rank) ? b : a).receive(Call::kDispatch, rank);
                (is_swapped(rank) ? a : b).receive(Call::kDispatch, rank);
            };
            CHECK_EQ(run_both(Call::kDispatch, a, b, receive_dispatch), "");
            const auto receive_combine = [&](int rank) {
                (is_swapped(rank) ? a : b).receive(Call::kCombine, rank);
                (is_swapped(rank) ? b : a).receive(Call::kCombine, rank);
            };
            CHECK_EQ(run_both(Call::kCombine, a, b, receive_combine), "");
        }
    }
}

// The send phases of a combine one after the other, each to its end before the next begins; the combined rows of all ranks.
std::vector<std::vector<uint16_t>> combine_in_order(const NodesOptions& options, const LowLatencyProblem& problem,
                                                    const std::vector<int>& order) {
    LowLatencyNodes nodes(options, problem);
    World& world = nodes.world();
    std::vector<std::vector<uint16_t>> combined;
    for (int repeat = 0; repeat < 2; ++repeat) {
        auto ranks = make_low_latency_inputs(problem);
        for (int rank : order) {
            send(Call::kDispatch, world, problem, ranks, rank);
            world.run();  // a proven deadlock, were it to wait for anybody
        }
        for (int rank : order) {
            receive(Call::kDispatch, world, problem, ranks, rank);
            world.run();  // the same: nothing that it needs takes a launch of another rank any more
        }
        CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
        fill_expert_rows(problem, ranks);
        for (int rank : order) {
            send(Call::kCombine, world, problem, ranks, rank);
            world.run();
        }
        for (int rank : order) receive(Call::kCombine, world, problem, ranks, rank);
        world.run();
        CHECK_EQ(check_low_latency_combine(problem, ranks), "");
        for (const auto& tensors : ranks) combined.push_back(tensors.combined_x);
    }
    return combined;
}

TEST_CASE(
    "low latency across nodes: with hooks nobody waits for a peer that has not entered, and the bits are the same") {
    for (bool uses_logfmt : {false, true}) {
        NodesOptions options{.num_nodes = 2, .ranks_per_node = 2};
        LowLatencyProblem problem = problem_of(options);
        problem.num_topk = 6;
        problem.hidden = uses_logfmt ? 1000 : 640;
        problem.uses_logfmt = uses_logfmt;
        const auto expected = combine_in_order(options, problem, {0, 1, 2, 3});
        CHECK(combine_in_order(options, problem, {3, 0, 2, 1}) == expected);
        options.scheduler = seeded(4);
        options.network_seed = 4;
        CHECK(combine_in_order(options, problem, {2, 3, 1, 0}) == expected);
    }
}

TEST_CASE("low latency across nodes: entries that combine drops, and whole tokens, leave nothing under way") {
    for (Launches launches : {Launches::kOne, Launches::kTwo})
        for (uint64_t seed : {0, 2, 9}) {
            const NodesOptions options{
                .num_nodes = 2, .ranks_per_node = 2, .scheduler = seeded(seed), .network_seed = seed};
            LowLatencyProblem problem = problem_of(options);
            problem.num_topk = 4;
            LowLatencyNodes nodes(options, problem);
            for (int round = 0; round < 3; ++round) {
                auto ranks = make_low_latency_inputs(problem);
                run_on(Call::kDispatch, nodes.world(), problem, ranks, all_ranks(problem), launches);
                CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
                fill_expert_rows(problem, ranks);
                for (auto& tensors : ranks)
                    for (size_t i = 0; i < tensors.topk_idx.size(); ++i)
                        if (i % 3 == 0 || i / 4 % 3 == 1) tensors.topk_idx[i] = -1;
                run_on(Call::kCombine, nodes.world(), problem, ranks, all_ranks(problem), launches);
                nodes.world().check_all();
                CHECK_EQ(check_low_latency_combine(problem, ranks), "");
            }
        }
}

TEST_CASE("low latency across nodes: shapes interleave, and one resident block of a device is enough") {
    NodesOptions options{.num_nodes = 2, .ranks_per_node = 2, .scheduler = seeded(6), .network_seed = 1};
    options.scheduler.max_resident_blocks = 1;
    LowLatencyProblem largest = problem_of(options);
    largest.hidden = 512;
    largest.num_experts = 16;
    LowLatencyNodes nodes(options, largest);
    for (int round = 0; round < 6; ++round) {
        CAPTURE(round);
        LowLatencyProblem problem = problem_of(options, static_cast<uint64_t>(round) + 20);
        problem.num_experts = 4 * (1 + round % 4);
        problem.num_topk = 1 + round % 5;
        problem.hidden = 128 * (1 + round % 3);
        problem.is_fp8 = round % 2 == 1;
        CHECK_EQ(low_latency_round_trip(nodes.world(), problem, round % 3 == 0 ? Launches::kTwo : Launches::kOne), "");
    }
}

TEST_CASE("low latency across nodes: graphs replay, and counts are added to the caller's statistics") {
    const NodesOptions options{.num_nodes = 2, .ranks_per_node = 2};
    const LowLatencyProblem problem = problem_of(options);
    for (Launches launches : {Launches::kOne, Launches::kTwo}) {
        LowLatencyNodes nodes(options, problem);
        World& world = nodes.world();
        auto ranks = make_low_latency_inputs(problem);
        fill_expert_rows(problem, ranks);
        std::vector<simt::Graph> graphs;
        for (int rank = 0; rank < options.num_ranks(); ++rank) {
            graphs.push_back(captured(world, rank, [&] {
                launch(Call::kDispatch, world, problem, ranks, rank, launches);
                launch(Call::kCombine, world, problem, ranks, rank, launches);
            }));
        }
        for (int round = 1; round <= 4; ++round) {
            for (int rank = 0; rank < options.num_ranks(); ++rank)
                graphs[static_cast<size_t>(rank)].replay(world.stream(rank));
            world.run();
            CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
            CHECK_EQ(check_low_latency_combine(problem, ranks), "");
            for (const LowLatencyTensors& tensors : ranks)
                for (size_t expert = 0; expert < tensors.recv_count.size(); ++expert)
                    CHECK_EQ(tensors.cumulative_stats[expert], 100 + round * tensors.recv_count[expert]);
        }
    }
}

}  // namespace
}  // namespace deep_ep::test
