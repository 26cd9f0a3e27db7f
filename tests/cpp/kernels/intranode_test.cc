// The intranode protocol on the executor: all ranks in one process, many shapes and schedules, compared bit for bit.
#include <doctest/doctest.h>

#include <algorithm>

#include "core/error.h"
#include "kernels/absent_rank.h"
#include "layout/heap.h"
#include "support/seeds.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

constexpr int64_t kRoomy = 1 << 20;

// A data region with exactly `window` slots a source for this problem's dispatch.
int64_t region_for(const Problem& problem, uint64_t window) {
    const auto slot = layout::SlotLayout::for_dispatch(static_cast<uint64_t>(problem.hidden) * 2,
                                                       static_cast<uint64_t>(problem.num_topk),
                                                       static_cast<uint64_t>(problem.num_scales));
    return static_cast<int64_t>(
        layout::WindowLayout::bytes_for(static_cast<uint64_t>(problem.num_ranks()), slot.bytes, window));
}

void check_round_trip(const Problem& problem, int64_t data_bytes, const simt::SchedulerOptions& options = {}) {
    World world(problem.num_ranks(), data_bytes, options);
    CHECK_EQ(round_trip(world, problem), "");
}

TEST_CASE("any number of ranks, uneven token counts") {
    for (int num_ranks : {1, 2, 3, 4, 7, 8}) {
        CAPTURE(num_ranks);
        Problem problem{.num_tokens = {}, .num_experts = num_ranks * 3, .num_topk = 4, .num_scales = 3};
        for (int rank = 0; rank < num_ranks; ++rank) problem.num_tokens.push_back((rank * 13 + 5) % 23);
        check_round_trip(problem, kRoomy);
    }
}

TEST_CASE("more ranks than lanes of a warp") {
    Problem problem{
        .num_tokens = std::vector<int>(35, 3), .num_experts = 70, .num_topk = 36, .hidden = 16, .num_sms = 1};
    check_round_trip(problem, kRoomy);
}

TEST_CASE("more ranks than a launch carries addresses for are refused") {
    CHECK_THROWS_WITH_AS(World(129, 1 << 14, {}), doctest::Contains("a node can have at most 128 ranks, got 129"),
                         Error);
}

TEST_CASE("every subset of empty ranks (pitfall 23), one token in all (25)") {
    for (int mask = 0; mask < 16; ++mask) {
        CAPTURE(mask);
        Problem problem{.num_tokens = {}, .seed = static_cast<uint64_t>(mask) + 1};
        for (int rank = 0; rank < 4; ++rank) problem.num_tokens.push_back((mask >> rank & 1) != 0 ? 6 : 0);
        check_round_trip(problem, kRoomy);
    }
    check_round_trip({.num_tokens = {0, 0, 1, 0}}, kRoomy);
}

TEST_CASE("all tokens to one rank, none to anybody (pitfall 26)") {
    for (int rank = 0; rank < 3; ++rank)
        check_round_trip({.num_tokens = {9, 4, 11}, .num_experts = 6, .num_topk = 3, .only_rank = rank}, kRoomy);
    check_round_trip({.num_tokens = {9, 4, 11}, .num_experts = 6, .drop_probability = 1.0}, kRoomy);
}

// Three blocks scan, each for its own tokens, with two warps; a warp has more tokens than it loads at once.
TEST_CASE("positions count up over warps, batches and columns of the scan") {
    constexpr int kNumRanks = 11;
    Problem problem{.num_tokens = std::vector<int>(kNumRanks, 0),
                    .num_experts = 2 * kNumRanks,
                    .num_topk = 3,
                    .hidden = 8,
                    .num_sms = 3};
    problem.num_tokens[3] = 10 * 64 + 7;
    World world(kNumRanks, kRoomy, {}, 100, 0, false, {{.useful_block_threads = 64}});
    for (int num_extra_rows : {0, 1}) {
        problem.num_extra_rows = num_extra_rows;
        auto ranks = world.dispatched(problem);
        std::vector<int> next(kNumRanks, 0);
        for (size_t cell = 0; cell < ranks[3].send_head.size(); ++cell) {
            int& count = next[cell % kNumRanks];
            CHECK_EQ(ranks[3].send_head[cell], ranks[3].is_token_in_rank[cell] != 0 ? count++ : -1);
        }
        CHECK_EQ(next, ranks[3].num_tokens_per_rank);
    }
}

TEST_CASE("rows of any multiple of 16 bytes (pitfall 22)") {
    for (int hidden : {8, 24, 248, 256, 264, 1000, 2880}) {
        CAPTURE(hidden);
        check_round_trip({.num_tokens = {5, 3}, .num_experts = 2, .hidden = hidden}, kRoomy);
    }
}

TEST_CASE("one or two biases are added after the ranks' sum") {
    for (int num_biases : {1, 2}) check_round_trip({.num_tokens = {7, 9}, .num_biases = num_biases}, kRoomy);
}

TEST_CASE("expert_alignment rounds the counts up, not the rows") {
    check_round_trip({.num_tokens = {17, 9}, .num_experts = 4, .expert_alignment = 16}, kRoomy);
}

TEST_CASE("a window that wraps many times: the last slot is never forgotten (pitfalls 7, 20)") {
    for (uint64_t window : {1, 2, 3, 5}) {
        for (uint64_t seed : {0, 1, 2, 3}) {
            CAPTURE(window);
            CAPTURE(seed);
            const Problem problem{.num_tokens = {40, 23, 31}, .num_experts = 6, .num_topk = 3};
            check_round_trip(problem, region_for(problem, window), seeded(seed));
        }
    }
}

TEST_CASE("fewer receive warps than sources, and windows of one slot: no circle of waits") {
    for (uint64_t seed = 0; seed < num_seeds(6); ++seed) {
        CAPTURE(seed);
        const Problem problem{.num_tokens = std::vector<int>(8, 12), .num_topk = 6, .num_sms = 1};
        check_round_trip(problem, region_for(problem, 1), seeded(seed));
    }
}

// Through registers, and through two, three and four stages of shared memory with every timing of the bulk copies.
TEST_CASE("every way through a block gives the same bits") {
    const Problem problem{
        .num_tokens = {26, 0, 41, 17}, .num_topk = 5, .hidden = 1848, .num_scales = 3, .num_biases = 2};
    std::vector<simt::DeviceOptions> devices = {{.has_bulk_copy = false}};
    const int reduce_bytes = 2 * layout::Staging{layout::kReduceStages, layout::kReduceStageBytes}.bytes();
    for (int stages : {2, 3, 4})
        devices.push_back({.max_shared_bytes = reduce_bytes + kernels::kMaxCombineState + 2 * stages * 3900});
    for (const simt::DeviceOptions& device : devices) {
        for (uint64_t seed = 0; seed < num_seeds(5); ++seed) {
            for (uint64_t window : {1, 7}) {
                CAPTURE(device.has_bulk_copy);
                CAPTURE(device.max_shared_bytes);
                CAPTURE(seed);
                CAPTURE(window);
                World world(problem.num_ranks(), region_for(problem, window), seeded(seed), 100, 0, false, {device});
                CHECK_EQ(round_trip(world, problem), "");
            }
        }
    }
}

TEST_CASE("many blocks of two ranks: rows are staged on their way out alone") {
    const simt::DeviceOptions device{.num_sms = 20, .useful_block_threads = 64};
    const Problem problem{.num_tokens = {93, 81}, .num_topk = 3, .hidden = 1848, .num_sms = 20};
    for (uint64_t seed = 0; seed < num_seeds(3); ++seed) {
        for (uint64_t window : {3, 128}) {
            CAPTURE(seed);
            CAPTURE(window);
            World world(2, region_for(problem, window), seeded(seed), 100, 0, false, {device});
            CHECK_EQ(round_trip(world, problem), "");
        }
    }
}

TEST_CASE("more entries and scales than a lane holds") {
    check_round_trip({.num_tokens = {9, 14}, .num_experts = 64, .num_topk = 40, .num_scales = 90}, kRoomy);
}

TEST_CASE("random schedules give the same bits") {
    for (uint64_t seed = 1; seed <= 25; ++seed) {
        CAPTURE(seed);
        const Problem problem{.num_tokens = {13, 0, 20, 7}, .num_topk = 3, .num_scales = 2, .num_biases = 1};
        check_round_trip(problem, region_for(problem, 4), seeded(seed));
    }
}

TEST_CASE("back-to-back calls of changing shape reuse the banks without clearing (pitfalls 6, 9)") {
    for (uint64_t seed : {0, 5}) {
        World world(3, 1 << 16, seeded(seed));
        for (int round = 0; round < 12; ++round) {
            CAPTURE(round);
            Problem problem{.num_tokens = {round % 5 * 4, 9, (round * 7) % 19}, .num_experts = 3 * (1 + round % 3)};
            problem.num_topk = 1 + round % 4;
            problem.hidden = 8 * (1 + (round * 5) % 17);
            problem.num_scales = round % 3;
            problem.num_sms = 1 + round % 3;
            problem.seed = static_cast<uint64_t>(round) + 100;
            CHECK_EQ(round_trip(world, problem), "");
        }
    }
}

TEST_CASE("two dispatches in flight before the first combine (pitfalls 10, 12)") {
    World world(3, kRoomy, seeded(3));
    const Problem first{.num_tokens = {9, 14, 3}, .num_experts = 6, .seed = 7};
    const Problem second{.num_tokens = {4, 0, 21}, .num_experts = 9, .num_topk = 3, .hidden = 128, .seed = 8};
    auto first_ranks = make_inputs(first);
    auto second_ranks = make_inputs(second);
    world.layout(first, first_ranks);
    world.layout(second, second_ranks);
    world.dispatch(first, first_ranks);
    world.dispatch(second, second_ranks);
    CHECK_EQ(check_dispatch(first, first_ranks), "");
    CHECK_EQ(check_dispatch(second, second_ranks), "");
    world.combine(first, first_ranks);
    world.combine(second, second_ranks);
    CHECK_EQ(check_combine(first, first_ranks), "");
    CHECK_EQ(check_combine(second, second_ranks), "");
}

TEST_CASE("a handle serves combine, cached dispatch and combine again, with other calls between") {
    World world(4, 1 << 17, seeded(11));
    const Problem problem{.num_tokens = {5, 12, 0, 8}, .num_scales = 1, .seed = 21};
    auto ranks = world.dispatched(problem);
    world.combine(problem, ranks);
    CHECK_EQ(check_combine(problem, ranks), "");
    CHECK_EQ(round_trip(world, {.num_tokens = {3, 3, 3, 3}, .seed = 5}), "");
    world.dispatch_cached(problem, ranks);
    CHECK_EQ(check_dispatch(problem, ranks, true), "");
    world.combine(problem, ranks);
    CHECK_EQ(check_combine(problem, ranks), "");
}

TEST_CASE("kernels queued without a host in between keep their order") {
    World world(2, 1 << 15, seeded(9));
    const Problem problem{.num_tokens = {20, 11}, .num_experts = 4, .seed = 2};
    auto ranks = world.dispatched(problem);
    prepare_combine(problem, ranks);
    for (int repeat = 0; repeat < 5; ++repeat) {
        for (int rank = 0; rank < 2; ++rank) {
            world.launch_combine(problem, ranks[static_cast<size_t>(rank)], rank);
            world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kKnown);
        }
    }
    world.run();
    CHECK_EQ(check_combine(problem, ranks), "");
    CHECK_EQ(check_dispatch(problem, ranks, true), "");
}

TEST_CASE("worst-case outputs: rows that nobody sent are marked (pitfall 14)") {
    check_round_trip({.num_tokens = {6, 10, 2}, .num_experts = 3, .num_topk = 3, .num_extra_rows = 37}, kRoomy);
}

TEST_CASE("worst-case calls beside fresh and cached ones, every rank as it likes, with no host between the calls") {
    for (uint64_t seed = 1; seed < 7; ++seed) {
        CAPTURE(seed);
        World world(3, 1 << 15, seeded(seed));
        const Problem problem{
            .num_tokens = {20, 0, 11}, .num_experts = 6, .num_topk = 3, .expert_alignment = 4, .seed = seed};
        auto ranks = world.dispatched(problem);
        const auto known = ranks;
        for (int repeat = 0; repeat < 6; ++repeat) {
            for (int rank = 0; rank < 3; ++rank) {
                RankTensors& tensors = ranks[static_cast<size_t>(rank)];
                prepare_recv(problem, tensors, tensors.num_recv_tokens);
                const bool exchanges = repeat % 3 != 2;  // a count exchange has to be one for every rank
                const bool is_fresh = exchanges && (repeat + rank) % 2 == 0;
                if (exchanges) tensors.rank_prefix_matrix.assign(9, -7);
                if (exchanges) std::fill(tensors.send_head.begin(), tensors.send_head.end(), -7);
                if (is_fresh) world.launch_notify(problem, tensors, rank);
                world.launch_dispatch(problem, tensors, rank,
                                      is_fresh    ? Counts::kExchanged
                                      : exchanges ? Counts::kUnknown
                                                  : Counts::kKnown);
            }
            world.run();
            CHECK_EQ(check_dispatch(problem, ranks, repeat % 3 == 2), "");
            for (size_t rank = 0; rank < 3; ++rank) {
                CHECK_EQ(ranks[rank].rank_prefix_matrix, known[rank].rank_prefix_matrix);
                CHECK_EQ(ranks[rank].send_head, known[rank].send_head);
                if (repeat % 3 != 2 && (repeat + static_cast<int>(rank)) % 2 == 0)
                    CHECK_EQ(world.wait_counts(static_cast<int>(rank)).num_tokens_per_expert,
                             known[rank].num_recv_per_expert);
            }
        }
    }
}

TEST_CASE("worst-case outputs that are too small are reported, nothing is written beyond them") {
    for (Counts counts : {Counts::kUnknown, Counts::kKnown}) {
        World world(2, kRoomy, impatient());  // a wait looks for refusals now and then only
        const Problem problem{.num_tokens = {10, 10}, .num_experts = 2, .drop_probability = 0.0};
        auto ranks = world.dispatched(problem);
        world.launch_without_room(problem, ranks, 0, counts);
        world.run();
        CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("num_worst_tokens"), InvalidArgument);
        CHECK_THROWS_WITH_AS(world.buffer(1).check(), doctest::Contains("rank 0 reported an error of its own"),
                             TimeoutError);
    }
}

TEST_CASE("an expert id out of range is reported with its token") {
    World world(2, kRoomy, {});
    const Problem problem{.num_tokens = {10, 10}, .num_experts = 2};
    auto ranks = make_inputs(problem);
    ranks[1].topk_idx[7] = 2;
    world.layout(problem, ranks);
    world.buffer(0).check();
    CHECK_THROWS_WITH_AS(world.buffer(1).check(), doctest::Contains("token 3 must be -1 or an expert below 2, got 2"),
                         InvalidArgument);
}

TEST_CASE("a rank that never calls dispatch is named by every peer; other Buffers go on (D1.7)") {
    World world(3, kRoomy, impatient(), 2.0);
    const Problem problem{.num_tokens = {4, 4, 4}, .num_experts = 3};
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    for (int rank : {0, 2}) world.launch_notify(problem, ranks[static_cast<size_t>(rank)], rank);
    for (int rank : {0, 2}) {
        CHECK_THROWS_WITH_AS(world.wait_counts(rank), doctest::Contains("never entered this call: rank 1"),
                             TimeoutError);
        CHECK_THROWS_WITH_AS(world.buffer(rank).check(), doctest::Contains("rank 1"), TimeoutError);
    }
    world.run();
    World other(3, kRoomy, impatient(), 2.0);
    CHECK_EQ(round_trip(other, problem), "");
}

TEST_CASE("a rank that never comes to a worst-case dispatch is named by every peer") {
    World world(3, kRoomy, impatient(), 2.0);
    const Problem problem{.num_tokens = {4, 4, 4}, .num_experts = 3};
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    for (int rank : {0, 2}) {
        prepare_recv(problem, ranks[static_cast<size_t>(rank)], 12);
        world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kUnknown);
    }
    world.run();
    check_absent_is_named(world, {0, 2}, 1);
}

TEST_CASE("a rank that skips combine is named; the others end in time and write nothing") {
    World world(3, kRoomy, impatient(), 2.0);
    const Problem problem{.num_tokens = {8, 8, 8}, .num_experts = 3, .drop_probability = 0.0};
    auto ranks = world.dispatched(problem);
    world.combine_on(problem, ranks, {1, 2});
    check_absent_is_named(world, {1, 2}, 0);
}

TEST_CASE("a wait that takes long is reported before it fails") {
    World world(2, kRoomy, impatient(), 2.0);
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 2};
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    std::vector<std::string> warnings;
    world.buffer(0).set_warning_handler([&](const std::string& text) { warnings.push_back(text); });
    world.launch_notify(problem, ranks[0], 0);
    CHECK_THROWS_AS(world.wait_counts(0), TimeoutError);
    REQUIRE_EQ(warnings.size(), 1);
    CHECK(warnings[0].find("Still waiting") != std::string::npos);
    CHECK(warnings[0].find("rank 1") != std::string::npos);
    world.run();
}

TEST_CASE("what does not fit is refused before any peer can know of it") {
    World world(2, 128, {});
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 2};
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    world.buffer(0).begin_call();
    CHECK_THROWS_WITH_AS(world.launch_notify(problem, ranks[0], 0), doctest::Contains("num_nvl_bytes is too small"),
                         InvalidArgument);
    world.buffer(0).abandon_call("dispatch: it does not fit");
    CHECK_NOTHROW(world.buffer(0).check());
    prepare_recv(problem, ranks[0], 8);
    CHECK_THROWS_WITH_AS(world.launch_dispatch(problem, ranks[0], 0, Counts::kUnknown),
                         doctest::Contains("num_nvl_bytes is too small"), InvalidArgument);
    world.run();
}

}  // namespace
}  // namespace deep_ep::test
