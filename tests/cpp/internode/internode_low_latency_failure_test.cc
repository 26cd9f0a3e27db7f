// Low latency across nodes when something goes wrong: far ranks that are missing or masked, and what memory must suffice.
#include <doctest/doctest.h>

#include "core/error.h"
#include "device/launch.h"
#include "device/prim.h"
#include "internode/low_latency_nodes.h"
#include "support/seeds.h"

namespace deep_ep::test {
namespace {

NodesOptions impatient_nodes(bool is_shrinkable) {
    return {.num_nodes = 2,
            .ranks_per_node = 2,
            .scheduler = impatient(),
            .timeout_s = 2.0,
            .is_shrinkable = is_shrinkable};
}

LowLatencyProblem small_problem() {
    LowLatencyProblem problem{.num_tokens = {5, 3, 8, 0}, .num_max_tokens = 8, .num_experts = 8};
    problem.hidden = 128;
    return problem;
}

TEST_CASE("low latency across nodes: a rank that does not come is named, with its node, by all others") {
    for (Launches launches : {Launches::kOne, Launches::kTwo}) {
        const LowLatencyProblem problem = small_problem();
        LowLatencyNodes nodes(impatient_nodes(false), problem);
        World& world = nodes.world();
        auto ranks = make_low_latency_inputs(problem);
        run_on(Call::kDispatch, world, problem, ranks, {0, 1, 2}, launches);
        for (int rank : {0, 1, 2})
            CHECK_THROWS_WITH_AS(world.buffer(rank).check(), doctest::Contains("rank 3 of node 1"), TimeoutError);
        CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("never entered this call"), TimeoutError);
    }
}

TEST_CASE(
    "low latency across nodes: with enable_shrink a far rank that does not come is masked, and the others go on") {
    for (Launches launches : {Launches::kOne, Launches::kTwo}) {
        const LowLatencyProblem problem = small_problem();  // the last rank has no tokens
        LowLatencyNodes nodes(impatient_nodes(true), problem);
        World& world = nodes.world();
        for (int round = 0; round < 4; ++round) {
            auto ranks = make_low_latency_inputs(problem);
            for (auto& tensors : ranks)
                for (auto& idx : tensors.topk_idx) idx = idx >= 6 ? -1 : idx;  // none of its experts
            run_on(Call::kDispatch, world, problem, ranks, {0, 1, 2}, launches);
            for (int rank : {0, 1, 2}) {
                world.buffer(rank).check();
                CHECK_EQ(world.buffer(rank).low_latency().masked_ranks()[3], 1);
                CHECK_EQ(check_low_latency_dispatch_of(problem, ranks, rank), "");
            }
            fill_expert_rows(problem, ranks);
            run_on(Call::kCombine, world, problem, ranks, {0, 1, 2}, launches);
            for (int rank : {0, 1, 2}) world.buffer(rank).check();
            ranks[3].combined_x.clear();
            CHECK_EQ(check_low_latency_combine(problem, ranks), "");
        }
    }
}

// Masks a rank, some time after it has begun.
struct MaskKernel {
    struct Params {
        int* masked;
        int num_pauses;
    };
    struct Shared {};

    static void run(const Params& p, Shared&) {
        for (int i = 0; i < p.num_pauses; ++i) prim::pause();
        prim::store<prim::Order::kRelaxed, prim::Scope::kGpu>(p.masked, 1);
    }
};

// Warps of a block share the puts of a token by turns. One that sees the mask and one that does not would count them otherwise.
TEST_CASE("low latency across nodes: a rank that is masked while others send takes no row of theirs with it") {
    for (uint64_t seed = 1; seed <= num_seeds(40); ++seed) {
        CAPTURE(seed);
        NodesOptions options{.num_nodes = 3, .ranks_per_node = 1, .scheduler = seeded(seed), .network_seed = seed};
        options.scheduler.idle = simt::IdlePolicy::kAdvanceClock;
        options.timeout_s = 2.0;
        options.is_shrinkable = true;
        LowLatencyProblem problem{.num_tokens = {8, 0, 3}, .num_max_tokens = 8, .num_experts = 3, .num_topk = 2};
        problem.drop_probability = 0;
        LowLatencyNodes nodes(options, problem);
        World& world = nodes.world();
        auto ranks = make_low_latency_inputs(problem);
        for (size_t i = 0; i < ranks[0].topk_idx.size(); ++i) ranks[0].topk_idx[i] = i % 2 == 0 ? 1 : 2;
        for (auto& idx : ranks[2].topk_idx) idx = 2;
        world.buffer(2).low_latency().masked_ranks()[1] = 1;
        const dev::Stream beside = world.device(0).create_stream();
        const auto num_pauses = static_cast<int>(seed * 3);
        dev::launch<MaskKernel>({.name = "mask"}, beside,
                                {&world.buffer(0).low_latency().masked_ranks()[1], num_pauses});
        run_on(Call::kDispatch, world, problem, ranks, {0, 2}, Launches::kOne);
        world.device(0).destroy_stream(beside);
        for (int rank : {0, 2}) world.buffer(rank).check();
        CHECK_EQ(world.buffer(2).low_latency().masked_ranks()[0], 0);
        CHECK_EQ(check_low_latency_dispatch_of(problem, ranks, 2), "");
    }
}

TEST_CASE("low latency across nodes: with enable_shrink a rank that gives up aborts nobody, nor does its kernel") {
    const LowLatencyProblem problem = small_problem();
    LowLatencyNodes nodes(impatient_nodes(true), problem);
    World& world = nodes.world();
    auto ranks = make_low_latency_inputs(problem);
    abandon_dispatch_of_rank_0(world, problem, ranks);
    CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("KeyboardInterrupt"), Error);
    for (int rank : {1, 2, 3}) CHECK_EQ(world.buffer(rank).look(), "");
    run_on(Call::kDispatch, world, problem, ranks, {1, 2, 3}, Launches::kOne);
    for (int rank : {1, 2, 3}) CHECK_NOTHROW(world.buffer(rank).check());
}

TEST_CASE("low latency across nodes: a rank that waits for its bank has entered the call") {
    NodesOptions options = impatient_nodes(false);
    options.num_nodes = 3;
    options.ranks_per_node = 1;
    LowLatencyProblem problem = small_problem();
    problem.num_tokens = {5, 3, 8};
    problem.num_experts = 6;
    LowLatencyNodes nodes(options, problem);
    World& world = nodes.world();
    auto first = make_low_latency_inputs(problem), second = first, third = first;
    // Rank 0 calls no hook, so the third call of the others finds its bank in use.
    for (int rank = 0; rank < 3; ++rank) {
        send(Call::kDispatch, world, problem, first, rank);
        if (rank != 0) receive(Call::kDispatch, world, problem, first, rank);
        send(Call::kDispatch, world, problem, second, rank);
        if (rank != 0) receive(Call::kDispatch, world, problem, second, rank);
    }
    world.run();
    run_on(Call::kDispatch, world, problem, third, {1, 2});
    for (int rank : {1, 2}) {
        CHECK_THROWS_WITH_AS(world.buffer(rank).check(),
                             doctest::Contains("never entered this call: rank 0 of node 0 (its last call was 2)"),
                             TimeoutError);
        CHECK_EQ(world.buffer(rank).failure().find(concat("rank ", 3 - rank)), std::string::npos);
    }
}

TEST_CASE("low latency across nodes: cleaning is a barrier, and names who does not come") {
    const LowLatencyProblem problem = small_problem();
    LowLatencyNodes nodes(impatient_nodes(false), problem);
    World& world = nodes.world();
    const auto clean = [&](int rank) { world.buffer(rank).low_latency().clean(world.stream(rank)); };
    for (int round = 0; round < 3; ++round) {
        for (int rank = 0; rank < 4; ++rank) clean(rank);
        world.run();
        world.check_all();
    }
    for (int rank : {1, 2, 3}) clean(rank);
    world.run();
    CHECK_THROWS_WITH_AS(world.buffer(2).check(), doctest::Contains("rank 0 of node 0"), TimeoutError);
}

TEST_CASE("low latency across nodes: shares of the heap and the window hold what the hint asks for, for any shape") {
    for (const std::pair<int, int>& group : {std::pair{2, 1}, {4, 2}, {8, 4}, {16, 8}, {64, 8}})
        for (int hidden : {128, 2048, 7168})
            for (int num_max_tokens : {1, 16, 128}) {
                const int num_ranks = group.first, ranks_per_node = group.second;
                const auto data_bytes = static_cast<uint64_t>(
                    runtime::LowLatency::size_hint(num_max_tokens, hidden, num_ranks, 4 * num_ranks));
                const auto shares = layout::LowLatencyShares::make(data_bytes, static_cast<uint64_t>(num_ranks),
                                                                   static_cast<uint64_t>(ranks_per_node));
                using Slots = layout::LowLatencyEntrySlots;
                const uint64_t entries = Slots::bytes(static_cast<uint64_t>(num_max_tokens), Slots::kHintTopk,
                                                      static_cast<uint64_t>(hidden));
                const auto table =
                    layout::LowLatencyMessage::make(static_cast<uint64_t>(num_max_tokens), Slots::kHintTopk, 0, 16, 0)
                        .slots.offset;
                CAPTURE(num_ranks);
                CAPTURE(hidden);
                CAPTURE(num_max_tokens);
                CHECK_GE(shares.heap() / layout::kNumLowLatencyBanks, entries);
                CHECK_GE(shares.receive(), entries + shares.num_far() * table);
                const uint64_t all =
                    shares.heap() + layout::kNumLowLatencyBanks * (shares.receive() + shares.staging());
                CHECK_LE(2 * all, 7 * data_bytes);  // most with two nodes of four
            }
}

}  // namespace
}  // namespace deep_ep::test
