// The protocol across nodes on the executor, over a network that keeps no promise: many topologies, shapes and schedules, compared
// bit for bit.
#include <doctest/doctest.h>

#include <numeric>

#include "device/simt/happens_before.h"
#include "internode/internode_world.h"
#include "support/seeds.h"

namespace deep_ep::test {
namespace {

struct Nodes {
    int num_nodes, ranks_per_node;
};
constexpr Nodes kTopologies[] = {{2, 1}, {2, 2}, {2, 4}, {3, 2}, {4, 2}, {8, 1}, {16, 2}};
constexpr Nodes kSmall[] = {{2, 1}, {2, 2}, {3, 2}};

InternodeOptions options_for(const Nodes& nodes, uint64_t seed = 0) {
    InternodeOptions options{.num_nodes = nodes.num_nodes, .ranks_per_node = nodes.ranks_per_node};
    options.scheduler = seeded(seed);
    options.network_seed = seed + 1;
    return options;
}

Problem problem_for(const InternodeOptions& options, int num_tokens = 9) {
    Problem problem{.num_tokens = {}, .num_experts = 2 * options.num_ranks(), .num_topk = 4, .hidden = 24};
    for (int rank = 0; rank < options.num_ranks(); ++rank)
        problem.num_tokens.push_back(num_tokens - rank % 3 * (num_tokens / 4));
    return problem;
}

void check_round_trip(const InternodeOptions& options, const Problem& problem) {
    CAPTURE(options.num_nodes);
    CAPTURE(options.ranks_per_node);
    InternodeWorld world(options, problem);
    CHECK_EQ(world.round_trip(problem), "");
}

// A chunk of one token, one or two places for it: every token waits for the one before.
InternodeOptions with_tight_credits(InternodeOptions options) {
    options.rail_slots = 2;
    options.chunk_tokens = 1;
    options.window = 1;
    options.num_blocks = 1;
    return options;
}

std::vector<uint64_t> seeds(uint64_t count) {
    std::vector<uint64_t> all(num_seeds(count));
    std::iota(all.begin(), all.end(), 0);
    return all;
}

constexpr int kNumSeeds = 12;

TEST_CASE("every topology: fresh, combined, cached, combined") {
    for (const Nodes& nodes : kTopologies) {
        const InternodeOptions options = options_for(nodes);
        Problem problem = problem_for(options);
        problem.num_scales = 3;
        problem.num_biases = 1;
        problem.expert_alignment = 4;
        check_round_trip(options, problem);
    }
}

TEST_CASE("every topology with credits of one chunk and one warp of each role") {
    for (const Nodes& nodes : kTopologies) {
        const InternodeOptions options = with_tight_credits(options_for(nodes));
        check_round_trip(options, problem_for(options, nodes.num_nodes > 8 ? 4 : 9));
    }
}

TEST_CASE("rail peers that stores reach: tokens are written where they go, under the same credits") {
    for (const uint64_t seed : seeds(kNumSeeds))
        for (const Nodes& nodes : kSmall) {
            CAPTURE(seed);
            InternodeOptions options = options_for(nodes, seed);
            options.is_near = true;
            options.rail_slots = 6;
            options.chunk_tokens = 1 + seed % 3;
            options.num_warps = 1 + static_cast<int>(seed % 2);
            Problem problem = problem_for(options, 14);
            problem.seed = seed + 1;
            problem.num_scales = static_cast<int>(seed % 3);
            problem.num_biases = static_cast<int>(seed % 2);
            check_round_trip(options, problem);
            check_round_trip(with_tight_credits(options), problem);
        }
}

TEST_CASE("a call needs no more SMs than it has blocks (pitfall 38)") {
    for (const Nodes& nodes : kSmall) {
        for (uint64_t seed : seeds(4)) {
            CAPTURE(seed);
            InternodeOptions options = options_for(nodes, seed);
            options.scheduler.max_resident_blocks = options.num_blocks;
            check_round_trip(options, problem_for(options));
        }
    }
}

TEST_CASE("random schedules and networks give the same bits") {
    for (const uint64_t seed : seeds(kNumSeeds))
        for (const Nodes& nodes : kSmall) {
            CAPTURE(seed);
            InternodeOptions options = options_for(nodes, seed);
            options.rail_slots = 6;
            options.chunk_tokens = 1 + seed % 3;
            options.window = 3;
            options.num_warps = 1 + static_cast<int>(seed % 2);
            Problem problem = problem_for(options, 14);
            problem.seed = seed + 1;
            problem.num_biases = static_cast<int>(seed % 3);
            check_round_trip(options, problem);
            check_round_trip(with_tight_credits(options), problem);
        }
}

TEST_CASE("one slot on the rail: a chunk is sent when the one before has been taken out") {
    for (const uint64_t seed : seeds(4)) {
        InternodeOptions options = with_tight_credits(options_for({2, 2}, seed));
        options.rail_slots = 1;
        check_round_trip(options, problem_for(options, 12));
    }
}

TEST_CASE("an engine with little room makes posters wait") {
    for (const uint64_t seed : seeds(4)) {
        InternodeOptions options = options_for({3, 2}, seed);
        options.max_posted = 1;
        options.chunk_tokens = 1;
        check_round_trip(options, problem_for(options));
    }
}

TEST_CASE("worst case: no host between exchange and dispatch, and rows that nobody sent are marked") {
    for (const Nodes& nodes : kSmall)
        for (const uint64_t seed : seeds(3)) {
            const InternodeOptions options = options_for(nodes, seed);
            Problem problem = problem_for(options);
            problem.num_extra_rows = 5;
            check_round_trip(options, problem);
        }
}

TEST_CASE("without top-k: rows alone, and scales") {
    for (const Nodes& nodes : kSmall) {
        const InternodeOptions options = options_for(nodes);
        Problem problem = problem_for(options);
        problem.num_scales = 2;
        InternodeWorld world(options, problem);
        InternodeCall call(problem, options);
        call.has_topk = false;
        CHECK_EQ(world.dispatch(call), "");
        CHECK_EQ(world.combine(call), "");
        CHECK_EQ(world.dispatch_cached(call), "");
    }
}

TEST_CASE("more ranks, entries and scales than lanes") {
    InternodeOptions options = options_for({2, 34});
    options.num_blocks = 1;
    options.num_warps = 3;
    options.window = 4;
    options.rail_slots = 8;
    Problem problem{
        .num_tokens = std::vector<int>(68, 0), .num_experts = 68, .num_topk = 40, .hidden = 8, .num_scales = 70};
    problem.num_tokens[3] = 3;
    problem.num_tokens[40] = 2;
    check_round_trip(options, problem);
}

TEST_CASE("long rows, and rows of any multiple of 16 bytes") {
    for (const int hidden : {8, 264, 2880}) {
        const InternodeOptions options = options_for({2, 2});
        Problem problem = problem_for(options, 4);
        problem.hidden = hidden;
        check_round_trip(options, problem);
    }
}

TEST_CASE("ranks without tokens, nodes that get none, tokens that go nowhere") {
    const InternodeOptions options = options_for({3, 2});
    Problem problem = problem_for(options);
    for (const int mask : {0, 1, 9, 38, 62}) {
        for (int rank = 0; rank < 6; ++rank)
            problem.num_tokens[static_cast<size_t>(rank)] = (mask >> rank & 1) != 0 ? 5 : 0;
        check_round_trip(options, problem);
    }
    problem = problem_for(options);
    for (const int rank : {0, 3, 5}) {
        problem.only_rank = rank;
        check_round_trip(options, problem);
    }
    problem.only_rank = -1;
    problem.drop_probability = 1.0;
    check_round_trip(options, problem);
}

TEST_CASE("some ranks lend: forwarders write to final rows, and read rows where they stand") {
    for (const Nodes& nodes : kSmall)
        for (const uint32_t lenders : {0u, 1u, 2u, 0x3fu})
            for (const uint64_t seed : seeds(2)) {
                CAPTURE(lenders);
                InternodeOptions options = options_for(nodes, seed);
                options.lend_bytes = 1 << 16;
                options.window = 2;
                Problem problem = problem_for(options);
                problem.num_scales = 2;
                problem.lending_ranks = lenders;
                check_round_trip(options, problem);
                problem.num_extra_rows = 3;
                check_round_trip(options, problem);
            }
}

TEST_CASE("calls of changing shape use the banks again, and everybody has ended each") {
    for (const uint64_t seed : seeds(4)) {
        InternodeOptions options = options_for({2, 2}, seed);
        Problem problem = problem_for(options, 20);
        problem.hidden = 136;
        problem.num_scales = 3;
        InternodeWorld world(options, problem);
        for (int round = 0; round < 5; ++round) {
            CAPTURE(round);
            problem.num_tokens = {round * 4, 9, round * 7 % 19, 20 - round};
            problem.num_topk = 1 + round % 4;
            problem.hidden = 8 * (1 + (round * 5) % 17);
            problem.num_scales = round % 3;
            problem.seed = seed * 100 + static_cast<uint64_t>(round);
            CHECK_EQ(world.round_trip(problem), "");
        }
        for (int rank = 0; rank < 4; ++rank) CHECK_EQ(world.ended(rank, 1 - rank / 2), world.num_calls());
    }
}

TEST_CASE("kernels queued without a host in between keep their order") {
    for (const uint64_t seed : seeds(4)) {
        InternodeOptions options = options_for({2, 2}, seed);
        options.rail_slots = 4;
        options.chunk_tokens = 1;
        const Problem problem = problem_for(options);
        InternodeWorld world(options, problem);
        InternodeCall call(problem, options);
        CHECK_EQ(world.dispatch(call), "");
        CHECK_EQ(world.combine(call), "");
        world.run([&] {
            for (int rank = 0; rank < 4; ++rank)
                for (int repeat = 0; repeat < 4; ++repeat) {
                    world.launch_dispatch(call, rank, Counts::kKnown);
                    world.launch_combine(call, rank);
                }
        });
        CHECK_EQ(check_dispatch(problem, call.ranks, true), "");
        CHECK_EQ(check_combine(call.problem, call.ranks), "");
    }
}

TEST_CASE("one combine, whatever the schedule, gives the same bits as any other") {
    std::vector<uint16_t> first;
    for (const uint64_t seed : seeds(6)) {
        InternodeOptions options = options_for({3, 2}, seed);
        Problem problem = problem_for(options);
        problem.num_topk = 6;
        InternodeWorld world(options, problem);
        InternodeCall call(problem, options);
        CHECK_EQ(world.dispatch(call), "");
        CHECK_EQ(world.combine(call), "");
        if (first.empty()) first = call.ranks[1].combined_x;
        CHECK_EQ(call.ranks[1].combined_x, first);
    }
}

}  // namespace
}  // namespace deep_ep::test
