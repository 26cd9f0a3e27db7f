// Low-latency dispatch and combine on the executor: all ranks in one process, compared bit for bit.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "device/algo/formats.h"
#include "device/simt/graph.h"
#include "support/low_latency_world.h"
#include "support/seeds.h"

namespace deep_ep::test {
namespace {

void check_round_trip(const LowLatencyProblem& problem, const simt::SchedulerOptions& options = {}) {
    const int64_t more_than_hinted = problem.num_topk > 32 ? 1 << 20 : 0;
    for (Launches launches : {Launches::kOne, Launches::kTwo}) {
        CAPTURE(static_cast<int>(launches));
        World world(problem.num_ranks(), 0, options, 100, low_latency_bytes(problem) + more_than_hinted);
        CHECK_EQ(low_latency_round_trip(world, problem, launches), "");
    }
}

TEST_CASE("low latency: rows of zeros have a scale, and stay zeros (pitfall 24)") {
    LowLatencyProblem problem{.num_tokens = {4, 6}, .num_experts = 4, .hidden = 256, .is_fp8 = true};
    World world(2, 0, {}, 100, low_latency_bytes(problem));
    auto ranks = make_low_latency_inputs(problem);
    for (auto& tensors : ranks) std::fill(tensors.x.begin(), tensors.x.end(), uint16_t{0});
    run_on(Call::kDispatch, world, problem, ranks, {0, 1});
    const auto num_rows = static_cast<size_t>(problem.num_rows());
    const auto row_bytes = static_cast<size_t>(problem.row_bytes());
    for (const LowLatencyTensors& tensors : ranks) {
        for (size_t expert = 0; expert < tensors.recv_count.size(); ++expert) {
            for (size_t row = 0; row < static_cast<size_t>(tensors.recv_count[expert]); ++row) {
                const uint8_t* bytes = tensors.recv_x.data() + (expert * num_rows + row) * row_bytes;
                CHECK(std::all_of(bytes, bytes + row_bytes, [](uint8_t byte) { return byte == 0; }));
                for (size_t group = 0; group < 2; ++group) {
                    const float scale =
                        algo::float_from_bits(tensors.recv_scales[(expert * 2 + group) * num_rows + row]);
                    CHECK(std::isfinite(scale));
                    CHECK_GT(scale, 0.0f);
                }
            }
        }
    }
}

TEST_CASE("low latency: any number of ranks, ragged token counts, zero included") {
    for (int num_ranks : {1, 2, 3, 5, 8}) {
        CAPTURE(num_ranks);
        LowLatencyProblem problem{.num_tokens = {}, .num_experts = num_ranks * 2};
        for (int rank = 0; rank < num_ranks; ++rank) problem.num_tokens.push_back(rank * 7 % 17);
        check_round_trip(problem);
    }
}

TEST_CASE("low latency: more ranks than lanes, more top-k than lanes") {
    LowLatencyProblem problem{.num_tokens = std::vector<int>(34, 2), .num_max_tokens = 2, .num_experts = 68};
    problem.num_topk = 40;
    problem.hidden = 16;
    check_round_trip(problem);
}

TEST_CASE("low latency: FP8 with plain, rounded and packed scales, hidden not a multiple of the warp tile (22)") {
    for (int hidden : {128, 512, 640, 1536}) {
        CAPTURE(hidden);
        LowLatencyProblem problem{.num_tokens = {9, 16, 0}, .num_experts = 6, .hidden = hidden, .is_fp8 = true};
        check_round_trip(problem);
        problem.rounds_scales = true;
        check_round_trip(problem);
        problem.packs_scales = true;
        if (hidden % 512 == 0) check_round_trip(problem);
    }
}

TEST_CASE("low latency: bfloat16 rows of any multiple of 16 bytes, any bit pattern") {
    for (int hidden : {8, 72, 264, 2880}) check_round_trip({.num_tokens = {5, 11}, .num_experts = 4, .hidden = hidden});
}

TEST_CASE("low latency: combine in the logarithmic format, hidden not a multiple of its group or its unit") {
    for (int hidden : {8, 16, 120, 128, 264, 1000, 2880}) {
        CAPTURE(hidden);
        LowLatencyProblem problem{.num_tokens = {5, 0, 11}, .num_experts = 6, .hidden = hidden};
        problem.uses_logfmt = true;
        check_round_trip(problem);
        check_round_trip(problem, seeded(static_cast<uint64_t>(hidden)));
    }
}

TEST_CASE("low latency: so many experts that a routing table is made in tiles of 32 tokens") {
    LowLatencyProblem problem{.num_tokens = {70, 33}, .num_max_tokens = 70, .num_experts = 8194, .hidden = 8};
    check_round_trip(problem);
    problem.only_expert = 8193;
    check_round_trip(problem, seeded(3));
}

TEST_CASE("low latency: all tokens to one expert, duplicates, nothing at all (pitfalls 16, 26)") {
    check_round_trip({.num_tokens = {16, 16, 16}, .num_experts = 6, .drop_probability = 0.0, .only_expert = 4});
    check_round_trip({.num_tokens = {3, 16}, .drop_probability = 1.0});
    check_round_trip({.num_tokens = {0, 0, 0}, .num_experts = 3});
}

TEST_CASE("low latency: random schedules give the same bits") {
    for (uint64_t seed = 1; seed <= num_seeds(15); ++seed) {
        CAPTURE(seed);
        check_round_trip({.num_tokens = {8, 0, 13, 16}, .is_fp8 = seed % 2 == 0, .seed = seed}, seeded(seed));
    }
}

TEST_CASE("low latency: shapes interleave on one Buffer without clean-up (pitfall 9)") {
    for (uint64_t seed : {0, 3}) {
        World world(3, 0, seeded(seed), 100, 1 << 20);
        for (int round = 0; round < 10; ++round) {
            CAPTURE(round);
            LowLatencyProblem problem{.num_tokens = {round % 4, 7, (round * 5) % 8}, .num_max_tokens = 8 + round % 3};
            problem.num_experts = 3 * (1 + round % 4);
            problem.num_topk = 1 + round % 5;
            problem.hidden = 128 * (1 + round % 3);
            problem.is_fp8 = round % 2 == 1;
            problem.seed = static_cast<uint64_t>(round) + 50;
            CHECK_EQ(low_latency_round_trip(world, problem, round % 3 == 0 ? Launches::kTwo : Launches::kOne), "");
        }
    }
}

TEST_CASE("low latency: the caller may zero the region between calls") {
    const LowLatencyProblem problem{.num_tokens = {9, 4}};
    const int64_t bytes = low_latency_bytes(problem);
    World world(2, 0, {}, 100, bytes);
    for (int round = 0; round < 4; ++round) {
        CHECK_EQ(low_latency_round_trip(world, problem, round % 2 == 0 ? Launches::kOne : Launches::kTwo), "");
        for (int rank = 0; rank < 2; ++rank)
            std::fill_n(world.buffer(rank).low_latency().data(), static_cast<size_t>(bytes), uint8_t{0});
    }
}

TEST_CASE("low latency: two micro-batches overlap through hooks; a third call is refused") {
    const LowLatencyProblem first{.num_tokens = {9, 4, 12}, .num_experts = 6, .seed = 3};
    const LowLatencyProblem second{.num_tokens = {1, 16, 7}, .num_experts = 6, .is_fp8 = true, .seed = 4};
    World world(3, 0, seeded(5), 100, 1 << 20);
    for (int round = 0; round < 3; ++round) {
        MicroBatch a{world, first}, b{world, second};
        const auto receive = [&](int rank) {
            CHECK_THROWS_WITH_AS(b.send(Call::kDispatch, rank), doctest::Contains("at most 2"), Error);
            a.receive(Call::kDispatch, rank);
            b.receive(Call::kDispatch, rank);
        };
        CHECK_EQ(run_both(Call::kDispatch, a, b, receive), "");
        const auto receive_in_other_order = [&](int rank) {
            b.receive(Call::kCombine, rank);
            a.receive(Call::kCombine, rank);
        };
        CHECK_EQ(run_both(Call::kCombine, a, b, receive_in_other_order), "");
    }
}

TEST_CASE("low latency: an open call holds its bank: the call after the next is refused, and a hook works once") {
    const LowLatencyProblem held{.num_tokens = {3, 5}, .seed = 3};
    const LowLatencyProblem passing{.num_tokens = {4, 1}, .seed = 4};
    World world(2, 0, {}, 100, low_latency_bytes(held));
    MicroBatch a{world, held}, b{world, passing};
    const auto receive = [&](int rank) {
        b.receive(Call::kDispatch, rank);
        CHECK_THROWS_WITH_AS(b.send(Call::kDispatch, rank), doctest::Contains("at most 2"), Error);
        a.receive(Call::kDispatch, rank);
        CHECK_THROWS_WITH_AS(a.receive(Call::kDispatch, rank), doctest::Contains("is over"), InternalError);
    };
    CHECK_EQ(run_both(Call::kDispatch, a, b, receive), "");
}

TEST_CASE("low latency: a graph is replayed between a send phase and its hook") {
    const LowLatencyProblem held{.num_tokens = {3, 5}, .seed = 3};
    const LowLatencyProblem replayed{.num_tokens = {4, 1}, .seed = 4};
    for (Launches launches : {Launches::kOne, Launches::kTwo}) {
        World world(2, 0, {}, 100, low_latency_bytes(held));
        MicroBatch a{world, held}, b{world, replayed};
        std::vector<simt::Graph> dispatches, combines;
        for (int rank = 0; rank < 2; ++rank) {
            dispatches.push_back(
                captured(world, rank, [&] { launch(Call::kDispatch, world, replayed, b.ranks, rank, launches); }));
            combines.push_back(
                captured(world, rank, [&] { launch(Call::kCombine, world, replayed, b.ranks, rank, launches); }));
        }
        for (int round = 0; round < 3; ++round) {
            world.run_on_all([&](int rank) {
                a.send(Call::kDispatch, rank);
                dispatches[static_cast<size_t>(rank)].replay(world.stream(rank));
                a.receive(Call::kDispatch, rank);
            });
            CHECK_EQ(a.check(Call::kDispatch) + b.check(Call::kDispatch), "");
            fill_expert_rows(held, a.ranks);
            fill_expert_rows(replayed, b.ranks);
            world.run_on_all([&](int rank) {
                a.send(Call::kCombine, rank);
                combines[static_cast<size_t>(rank)].replay(world.stream(rank));
                a.receive(Call::kCombine, rank);
            });
            CHECK_EQ(a.check(Call::kCombine) + b.check(Call::kCombine), "");
            world.check_all();
        }
    }
}

TEST_CASE("low latency: a graph that makes two calls while one is open fails at once, on every rank") {
    const LowLatencyProblem problem{.num_tokens = {3, 5}};
    for (Launches launches : {Launches::kOne, Launches::kTwo}) {
        for (bool is_shrinkable : {false, true}) {
            World world(2, 0, {}, 100, low_latency_bytes(problem), is_shrinkable);  // a wait would be a deadlock
            auto a = make_low_latency_inputs(problem), b = make_low_latency_inputs(problem);
            for (int rank = 0; rank < 2; ++rank) {
                const simt::Graph graph = captured(world, rank, [&] {
                    launch(Call::kDispatch, world, problem, b, rank, launches);
                    launch(Call::kCombine, world, problem, b, rank, launches);
                });
                send(Call::kDispatch, world, problem, a, rank);
                graph.replay(world.stream(rank));
            }
            world.run();
            // Whoever finds it first tells the other.
            std::string sentences;
            for (int rank = 0; rank < 2; ++rank) {
                CHECK_THROWS_AS(world.buffer(rank).check(), Error);
                sentences += world.buffer(rank).failure();
            }
            CHECK_NE(sentences.find(": call 1 is still open"), std::string::npos);
        }
    }
}

TEST_CASE("low latency: expert ids out of range are as good as none, whatever their low bits say") {
    const LowLatencyProblem problem{.num_tokens = {6, 6}};
    World world(2, 0, {}, 2.0, low_latency_bytes(problem));
    auto ranks = make_low_latency_inputs(problem);
    for (auto& tensors : ranks) {
        tensors.topk_idx[0] = (int64_t{1} << 32) + 3;
        tensors.topk_idx[4] = -(int64_t{1} << 32) + 2;
        tensors.topk_idx[7] = problem.num_experts;
    }
    run_on(Call::kDispatch, world, problem, ranks, {0, 1});
    world.check_all();
    CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
    fill_expert_rows(problem, ranks);
    run_on(Call::kCombine, world, problem, ranks, {0, 1});
    for (auto& tensors : ranks)  // for the reference, which looks every entry up
        for (auto& idx : tensors.topk_idx) idx = idx >= problem.num_experts ? -1 : idx;
    CHECK_EQ(check_low_latency_combine(problem, ranks), "");
}

TEST_CASE("low latency: one resident block of a device is enough (pitfall 38)") {
    auto options = seeded(2);
    options.max_resident_blocks = 1;
    check_round_trip({.num_tokens = {5, 9, 2}, .num_experts = 6}, options);
}

TEST_CASE("low latency: counts and waits are added to the caller's statistics") {
    const LowLatencyProblem problem{.num_tokens = {9, 4}};
    World world(2, 0, {}, 100, low_latency_bytes(problem));
    auto ranks = make_low_latency_inputs(problem);
    for (int repeat = 0; repeat < 2; ++repeat) {
        for (int rank = 0; rank < 2; ++rank) send(Call::kDispatch, world, problem, ranks, rank);
        for (int rank = 0; rank < 2; ++rank) receive(Call::kDispatch, world, problem, ranks, rank);
        world.run();
    }
    for (const LowLatencyTensors& tensors : ranks)
        for (size_t expert = 0; expert < tensors.recv_count.size(); ++expert)
            CHECK_EQ(tensors.cumulative_stats[expert], 100 + 2 * tensors.recv_count[expert]);
}

// Dispatch, then combine with a hook: the send phases one after the other in this order, each to its end before the next one
// begins, so that a rank finds the weights of those before it and of nobody else. The combined rows of all ranks.
std::vector<std::vector<uint16_t>> combine_in_order(const LowLatencyProblem& problem, const std::vector<int>& order,
                                                    uint64_t seed) {
    World world(problem.num_ranks(), 0, seeded(seed), 100, low_latency_bytes(problem));
    std::vector<std::vector<uint16_t>> combined;
    for (int repeat = 0; repeat < 2; ++repeat) {
        auto ranks = make_low_latency_inputs(problem);
        run_on(Call::kDispatch, world, problem, ranks, order, Launches::kOne);
        fill_expert_rows(problem, ranks);
        for (int rank : order) {
            send(Call::kCombine, world, problem, ranks, rank);
            world.run();  // a proven deadlock, were it to wait for anybody
        }
        for (int rank : order) receive(Call::kCombine, world, problem, ranks, rank);
        world.run();
        for (int rank : order) world.buffer(rank).check();
        CHECK_EQ(check_low_latency_combine(problem, ranks), "");
        for (const auto& tensors : ranks) combined.push_back(tensors.combined_x);
    }
    return combined;
}

TEST_CASE("low latency: with a hook combine sends without peers that have not entered, and the bits are the same") {
    for (bool uses_logfmt : {false, true}) {
        for (int hidden : {128, 1000, 2880}) {
            CAPTURE(uses_logfmt);
            CAPTURE(hidden);
            LowLatencyProblem problem{.num_tokens = {9, 0, 16}, .num_experts = 6, .num_topk = 7, .hidden = hidden};
            problem.uses_logfmt = uses_logfmt;
            const auto expected = combine_in_order(problem, {0, 1, 2}, 0);
            CHECK(combine_in_order(problem, {2, 0, 1}, 0) == expected);
            CHECK(combine_in_order(problem, {1, 2, 0}, 7) == expected);
        }
    }
}

TEST_CASE("low latency: with two calls open a send phase needs no peer that has begun the same call") {
    const LowLatencyProblem problem{.num_tokens = {9, 4, 12}, .num_experts = 6};
    for (bool in_order : {true, false}) {
        World world(3, 0, {}, 100, low_latency_bytes(problem));
        auto first = make_low_latency_inputs(problem), second = first, third = first, fourth = first;
        for (int rank = 0; rank < 3; ++rank) {
            send(Call::kDispatch, world, problem, first, rank);
            send(Call::kDispatch, world, problem, second, rank);
            if (!in_order) receive(Call::kDispatch, world, problem, second, rank);
            receive(Call::kDispatch, world, problem, first, rank);
        }
        world.run();
        for (int rank = 0; rank < 3; ++rank) {
            send(Call::kDispatch, world, problem, third, rank);
            // Its bank is that of the second call, whose end the first one's has told, as the last launch that only received.
            if (!in_order) send(Call::kDispatch, world, problem, fourth, rank);
            world.run();  // a proven deadlock, were it to wait for the next rank
        }
        for (int rank = 0; rank < 3; ++rank) {
            if (in_order) receive(Call::kDispatch, world, problem, second, rank);
            receive(Call::kDispatch, world, problem, third, rank);
            if (!in_order) receive(Call::kDispatch, world, problem, fourth, rank);
        }
        world.run();
        if (in_order) fourth = third;
        for (const auto& call : {first, second, third, fourth}) CHECK_EQ(check_low_latency_dispatch(problem, call), "");
    }
}

TEST_CASE("low latency: a combine whose top-k does not fit slots by entry still waits for the weights of its peers") {
    LowLatencyProblem problem{.num_tokens = {9, 16}, .num_experts = 40, .num_topk = 17};
    check_round_trip(problem);
    World world(2, 0, impatient(), 2.0, low_latency_bytes(problem) + (1 << 20));
    auto ranks = make_low_latency_inputs(problem);
    run_on(Call::kDispatch, world, problem, ranks, {0, 1}, Launches::kOne);
    fill_expert_rows(problem, ranks);
    send(Call::kCombine, world, problem, ranks, 0);
    world.run();
    CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("to send its routing table"), TimeoutError);
}

TEST_CASE("low latency: what does not fit is refused before anything is launched") {
    LowLatencyProblem problem{.num_tokens = {9, 4}};
    World world(2, 0, {}, 100, low_latency_bytes(problem));
    auto ranks = make_low_latency_inputs(problem);
    problem.num_max_tokens = 8;
    CHECK_THROWS_WITH_AS(send(Call::kDispatch, world, problem, ranks, 0), doctest::Contains("at most"),
                         InvalidArgument);
    problem.num_max_tokens = 1000;
    CHECK_THROWS_WITH_AS(send(Call::kDispatch, world, problem, ranks, 0), doctest::Contains("num_rdma_bytes"),
                         InvalidArgument);
    problem.num_max_tokens = 16;
    problem.num_experts = 7;
    CHECK_THROWS_WITH_AS(send(Call::kDispatch, world, problem, ranks, 0), doctest::Contains("num_experts"),
                         InvalidArgument);
}

TEST_CASE("low latency: size hints are at most half of what the original asked for") {
    CHECK_LE(runtime::LowLatency::size_hint(128, 7168, 8, 288), 2146961792 / 2);
    CHECK_LE(runtime::LowLatency::size_hint(64, 2560, 2, 32), 42598784 / 2);
    CHECK_EQ(runtime::LowLatency::size_hint(128, 7168, 8, 288) % 128, 0);
}

TEST_CASE("FP8 cast: exact at the corners of E4M3") {
    CHECK_EQ(algo::fp8_e4m3_from_float(0.0f), 0x00);
    CHECK_EQ(algo::fp8_e4m3_from_float(-0.0f), 0x80);
    CHECK_EQ(algo::fp8_e4m3_from_float(448.0f), 0x7e);
    CHECK_EQ(algo::fp8_e4m3_from_float(1e9f), 0x7e);
    CHECK_EQ(algo::fp8_e4m3_from_float(-1e9f), 0xfe);
    CHECK_EQ(algo::fp8_e4m3_from_float(std::numeric_limits<float>::infinity()), 0x7e);
    CHECK_EQ(algo::fp8_e4m3_from_float(std::nanf("")) & 0x7f, 0x7f);
    CHECK_EQ(algo::fp8_e4m3_from_float(1.0f), 0x38);
    CHECK_EQ(algo::fp8_e4m3_from_float(1.0625f), 0x38);                // tie to even
    CHECK_EQ(algo::fp8_e4m3_from_float(1.1875f), 0x3a);                // tie to even
    CHECK_EQ(algo::fp8_e4m3_from_float(std::ldexp(1.0f, -9)), 0x01);   // smallest subnormal
    CHECK_EQ(algo::fp8_e4m3_from_float(std::ldexp(1.0f, -10)), 0x00);  // tie to even
    CHECK_EQ(algo::fp8_e4m3_from_float(std::ldexp(1.5f, -10)), 0x01);
    CHECK_EQ(algo::fp8_e4m3_from_float(std::ldexp(1.9999f, -7)), 0x08);  // rounds up into the normals
    CHECK_EQ(algo::fp8_scale(0.0f, false).inverse, 448.0f / 1e-4f);      // zeros are not divided by zero (24)
    CHECK_EQ(algo::fp8_scale(448.0f, true).scale, 1.0f);
    CHECK_EQ(algo::fp8_scale(449.0f, true).scale, 2.0f);
}

}  // namespace
}  // namespace deep_ep::test
