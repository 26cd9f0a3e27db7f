// Outputs that peers write in place, inputs that peers read in place: the same bits as through slots, in every mixture.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "kernels/absent_rank.h"
#include "layout/heap.h"
#include "support/seeds.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

constexpr int64_t kDataBytes = 1 << 18;
constexpr int64_t kLendBytes = 1 << 20;

struct Setup {
    uint64_t seed = 0;
    int64_t data_bytes = kDataBytes;
    int64_t lend_bytes = kLendBytes;
    simt::DeviceOptions device = {};
    simt::IdlePolicy idle = simt::SchedulerOptions{}.idle;
};

World make_world(const Problem& problem, const Setup& setup) {
    simt::SchedulerOptions options;
    options.seed = setup.seed;
    options.idle = setup.idle;
    return World(problem.num_ranks(), setup.data_bytes, options, 100, 0, false, {setup.device}, setup.lend_bytes);
}

void check_round_trip(const Problem& problem, const Setup& setup = {}) {
    World world = make_world(problem, setup);
    CHECK_EQ(round_trip(world, problem), "");
}

Problem of_three_ranks(uint32_t lending_ranks, int num_scales) {
    return {.num_tokens = {13, 20, 7},
            .num_experts = 6,
            .num_topk = 3,
            .num_scales = num_scales,
            .lending_ranks = lending_ranks};
}

TEST_CASE("every mixture of ranks that lend and ranks that do not") {
    for (uint32_t lending = 0; lending < 8; ++lending) {
        for (uint64_t seed : {0, 1, 2}) {
            for (bool has_bulk_copy : {false, true}) {
                CAPTURE(lending);
                CAPTURE(seed);
                CAPTURE(has_bulk_copy);
                Problem problem = of_three_ranks(lending, 3);
                problem.hidden = 1848;
                problem.num_biases = 1;
                check_round_trip(problem, {.seed = seed, .device = {.has_bulk_copy = has_bulk_copy}});
            }
        }
    }
}

TEST_CASE("windows of one slot beside loans: nobody waits in a circle") {
    for (uint64_t seed = 0; seed < num_seeds(6); ++seed) {
        CAPTURE(seed);
        const Problem problem{.num_tokens = {12, 31, 8, 17}, .num_topk = 4, .num_sms = 1, .lending_ranks = 0b0110};
        const auto slot = layout::SlotLayout::for_dispatch(static_cast<uint64_t>(problem.hidden) * 2, 4, 0);
        const auto bytes = static_cast<int64_t>(layout::WindowLayout::bytes_for(4, slot.bytes, 1));
        check_round_trip(problem, {.seed = seed, .data_bytes = bytes});
    }
}

TEST_CASE("ranks without tokens, all tokens to one rank, nothing at all") {
    check_round_trip({.num_tokens = {0, 9, 0}, .num_experts = 6, .lending_ranks = 7});
    for (int rank = 0; rank < 3; ++rank)
        check_round_trip(
            {.num_tokens = {9, 4, 11}, .num_experts = 6, .num_topk = 3, .only_rank = rank, .lending_ranks = 7});
    check_round_trip({.num_tokens = {0, 0}, .num_experts = 2, .lending_ranks = 3});
}

TEST_CASE("more ranks than lanes of a warp lend") {
    Problem problem{.num_tokens = std::vector<int>(34, 3), .num_experts = 68, .num_topk = 36, .hidden = 16};
    problem.num_sms = 1;
    problem.lending_ranks = 0xffffffffu;
    check_round_trip(problem);
}

TEST_CASE("more entries and scales than a lane holds") {
    check_round_trip({.num_tokens = {9, 14}, .num_experts = 64, .num_topk = 40, .num_scales = 90, .lending_ranks = 3});
}

TEST_CASE("worst-case outputs are lent: rows that nobody sent are marked") {
    check_round_trip(
        {.num_tokens = {6, 10, 2}, .num_experts = 3, .num_topk = 3, .num_extra_rows = 37, .lending_ranks = 7});
}

// What lies behind the rows that are lent belongs to somebody else.
TEST_CASE("too few rows are lent: all ranks refuse the call before they write") {
    for (Counts counts : {Counts::kUnknown, Counts::kKnown}) {
        for (uint64_t seed = 0; seed < num_seeds(6); ++seed) {
            CAPTURE(seed);
            const Problem problem{.num_tokens = {10, 10, 10},
                                  .num_experts = 3,
                                  .num_topk = 3,
                                  .drop_probability = 0.0,
                                  .lending_ranks = 7};
            World world = make_world(problem, {.seed = seed, .idle = simt::IdlePolicy::kAdvanceClock});
            auto ranks = world.dispatched(problem);
            const uint8_t* whole = world.lend(1, kLendBytes)->address();
            for (int rank = 0; rank < 3; ++rank) {
                RankTensors& tensors = ranks[static_cast<size_t>(rank)];
                prepare_recv(problem, tensors, tensors.num_recv_tokens - (rank == 1 ? 9 : 0));
                world.launch_dispatch(problem, tensors, rank, counts);
            }
            const std::vector<uint8_t> before(whole, whole + kLendBytes);
            world.run();
            CHECK_EQ(num_stray_bytes(whole, before, ranks[1]), 0);
            World::collect(ranks);
            for (const RankTensors& tensors : ranks)
                CHECK_EQ(check_void_dispatch(tensors, counts == Counts::kKnown), "");
            CHECK_THROWS_WITH_AS(world.buffer(1).check(), doctest::Contains("num_worst_tokens"), InvalidArgument);
            for (int rank : {0, 2})
                CHECK_THROWS_WITH_AS(world.buffer(rank).check(),
                                     doctest::Contains("rank 1 reported an error of its own"), TimeoutError);
        }
    }
}

TEST_CASE("back-to-back calls of changing shape, loans on and off, cached ones between") {
    for (uint64_t seed : {0, 4}) {
        Problem problem{.num_tokens = {0, 0, 0}};
        World world = make_world(problem, {.seed = seed});
        for (int round = 0; round < 12; ++round) {
            CAPTURE(round);
            problem.num_tokens = {round % 5 * 4, 9, (round * 7) % 19};
            problem.num_experts = 3 * (1 + round % 3);
            problem.num_topk = 1 + round % 4;
            problem.hidden = 8 * (1 + (round * 5) % 17);
            problem.num_scales = round % 3;
            problem.num_sms = 1 + round % 3;
            problem.lending_ranks = static_cast<uint32_t>(round) % 8;
            problem.seed = static_cast<uint64_t>(round) + 100;
            auto ranks = world.dispatched(problem);
            CHECK_EQ(check_dispatch(problem, ranks), "");
            problem.lending_ranks = static_cast<uint32_t>(round * 3) % 8;
            world.dispatch_cached(problem, ranks);
            CHECK_EQ(check_dispatch(problem, ranks, true), "");
            world.combine(problem, ranks);
            CHECK_EQ(check_combine(problem, ranks), "");
        }
    }
}

TEST_CASE("sums that one of two ranks lends, or both, beside inputs that are lent or not") {
    for (uint32_t sums : {1u, 2u, 3u})
        for (uint32_t lending : {0u, 1u, 2u, 3u})
            for (uint32_t with_bulk_copies : {0u, 1u, 3u}) {
                const uint64_t seed = (sums + lending + with_bulk_copies) % 3;
                CAPTURE(sums);
                CAPTURE(lending);
                CAPTURE(with_bulk_copies);
                CAPTURE(seed);
                for (int num_topk : {1, 3, 40}) {
                    const Problem problem{.num_tokens = {37, 52},
                                          .num_experts = 64,
                                          .num_topk = num_topk,
                                          .hidden = 264,
                                          .drop_probability = num_topk < 40 ? 0.3 : 0.9,
                                          .seed = seed + 1,
                                          .lending_ranks = lending,
                                          .sums_ranks = sums};
                    World world(2, kDataBytes, seeded(seed), 100, 0, false,
                                {{.has_bulk_copy = (with_bulk_copies & 1u) != 0},
                                 {.has_bulk_copy = (with_bulk_copies & 2u) != 0}},
                                kLendBytes);
                    CHECK_EQ(round_trip(world, problem), "");
                }
            }
}

TEST_CASE("sums are lent by ranks without tokens, for tokens without rows, and in many calls of one Buffer") {
    World world = make_world({.num_tokens = {0, 0}}, {.seed = 3});
    for (int round = 0; round < 8; ++round) {
        CAPTURE(round);
        Problem problem{.num_tokens = {round % 3 * 40, 90 - round},
                        .num_experts = 2,
                        .num_topk = 2,
                        .hidden = 8 * (1 + round * 7 % 19),
                        .num_sms = 1 + round % 3,
                        .drop_probability = 0.1 * round,
                        .only_rank = round % 4 == 3 ? 1 : -1,
                        .seed = static_cast<uint64_t>(round) + 7};
        problem.sums_ranks = static_cast<uint32_t>(round) % 4;
        problem.lending_ranks = static_cast<uint32_t>(round / 2) % 4;
        problem.num_biases = round == 5 ? 1 : 0;
        CHECK_EQ(round_trip(world, problem), "");
    }
}

// Three ranks, and outputs in memory that can be lent: they are not, and are summed as ever.
TEST_CASE("sums of more ranks than two go through slots") {
    check_round_trip({.num_tokens = {20, 9, 14}, .num_experts = 6, .num_topk = 3, .sums_ranks = 7});
}

TEST_CASE("a row that belongs to no token of its owner is refused, and nothing is written beside the sums") {
    for (int bad : {-1, 30, 1 << 30}) {
        CAPTURE(bad);
        const Problem problem{.num_tokens = {30, 30}, .num_experts = 2, .drop_probability = 0.0, .sums_ranks = 3};
        World world = make_world(problem, {.idle = simt::IdlePolicy::kAdvanceClock});
        auto ranks = world.dispatched(problem);
        ranks[1].recv_src_idx[3] = bad;  // of rank 0's tokens
        std::vector<const uint8_t*> whole;
        std::vector<std::vector<uint8_t>> before;
        for (int rank = 0; rank < 2; ++rank) {
            RankTensors& tensors = ranks[static_cast<size_t>(rank)];
            whole.push_back(world.lend(rank, kLendBytes)->address());
            prepare_combine(problem, tensors, rank);
            before.emplace_back(whole.back(), whole.back() + kLendBytes);
        }
        for (int rank = 0; rank < 2; ++rank) world.launch_combine(problem, ranks[static_cast<size_t>(rank)], rank);
        world.run();
        for (size_t rank = 0; rank < 2; ++rank) CHECK_EQ(num_stray_bytes(whole[rank], before[rank], ranks[rank]), 0);
        World::collect(ranks);
        for (const RankTensors& tensors : ranks) CHECK_EQ(check_void_combine(tensors), "");
        CHECK_THROWS_WITH_AS(world.buffer(1).check(), doctest::Contains("must belong together"), InvalidArgument);
    }
}

TEST_CASE("more rows for an owner than the sums that it lends are refused") {
    for (int at : {0, 1}) {  // who has the wrong matrix: the owner, or the other one
        CAPTURE(at);
        const Problem problem{.num_tokens = {5, 30}, .num_experts = 2, .drop_probability = 0.0, .sums_ranks = 1};
        World world = make_world(problem, {.idle = simt::IdlePolicy::kAdvanceClock});
        auto ranks = world.dispatched(problem);
        ranks[static_cast<size_t>(at)].rank_prefix_matrix[1] = 20;
        for (int rank = 0; rank < 2; ++rank) {
            prepare_combine(problem, ranks[static_cast<size_t>(rank)], rank);
            world.launch_combine(problem, ranks[static_cast<size_t>(rank)], rank);
        }
        world.run();
        World::collect(ranks);
        CHECK_EQ(check_void_combine(ranks[static_cast<size_t>(at)]), "");
        CHECK_THROWS_WITH_AS(world.buffer(at).check(),
                             doctest::Contains("rows from rank 0 to rank 1 begin at 0 and end at 20"), InvalidArgument);
    }
}

TEST_CASE("weights that have no room for a copy take the input through slots") {
    // One 64th of 64 KiB is 1 KiB: 20 tokens x 16 weights do not fit.
    check_round_trip({.num_tokens = {20, 20}, .num_experts = 32, .num_topk = 16, .hidden = 16, .lending_ranks = 3},
                     {.lend_bytes = 1 << 16});
}

// In one kernel, while the host waits; or in two, where some ranks' guesses were too small.
TEST_CASE("guessed numbers of rows: enough, too small, none at all, on some ranks or all, lent or not") {
    for (uint32_t lending : {0u, 2u, 7u})
        for (const std::vector<int>& spare : std::vector<std::vector<int>>{
                 {0, 5, 1}, {-1, 3, 0}, {-2, -1, -3}, {2, -100, 4}, {-100, -100, -100}, {0, 0, -1}})
            for (uint64_t seed : {0, 3})
                for (bool lends_again : {false, true}) {
                    CAPTURE(lending);
                    CAPTURE(spare);
                    CAPTURE(seed);
                    CAPTURE(lends_again);
                    Problem problem = of_three_ranks(lending, 2);
                    problem.expert_alignment = 4;
                    World world = make_world(problem, {.seed = seed});
                    auto ranks = make_inputs(problem);
                    world.layout(problem, ranks);
                    for (int i = 0; i < 2; ++i) {
                        world.dispatch_guessed(problem, ranks, spare, lends_again);
                        CHECK_EQ(check_dispatch(problem, ranks), "");
                        world.combine(problem, ranks);
                        CHECK_EQ(check_combine(problem, ranks), "");
                    }
                }
}

TEST_CASE("a host that gives up between counts and rows ends the others' kernels, whose blocks decide as one") {
    for (uint64_t seed = 0; seed < num_seeds(24); ++seed) {
        CAPTURE(seed);
        const Problem problem = of_three_ranks(7, 2);
        World world = make_world(problem, {.seed = seed, .idle = simt::IdlePolicy::kAdvanceClock});
        auto ranks = world.dispatched(problem);  // for the numbers of rows
        for (int rank = 0; rank < 3; ++rank) {
            RankTensors& tensors = ranks[static_cast<size_t>(rank)];
            prepare_recv(problem, tensors, tensors.num_recv_tokens + (rank == 0 ? -1 : 1));  // 0 would lend later
            world.buffer(rank).begin_call();
            world.launch_dispatch(problem, tensors, rank, Counts::kGuessed);
        }
        world.wait_counts(0);
        world.buffer(0).abandon_call("dispatch: OutOfMemoryError: 7 bytes");
        world.run();
        for (int rank = 0; rank < 3; ++rank)
            CHECK_THROWS_WITH_AS(world.buffer(rank).begin_call(), doctest::Contains("OutOfMemoryError: 7 bytes"),
                                 Error);
    }
}

TEST_CASE("guesses beside ranks that ask for the counts first, and beside worst cases") {
    for (uint64_t seed = 0; seed < num_seeds(6); ++seed)
        for (int spare : {4, -2}) {
            CAPTURE(seed);
            CAPTURE(spare);
            const Problem problem{.num_tokens = {9, 14, 11}, .num_experts = 6, .num_topk = 3, .lending_ranks = 7};
            World world = make_world(problem, {.seed = seed});
            auto ranks = world.dispatched(problem);  // for the numbers of rows
            std::vector<int64_t> num_rows;
            for (const RankTensors& tensors : ranks) num_rows.push_back(tensors.num_recv_tokens);
            // Rank 0 guesses, rank 1 asks first, rank 2 has room for exactly what comes and does not wait.
            prepare_recv(problem, ranks[0], num_rows[0] + spare);
            world.launch_dispatch(problem, ranks[0], 0, Counts::kGuessed);
            world.launch_notify(problem, ranks[1], 1);
            prepare_recv(problem, ranks[2], num_rows[2]);
            world.launch_dispatch(problem, ranks[2], 2, Counts::kUnknown);
            CHECK_EQ(world.wait_counts(1).num_tokens, num_rows[1]);
            prepare_recv(problem, ranks[1], num_rows[1]);
            world.launch_dispatch(problem, ranks[1], 1, Counts::kExchanged);
            CHECK_EQ(world.wait_counts(0).num_tokens, num_rows[0]);
            if (spare < 0) {
                ranks[0].lent.clear();
                prepare_recv(problem, ranks[0], num_rows[0]);
                world.launch_dispatch(problem, ranks[0], 0, Counts::kExchanged);
            }
            world.run();
            World::collect(ranks);
            const auto rows = static_cast<size_t>(num_rows[0]);
            ranks[0].recv_x.resize(rows * static_cast<size_t>(problem.hidden));
            ranks[0].recv_topk_idx.resize(rows * 3);
            ranks[0].recv_topk_weights.resize(rows * 3);
            ranks[0].recv_src_idx.resize(rows);
            CHECK_EQ(check_dispatch(problem, ranks), "");
            world.combine(problem, ranks);
            CHECK_EQ(check_combine(problem, ranks), "");
        }
}

TEST_CASE("outputs that are lent in part are refused") {
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 2, .lending_ranks = 0};
    World world = make_world(problem, {});
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    const auto memory = world.lend(0, 4096);
    REQUIRE(memory != nullptr);
    prepare_recv(problem, ranks[0], 8);
    runtime::DispatchArgs args{};
    args.row_bytes = 128;
    args.num_topk = 2;
    args.num_experts = 2;
    args.recv_x = memory->address();
    args.recv_topk_idx = ranks[0].recv_topk_idx.data();
    args.recv_topk_weights = ranks[0].recv_topk_weights.data();
    CHECK_THROWS_WITH_AS(world.buffer(0).high_throughput().dispatch(args, 2, world.stream(0)),
                         doctest::Contains("all outputs"), InternalError);
}

struct Understated {
    Counts counts;
    uint32_t lending_ranks;
    bool has_bulk_copy;
    int rank;  // to which rank 1 sends one token more than it has stated
};

// Rank 1, whose rows come last, states a row too few for a rank. What stands behind the rows that the rank has belongs to somebody else.
void check_understated(const Understated& how) {
    CAPTURE(static_cast<int>(how.counts));
    CAPTURE(how.lending_ranks);
    CAPTURE(how.has_bulk_copy);
    CAPTURE(how.rank);
    const Problem problem{.num_tokens = {10, 12},
                          .num_experts = 2,
                          .num_topk = 2,
                          .num_scales = 1,
                          .drop_probability = 0.2,
                          .lending_ranks = how.lending_ranks};
    World world =
        make_world(problem, {.device = {.has_bulk_copy = how.has_bulk_copy}, .idle = simt::IdlePolicy::kAdvanceClock});
    auto ranks = world.dispatched(problem);
    const auto culprit = static_cast<size_t>(how.rank);
    const int num_stated = --ranks[1].num_tokens_per_rank[culprit];
    int token = problem.num_tokens[1] - 1;
    while (ranks[1].send_head[static_cast<size_t>(token) * 2 + culprit] < 0) --token;
    std::vector<const uint8_t*> whole;
    std::vector<std::vector<uint8_t>> before;
    for (int rank = 0; rank < 2; ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        if (how.counts == Counts::kKnown) --tensors.rank_prefix_matrix[2 + culprit];
        const auto memory = world.lend(rank, kLendBytes);
        std::memset(memory->address(), 0x5a, kLendBytes);
        whole.push_back(memory->address());
        before.emplace_back(whole.back(), whole.back() + kLendBytes);
    }
    for (int rank = 0; rank < 2; ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        if (how.counts == Counts::kExchanged) world.launch_notify(problem, tensors, rank);
    }
    for (int rank = 0; rank < 2; ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        if (how.counts == Counts::kExchanged) world.wait_counts(rank);
        prepare_recv(problem, tensors, tensors.num_recv_tokens - (rank == how.rank ? 1 : 0));
        world.launch_dispatch(problem, tensors, rank, how.counts);
    }
    world.run();
    for (size_t rank = 0; rank < 2; ++rank) CHECK_EQ(num_stray_bytes(whole[rank], before[rank], ranks[rank]), 0);
    World::collect(ranks);
    CHECK_EQ(check_void_dispatch(ranks[1], how.counts == Counts::kKnown), "");
    const std::string told = "token " + std::to_string(token) + " is row " + std::to_string(num_stated + 1) +
                             " of those for rank " + std::to_string(how.rank) + ", but " + std::to_string(num_stated) +
                             " are stated";
    CHECK_THROWS_WITH_AS(world.buffer(1).check(), doctest::Contains(told.c_str()), InvalidArgument);
}

TEST_CASE("a mask with more tokens than the counts state is refused by name, and nothing is written behind the rows") {
    for (Counts counts : {Counts::kUnknown, Counts::kExchanged, Counts::kKnown})
        for (uint32_t lending_ranks = 0; lending_ranks < 4; ++lending_ranks)
            for (bool has_bulk_copy : {false, true})
                for (int rank : {0, 1}) check_understated({counts, lending_ranks, has_bulk_copy, rank});
}

TEST_CASE("a handle whose positions go beyond the rows of a rank is refused by combine, by name") {
    for (uint32_t lending_ranks = 0; lending_ranks < 4; ++lending_ranks) {
        for (bool has_bulk_copy : {false, true}) {
            CAPTURE(lending_ranks);
            CAPTURE(has_bulk_copy);
            const Problem problem{
                .num_tokens = {9, 9}, .num_experts = 2, .drop_probability = 0.0, .lending_ranks = lending_ranks};
            World world = make_world(
                problem, {.device = {.has_bulk_copy = has_bulk_copy}, .idle = simt::IdlePolicy::kAdvanceClock});
            auto ranks = world.dispatched(problem);
            const int num_rows = ranks[0].num_tokens_per_rank[1];
            ranks[0].send_head[5 * 2 + 1] = num_rows + 3;
            world.combine_on(problem, ranks, {0, 1});
            CHECK_EQ(check_void_combine(ranks[0]), "");
            const std::string told = "token 5 is row " + std::to_string(num_rows + 4) + " of those for rank 1, but " +
                                     std::to_string(num_rows) + " are stated";
            CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains(told.c_str()), InvalidArgument);
        }
    }
}

// Rank 1 does not come. The first call runs into its deadline, those behind it find the failure when they begin, as the
// replays of a graph do.
TEST_CASE("outputs of calls that fail, or begin after a failure, cannot pass for results") {
    for (bool lends : {false, true}) {
        for (bool has_bulk_copy : {false, true}) {
            CAPTURE(lends);
            CAPTURE(has_bulk_copy);
            Problem problem{.num_tokens = {9, 8}, .num_experts = 4, .num_scales = 2, .drop_probability = 0.0};
            problem.lending_ranks = lends ? 1 : 0;
            World world = make_world(
                problem, {.device = {.has_bulk_copy = has_bulk_copy}, .idle = simt::IdlePolicy::kAdvanceClock});
            auto ranks = world.dispatched(problem);
            std::vector<RankTensors> calls(3, ranks[0]);
            for (RankTensors& call : calls) {
                prepare_recv(problem, call, call.num_recv_tokens);
                prepare_combine(problem, call, 0);
            }
            world.launch_dispatch(problem, calls[0], 0, Counts::kKnown);
            world.launch_combine(problem, calls[0], 0);
            world.launch_dispatch(problem, calls[1], 0, Counts::kUnknown);
            world.launch_combine(problem, calls[2], 0);
            world.run();
            World::collect(calls);
            CHECK_EQ(check_void_dispatch(calls[0], true), "");
            CHECK_EQ(check_void_combine(calls[0]), "");
            CHECK_EQ(check_void_dispatch(calls[1], false), "");
            CHECK_EQ(check_void_combine(calls[2]), "");
            check_absent_is_named(world, {0}, 1);
        }
    }
}

TEST_CASE("a peer that never enters is named by those that lend to it") {
    const Problem problem{.num_tokens = {5, 6, 4}, .num_experts = 6, .lending_ranks = 7};
    simt::SchedulerOptions options;
    options.idle = simt::IdlePolicy::kAdvanceClock;
    World world(3, kDataBytes, options, 2.0, 0, false, {{}}, kLendBytes);
    auto ranks = world.dispatched(problem);
    world.combine_on(problem, ranks, {0, 2});
    check_absent_is_named(world, {0, 2}, 1);
}

// The outputs are compared element by element elsewhere; here, that peers write nothing beside them.
TEST_CASE("nothing but the outputs is written into what is lent") {
    constexpr uint8_t kUntouched = 0x5a;
    for (bool has_bulk_copy : {false, true}) {
        const Problem problem{.num_tokens = {11, 14, 6},
                              .num_experts = 6,
                              .num_topk = 3,
                              .hidden = 72,
                              .num_scales = 5,
                              .lending_ranks = 7};
        World world = make_world(problem, {.device = {.has_bulk_copy = has_bulk_copy}});
        auto ranks = make_inputs(problem);
        world.layout(problem, ranks);
        std::vector<uint8_t*> whole;
        for (int rank = 0; rank < 3; ++rank) {
            const auto memory = world.lend(rank, kLendBytes);
            std::memset(memory->address(), kUntouched, kLendBytes);
            whole.push_back(memory->address());
        }
        for (int rank = 0; rank < 3; ++rank) world.launch_notify(problem, ranks[static_cast<size_t>(rank)], rank);
        for (int rank = 0; rank < 3; ++rank) {
            RankTensors& tensors = ranks[static_cast<size_t>(rank)];
            const runtime::RecvCounts counts = world.wait_counts(rank);
            tensors.num_recv_tokens = counts.num_tokens;
            prepare_recv(problem, tensors, counts.num_tokens);
            world.launch_dispatch(problem, tensors, rank, Counts::kExchanged);
        }
        world.run();
        const std::vector<uint8_t> untouched(static_cast<size_t>(kLendBytes), kUntouched);
        for (size_t rank = 0; rank < 3; ++rank) CHECK_EQ(num_stray_bytes(whole[rank], untouched, ranks[rank]), 0);
        World::collect(ranks);
    }
}

TEST_CASE("lent memory outlives its Buffer") {
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 2};
    std::unique_ptr<runtime::LentMemory> memory;
    {
        World world = make_world(problem, {});
        memory = world.lend(0, 1000);
        REQUIRE(memory != nullptr);
        world.buffer(0).destroy(0.0);
        world.buffer(1).destroy(0.0);
        memory->address()[999] = 7;  // AddressSanitizer looks at this
        memory.reset();
    }
}

}  // namespace
}  // namespace deep_ep::test
