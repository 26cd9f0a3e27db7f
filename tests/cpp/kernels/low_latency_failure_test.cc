// Low latency when something goes wrong, on the executor: ranks that are missing, late or masked, replays after a failure, and
// numbers in tables and handles that cannot be true.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "kernels/absent_rank.h"
#include "support/low_latency_world.h"

namespace deep_ep::test {
namespace {

TEST_CASE("low latency: without enable_shrink a missing rank is a timeout that names it") {
    const LowLatencyProblem problem{.num_tokens = {9, 4, 3}, .num_experts = 3};
    World world(3, 0, impatient(), 2.0, low_latency_bytes(problem));
    auto ranks = make_low_latency_inputs(problem);
    run_on(Call::kDispatch, world, problem, ranks, {0, 2});
    check_absent_is_named(world, {0, 2}, 1);
}

template <class T> bool all_ones(const std::vector<T>& words) {
    return std::all_of(words.begin(), words.end(), [](T word) { return word == static_cast<T>(~T{0}); });
}

template <class T> bool all_zero(const std::vector<T>& words) {
    return std::all_of(words.begin(), words.end(), [](T word) { return word == 0; });
}

// What a dispatch that failed must not leave: anything that passes for a row.
void check_is_void(const LowLatencyTensors& tensors) {
    CHECK(all_zero(tensors.recv_count));
    CHECK(all_zero(tensors.layout_range));
    CHECK(all_ones(tensors.recv_x));
    CHECK(all_ones(tensors.recv_scales));
}

// A token with an expert has a row of NaN, one without is zero, as ever.
void check_is_void(const LowLatencyProblem& problem, const LowLatencyTensors& tensors) {
    const auto num_topk = static_cast<size_t>(problem.num_topk), hidden = static_cast<size_t>(problem.hidden);
    for (size_t token = 0; token * hidden < tensors.combined_x.size(); ++token) {
        const auto* ids = tensors.topk_idx.data() + token * num_topk;
        const uint16_t want = std::any_of(ids, ids + num_topk, [](int64_t id) { return id >= 0; }) ? 0xffff : 0;
        for (size_t h = 0; h < hidden; ++h)
            if (tensors.combined_x[token * hidden + h] != want) FAIL_CHECK("token ", token, ", element ", h);
    }
}

TEST_CASE("low latency: replays of a graph after a failure leave NaN and no rows, never stale ones") {
    for (int format = 0; format < 3; ++format) {
        LowLatencyProblem problem{.num_tokens = {9, 4, 12}, .num_experts = 6, .hidden = 512};
        problem.is_fp8 = format > 0;
        problem.rounds_scales = problem.packs_scales = format > 1;
        problem.uses_logfmt = format == 1;
        for (Launches launches : {Launches::kOne, Launches::kTwo}) {
            CAPTURE(format);
            CAPTURE(static_cast<int>(launches));
            World world(3, 0, impatient(), 2.0, low_latency_bytes(problem));
            auto ranks = make_low_latency_inputs(problem);
            fill_expert_rows(problem, ranks);
            std::vector<simt::Graph> graphs;
            for (int rank = 0; rank < 3; ++rank) {
                graphs.push_back(captured(world, rank, [&] {
                    launch(Call::kDispatch, world, problem, ranks, rank, launches);
                    launch(Call::kCombine, world, problem, ranks, rank, launches);
                }));
            }
            for (int rank = 0; rank < 3; ++rank) graphs[static_cast<size_t>(rank)].replay(world.stream(rank));
            world.run();
            CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
            CHECK_EQ(check_low_latency_combine(problem, ranks), "");
            for (int repeat = 0; repeat < 3; ++repeat) {  // the first one finds out, the others know when they begin
                for (size_t rank : {0, 2}) {
                    ranks[rank].recv_count.assign(ranks[rank].recv_count.size(), 1);
                    ranks[rank].recv_x.assign(ranks[rank].recv_x.size(), 0x38);
                    ranks[rank].recv_scales.assign(ranks[rank].recv_scales.size(), 0x3f800000);
                    ranks[rank].layout_range.assign(ranks[rank].layout_range.size(), 1);
                    ranks[rank].combined_x.assign(ranks[rank].combined_x.size(), 0x3f80);
                    graphs[rank].replay(world.stream(static_cast<int>(rank)));
                }
                world.run();
                for (size_t rank : {0, 2}) {
                    check_is_void(ranks[rank]);
                    check_is_void(problem, ranks[rank]);
                }
            }
            CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("rank 1"), TimeoutError);
        }
    }
}

TEST_CASE("low latency: a call that fails between a table and a row: its row is NaN, and no expert has rows") {
    LowLatencyProblem problem{.num_tokens = {9, 4}, .num_experts = 4, .hidden = 1536, .drop_probability = 0.0};
    for (const bool is_fp8 : {false, true}) {
        for (uint64_t seed : {0, 3, 4}) {
            auto options = seeded(seed);
            options.idle = simt::IdlePolicy::kAdvanceClock;
            problem.is_fp8 = is_fp8;
            problem.num_topk = 4;
            World world(2, 0, options, 2.0, low_latency_bytes(problem));
            auto ranks = make_low_latency_inputs(problem);
            for (auto& tensors : ranks)  // every token is a row of every expert
                for (size_t i = 0; i < tensors.topk_idx.size(); ++i) tensors.topk_idx[i] = static_cast<int64_t>(i % 4);
            for (int rank = 0; rank < 2; ++rank) send(Call::kDispatch, world, problem, ranks, rank);
            world.run();
            low_latency_token_flag(world, 0, 1, 1, 2) = 0;  // the third token of rank 1, in the bank of call 1
            receive(Call::kDispatch, world, problem, ranks, 0);
            world.run();
            CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("for rank 1 to send token rows"),
                                 TimeoutError);
            CHECK(all_zero(ranks[0].recv_count));
            CHECK(all_zero(ranks[0].layout_range));
            const auto row_bytes = static_cast<size_t>(problem.row_bytes());
            for (size_t expert : {0, 1}) {
                const auto* row =
                    ranks[0].recv_x.data() + (expert * static_cast<size_t>(problem.num_rows()) + 9 + 2) * row_bytes;
                CHECK(std::all_of(row, row + row_bytes, [](uint8_t byte) { return byte == 0xff; }));
                CHECK(std::any_of(row + row_bytes, row + 2 * row_bytes, [](uint8_t byte) { return byte != 0xff; }));
            }
        }
    }
}

TEST_CASE(
    "low latency: a combine that fails in its receive phase has NaN where a part is missing, and is right elsewhere") {
    LowLatencyProblem problem{.num_tokens = {9, 4}, .num_experts = 4, .hidden = 1024, .drop_probability = 0.0};
    for (const bool uses_logfmt : {false, true}) {
        problem.uses_logfmt = uses_logfmt;
        World world(2, 0, impatient(), 2.0, low_latency_bytes(problem));
        auto ranks = make_low_latency_inputs(problem);
        for (auto& tensors : ranks) std::fill(tensors.topk_idx.begin(), tensors.topk_idx.end(), 3);  // of rank 1
        run_on(Call::kDispatch, world, problem, ranks, {0, 1});
        fill_expert_rows(problem, ranks);
        for (int rank = 0; rank < 2; ++rank) send(Call::kCombine, world, problem, ranks, rank);
        world.run();
        low_latency_token_flag(world, 0, 0, 1, 2) = 0;  // the third token of rank 0, as rank 1 sends it back in call 2
        for (int rank = 0; rank < 2; ++rank) receive(Call::kCombine, world, problem, ranks, rank);
        world.run();
        CHECK_THROWS_AS(world.buffer(0).check(), TimeoutError);
        uint16_t* lost = ranks[0].combined_x.data() + 2 * 1024;
        CHECK(std::all_of(lost, lost + 1024, [](uint16_t word) { return word == 0xffff; }));
        // All others are right: of a token without experts the sum is zero.
        for (auto* ids = ranks[0].topk_idx.data() + 2 * 3; ids < ranks[0].topk_idx.data() + 3 * 3; ++ids) *ids = -1;
        std::fill(lost, lost + 1024, uint16_t{0});
        CHECK_EQ(check_low_latency_combine(problem, ranks), "");
    }
}

// A dispatch, then a combine with what `change` makes of the tensors; the first sentence of a failure, or "".
template <class Change>
std::string combine_after(const LowLatencyProblem& problem, Launches launches, const Change& change) {
    World world(problem.num_ranks(), 0, impatient(), 2.0, low_latency_bytes(problem) + (1 << 20));
    auto ranks = make_low_latency_inputs(problem);
    run_on(Call::kDispatch, world, problem, ranks, all_ranks(problem), launches);
    fill_expert_rows(problem, ranks);
    change(ranks);
    run_on(Call::kCombine, world, problem, ranks, all_ranks(problem), launches);
    std::string found;
    for (int rank = 0; rank < problem.num_ranks(); ++rank) {
        try {
            world.buffer(rank).check();
        } catch (const Error& error) {
            if (found.empty() || std::string(error.what()).find("aborted") == std::string::npos) found = error.what();
        }
    }
    return found.empty() ? check_low_latency_combine(problem, ranks) : found;
}

TEST_CASE("low latency: combine refuses entries that are not those of the dispatch, and takes -1") {
    LowLatencyProblem problem{.num_tokens = {9, 4, 12}, .num_experts = 9, .drop_probability = 0.0};
    for (int num_topk : {3, 40}) {
        problem.num_topk = num_topk;
        for (Launches launches : {Launches::kOne, Launches::kTwo}) {
            CAPTURE(num_topk);
            CAPTURE(static_cast<int>(launches));
            const size_t last = static_cast<size_t>(num_topk) - 1;  // an entry of the first token
            CHECK_EQ(combine_after(problem, launches,
                                   [&](auto& ranks) {
                                       for (auto& tensors : ranks)
                                           for (size_t i = last; i < tensors.topk_idx.size(); i += 5)
                                               tensors.topk_idx[i] = -1;
                                   }),
                     "");
            const std::string other_expert = combine_after(problem, launches, [&](auto& ranks) {
                for (auto& idx : ranks[2].topk_idx) idx = 1;
                ranks[2].topk_idx[0] = ranks[2].topk_idx[0] == 7 ? 8 : 7;  // on another rank, or the same
            });
            CHECK_NE(other_expert.find("of rank 2 names an expert"), std::string::npos);
            const std::string same_rank = combine_after(problem, launches, [&](auto& ranks) {
                int64_t& idx = ranks[1].topk_idx[last];
                idx = idx / 3 * 3 + (idx + 1) % 3;
            });
            CHECK_NE(same_rank.find("topk_idx of token 0 of rank 1 names an expert"), std::string::npos);
        }
    }
}

TEST_CASE("low latency: combine refuses the handles of two micro-batches that are swapped") {
    LowLatencyProblem problem{.num_tokens = {9, 4}, .num_experts = 8, .drop_probability = 0.0};
    auto other = problem;
    other.seed = 2;
    auto swapped = make_low_latency_inputs(other);
    World world(2, 0, impatient(), 2.0, low_latency_bytes(problem));
    run_on(Call::kDispatch, world, other, swapped, {0, 1});
    CHECK_NE(combine_after(problem, Launches::kOne,
                           [&](auto& ranks) {
                               for (size_t rank : {0, 1}) ranks[rank].row_of_entry = swapped[rank].row_of_entry;
                           })
                 .find("the handle that this dispatch returned"),
             std::string::npos);
}

TEST_CASE("low latency: cleaning is a barrier of the group, takes no bank, and is refused while a call is open") {
    const LowLatencyProblem problem{.num_tokens = {9, 4, 3}, .num_experts = 3};
    for (uint64_t seed : {0, 5}) {
        World world(3, 0, seeded(seed), 100, low_latency_bytes(problem));
        for (int repeat = 0; repeat < 3; ++repeat) {
            CHECK_EQ(low_latency_round_trip(world, problem, Launches::kTwo), "");
            for (int rank = 0; rank < 3; ++rank) world.buffer(rank).low_latency().clean(world.stream(rank));
            if (repeat == 1)  // twice in a row, and no run in between
                for (int rank = 0; rank < 3; ++rank) world.buffer(rank).low_latency().clean(world.stream(rank));
        }
        auto ranks = make_low_latency_inputs(problem);
        for (int rank = 0; rank < 3; ++rank) {
            send(Call::kDispatch, world, problem, ranks, rank);
            CHECK_THROWS_WITH_AS(world.buffer(rank).low_latency().clean(world.stream(rank)),
                                 doctest::Contains("no low-latency call may be open, and 1 is"), Error);
            receive(Call::kDispatch, world, problem, ranks, rank);
        }
        world.run();
        CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
    }
}

TEST_CASE("low latency: cleaning waits for every rank") {
    World world(2, 0, {}, 100, 1 << 16);
    world.buffer(0).low_latency().clean(world.stream(0));
    CHECK_THROWS_WITH_AS(world.run(), doctest::Contains("deadlock"), Error);  // rank 1 has not come
}

TEST_CASE("low latency: cleaning masks whoever does not come, or without enable_shrink names it") {
    for (const bool is_shrinkable : {true, false}) {
        World world(3, 0, impatient(), 2.0, 1 << 16, is_shrinkable);
        for (int repeat = 0; repeat < (is_shrinkable ? 2 : 1); ++repeat)
            for (int rank : {0, 2}) world.buffer(rank).low_latency().clean(world.stream(rank));
        world.run();
        for (int rank : {0, 2}) {
            if (is_shrinkable) {
                world.buffer(rank).check();
                for (int peer = 0; peer < 3; ++peer)
                    CHECK_EQ(world.buffer(rank).low_latency().masked_ranks()[peer], peer == 1 ? 1 : 0);
            } else {
                CHECK_THROWS_WITH_AS(world.buffer(rank).check(), doctest::Contains("clean_low_latency_buffer, call 1"),
                                     TimeoutError);
                CHECK_THROWS_WITH_AS(world.buffer(rank).check(), doctest::Contains("rank 1"), TimeoutError);
            }
        }
    }
}

TEST_CASE("low latency: with enable_shrink the missing rank is masked, and the others go on") {
    LowLatencyProblem problem{.num_tokens = {9, 4, 3}, .num_experts = 3};
    World world(3, 0, impatient(), 2.0, low_latency_bytes(problem), true);
    auto ranks = make_low_latency_inputs(problem);
    for (int round = 0; round < 3; ++round) {
        run_on(Call::kDispatch, world, problem, ranks, {0, 2});
        fill_expert_rows(problem, ranks);
        run_on(Call::kCombine, world, problem, ranks, {0, 2});
    }
    auto survivors = problem;
    survivors.num_tokens[1] = 0;
    ranks[1].topk_idx.clear();
    for (int rank : {0, 2}) {
        world.buffer(rank).check();
        CHECK_EQ(world.buffer(rank).low_latency().masked_ranks()[1], 1);
        CHECK_EQ(world.buffer(rank).low_latency().masked_ranks()[2 - rank], 0);
        // Entries of the dead rank's experts count as dropped.
        for (auto& idx : ranks[static_cast<size_t>(rank)].topk_idx) idx = idx == 1 ? -1 : idx;
    }
    ranks[1].combined_x.clear();
    ranks[1].recv_count.assign(1, 0);
    ranks[1].layout_range.assign(3, 0);
    CHECK_EQ(check_low_latency_dispatch(survivors, ranks), "");
    CHECK_EQ(check_low_latency_combine(survivors, ranks), "");
}

TEST_CASE("low latency: a masked rank that comes all the same is left out by every warp") {
    const LowLatencyProblem problem{.num_tokens = {9, 16, 7}, .num_experts = 3};
    const bool is_apart[] = {false, true, false};
    for (uint64_t seed = 1; seed <= 10; ++seed) {
        CAPTURE(seed);
        World world(3, 0, seeded(seed), 100, low_latency_bytes(problem), true);
        for (int rank = 0; rank < 3; ++rank)
            for (int peer = 0; peer < 3; ++peer)
                world.buffer(rank).low_latency().masked_ranks()[peer] = is_apart[rank] != is_apart[peer] ? 1 : 0;
        auto ranks = make_low_latency_inputs(problem);
        run_on(Call::kDispatch, world, problem, ranks, {0, 1, 2});
        for (int rank = 0; rank < 3; ++rank) {
            auto heard = ranks;
            for (int peer = 0; peer < 3; ++peer)
                if (is_apart[rank] != is_apart[peer]) heard[static_cast<size_t>(peer)].topk_idx.clear();
            world.buffer(rank).check();
            CHECK_EQ(check_low_latency_dispatch_of(problem, heard, rank), "");
        }
    }
}

void clear_masks(World& world) {
    for (int rank = 0; rank < world.num_ranks(); ++rank)
        std::fill_n(world.buffer(rank).low_latency().masked_ranks(), world.num_ranks(), 0);
}

// Of another shape and seed, for the same experts.
LowLatencyProblem larger(LowLatencyProblem problem, std::vector<int> num_tokens) {
    problem.num_tokens = std::move(num_tokens);
    problem.num_max_tokens = 64;
    problem.seed = 2;
    return problem;
}

TEST_CASE("low latency: a rank that was masked while late goes on, whatever shapes the others use meanwhile") {
    const LowLatencyProblem small{.num_tokens = {9, 4, 7}, .num_experts = 3};
    const LowLatencyProblem large = larger(small, {64, 0, 64});
    World world(3, 0, impatient(), 2.0, low_latency_bytes(large), true);
    auto first = make_low_latency_inputs(small), second = make_low_latency_inputs(small);
    auto third = make_low_latency_inputs(large);
    run_on(Call::kDispatch, world, small, first, {0, 2});  // masks rank 1
    run_on(Call::kDispatch, world, small, second, {0, 2});
    run_on(Call::kDispatch, world, large, third, {0, 2});
    // What was sent to it before it was masked is as it was; of the later calls it gets nothing but its own.
    run_on(Call::kDispatch, world, small, first, {1});
    CHECK_EQ(check_low_latency_dispatch_of(small, first, 1), "");
    run_on(Call::kDispatch, world, small, second, {1});
    run_on(Call::kDispatch, world, large, third, {1});
    for (auto* tensors : {&second, &third}) {
        const LowLatencyProblem& problem = tensors == &third ? large : small;
        auto heard = *tensors;
        for (size_t peer : {0, 2}) heard[peer].topk_idx.clear();
        CHECK_EQ(check_low_latency_dispatch_of(problem, heard, 1), "");
        heard = *tensors;
        heard[1].topk_idx.clear();
        for (int rank : {0, 2}) CHECK_EQ(check_low_latency_dispatch_of(problem, heard, rank), "");
    }
    // All ranks have made the same calls: they may have it back.
    clear_masks(world);
    world.check_all();
    CHECK_EQ(low_latency_round_trip(world, small, Launches::kTwo), "");
    CHECK_EQ(low_latency_round_trip(world, large, Launches::kOne), "");
    for (int rank = 0; rank < 3; ++rank)
        for (int peer = 0; peer < 3; ++peer) CHECK_EQ(world.buffer(rank).low_latency().masked_ranks()[peer], 0);
}

TEST_CASE("low latency: a masked rank that is behind and taken back too early is masked again, and nothing is wrong") {
    const LowLatencyProblem problem{.num_tokens = {9, 4, 7}, .num_experts = 3};
    World world(3, 0, impatient(), 2.0, low_latency_bytes(problem), true);
    auto ranks = make_low_latency_inputs(problem);
    for (int call = 1; call <= 4; ++call) run_on(Call::kDispatch, world, problem, ranks, {0, 2});
    clear_masks(world);
    run_on(Call::kDispatch, world, problem, ranks, {0, 1, 2});  // the first call of rank 1, the fifth of the others
    auto heard = ranks;
    heard[1].topk_idx.clear();
    for (int rank : {0, 2}) {
        world.buffer(rank).check();
        CHECK_EQ(world.buffer(rank).low_latency().masked_ranks()[1], 1);
        CHECK_EQ(check_low_latency_dispatch_of(problem, heard, rank), "");
    }
    CHECK_EQ(check_low_latency_dispatch_of(problem, ranks, 1), "");  // the same inputs in every call
}

TEST_CASE("low latency: what a late rank writes spoils no message of another rank, whatever their shapes") {
    const LowLatencyProblem small{.num_tokens = {9, 16, 7}, .num_experts = 3};
    const LowLatencyProblem large = larger(small, {60, 0, 64});
    World world(3, 0, impatient(), 2.0, low_latency_bytes(large), true);
    auto first = make_low_latency_inputs(small);
    auto third = make_low_latency_inputs(large);
    for (int call = 1; call <= 2; ++call) run_on(Call::kDispatch, world, small, first, {0, 2});
    for (int rank : {0, 2}) send(Call::kDispatch, world, large, third, rank);
    world.run();
    run_on(Call::kDispatch, world, small, first, {1});  // into the bank that the others are about to read
    for (int rank : {0, 2}) receive(Call::kDispatch, world, large, third, rank);
    world.run();
    for (int rank : {0, 2}) CHECK_EQ(check_low_latency_dispatch_of(large, third, rank), "");
}

TEST_CASE("low latency: nothing is written into the memory of a masked rank") {
    const LowLatencyProblem problem{.num_tokens = {9, 4, 7}, .num_experts = 3};
    const int64_t bytes = low_latency_bytes(problem);
    World world(3, 0, {}, 2.0, bytes, true);
    for (int rank : {0, 2}) world.buffer(rank).low_latency().masked_ranks()[1] = 1;
    auto ranks = make_low_latency_inputs(problem);
    for (Launches launches : {Launches::kOne, Launches::kTwo, Launches::kOne}) {
        for (int rank : {0, 2}) launch(Call::kDispatch, world, problem, ranks, rank, launches);
        run_on(Call::kCombine, world, problem, ranks, {0, 2}, launches);
    }
    const auto control = layout::ControlLayout::make(3);
    const uint8_t* heap = world.buffer(1).data() - control.bytes;
    const uint8_t* end = world.buffer(1).low_latency().data() + bytes;
    CHECK(std::all_of(heap, end, [](uint8_t byte) { return byte == 0; }));
}

TEST_CASE("low latency: numbers in a peer's table that cannot be true fail the call, and address nothing") {
    const LowLatencyProblem problem{.num_tokens = {9, 4}, .num_experts = 4, .drop_probability = 0.0};
    const int64_t bytes = low_latency_bytes(problem);
    const auto message = layout::LowLatencyMessage::make(16, 3, 2, static_cast<uint64_t>(problem.row_bytes()), 0);
    struct Lie {
        layout::Field field;
        int stated;
        const char* sentence;
    };
    const Lie lies[] = {{message.num_tokens, 1000, "states 1000 where at most 16 can be"},
                        {message.num_tokens, -5, "states -5 where"},
                        {message.num_rows, 1 << 28, "states 268435456 where at most 16"},
                        {message.num_rows, -1, "states -1 where"},
                        {message.topk_idx, 4095, "states 4095 where at most"}};  // the place of an entry of expert 0
    for (const Lie& lie : lies) {
        CAPTURE(lie.sentence);
        World world(2, 0, {}, 2.0, bytes);
        auto ranks = make_low_latency_inputs(problem);
        for (int rank = 0; rank < 2; ++rank) send(Call::kDispatch, world, problem, ranks, rank);
        world.run();
        const auto region = layout::LowLatencyRegion::make(static_cast<uint64_t>(bytes), 2);
        // What rank 1 has told rank 0, in the bank of call 1.
        std::memcpy(world.buffer(0).low_latency().data() + region.offset(1, 1) + lie.field.offset, &lie.stated, 4);
        receive(Call::kDispatch, world, problem, ranks, 0);
        world.run();
        CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("the routing table of rank 1"),
                             InvalidArgument);
        CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains(lie.sentence), InvalidArgument);
    }
}

TEST_CASE("low latency: ranks with different shapes fail by name, and nothing is written outside of a tensor") {
    LowLatencyProblem mine{.num_tokens = {16, 16}, .num_experts = 2};
    LowLatencyProblem other = mine;
    other.num_tokens = {64, 64};
    other.num_max_tokens = 64;
    World world(2, 0, impatient(), 2.0, low_latency_bytes(other));
    auto small = make_low_latency_inputs(mine), large = make_low_latency_inputs(other);
    launch(Call::kDispatch, world, mine, small, 0, Launches::kOne);
    send(Call::kDispatch, world, other, large, 1);
    world.run();
    CHECK_THROWS_WITH_AS(world.buffer(0).check(),
                         doctest::Contains("the routing table of rank 1 states 64 where at most 16 can be"),
                         InvalidArgument);
}

}  // namespace
}  // namespace deep_ep::test
