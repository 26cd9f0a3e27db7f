// Which rank was late, at which stage, how often: the counters that kernels keep in the memory of a Buffer.
#include <doctest/doctest.h>

#include <algorithm>

#include "kernels/wait_counters.h"
#include "support/low_latency_world.h"

namespace deep_ep::test {
namespace {

using layout::Operation;
using layout::Stage;

constexpr int64_t kRoomy = 1 << 20;
constexpr int kLate = 1;
constexpr int kNumRanks = 3;

// The others' kernels run for a while, in virtual time far longer than any call takes.
void let_wait(World& world) {
    simt::SimtDevice onlooker(world.scheduler(), kNumRanks, {});
    int looks = 0;
    onlooker.host_wait([&] { return ++looks > 100; }, 1e3);
}

// The sentence that rank 0 is warned with while the late rank is waited for.
template <class Launch> std::string warning_of(World& world, const Launch& launch) {
    std::string warning;
    world.buffer(0).set_warning_handler([&](const std::string& text) { warning += text; });
    for (int rank = 0; rank < kNumRanks; ++rank)
        if (rank != kLate) launch(rank);
    simt::SimtDevice onlooker(world.scheduler(), kNumRanks, {});
    int looks = 0;
    onlooker.host_wait(
        [&] {
            world.buffer(0).check();
            return !warning.empty() || ++looks > 20000;
        },
        1e3);
    launch(kLate);
    world.run();
    return warning;
}

// All ranks launch, the late one when the others have waited.
template <class Launch> void run_late(World& world, const Launch& launch) {
    for (int rank = 0; rank < kNumRanks; ++rank)
        if (rank != kLate) launch(rank);
    let_wait(world);
    launch(kLate);
    world.run();
}

Problem problem_of_three() {
    return {.num_tokens = {12, 9, 7}, .num_experts = 6, .num_topk = 3, .drop_probability = 0.0};
}

LowLatencyProblem low_latency_problem() {
    return {.num_tokens = {9, 4, 12}, .num_experts = 6, .num_topk = 3, .drop_probability = 0.0};
}

void check_named(World& world, Operation operation, Stage stage, uint64_t num_calls) {
    for (const int rank : {0, 2}) {
        CAPTURE(rank);
        const WaitTable waits(world.buffer(rank).read_waits().cells, kNumRanks);
        CHECK_EQ(waits.longest(operation), std::pair(stage, kLate));
        CHECK_EQ(waits.at(operation, stage, kLate).times_late, num_calls);
        CHECK(waits.at(operation, stage, kLate).waited_ns >= num_calls * layout::kLateNs);
        for (const int peer : {0, 2}) CHECK(waits.waited_ns(operation, peer) * 2 < waits.waited_ns(operation, kLate));
    }
    const WaitTable waits(world.buffer(kLate).read_waits().cells, kNumRanks);
    for (const int peer : {0, 2}) CHECK_EQ(waits.at(operation, stage, peer).times_late, 0);
}

// Three fresh dispatches.
void dispatch_late(World& world) {
    const Problem problem = problem_of_three();
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    for (int call = 0; call < 3; ++call) {
        run_late(world, [&](int rank) { world.launch_notify(problem, ranks[static_cast<size_t>(rank)], rank); });
        for (int rank = 0; rank < kNumRanks; ++rank) {
            RankTensors& tensors = ranks[static_cast<size_t>(rank)];
            prepare_recv(problem, tensors, world.wait_counts(rank).num_tokens);
            world.launch_dispatch(problem, tensors, rank, Counts::kExchanged);
        }
        world.run();
    }
}

TEST_CASE("a rank that enters a dispatch late is named, once for each call, whatever the order of the threads") {
    for (const uint64_t seed : {0, 3, 8}) {
        CAPTURE(seed);
        simt::SchedulerOptions options = seeded(seed);
        options.idle = simt::IdlePolicy::kAdvanceClock;
        World world(kNumRanks, kRoomy, options);
        dispatch_late(world);
        check_named(world, Operation::kNotifyDispatch, Stage::kCounts, 3);
    }
}

TEST_CASE("a rank that enters a combine late is named; what it lends is waited for, or its rows") {
    for (const bool lends : {false, true}) {
        CAPTURE(lends);
        World world(kNumRanks, kRoomy, impatient(), 100, 0, false, {{}}, lends ? kRoomy : 0);
        Problem problem = problem_of_three();
        problem.lending_ranks = lends ? 7 : 0;
        auto ranks = world.dispatched(problem);
        prepare_combine(problem, ranks);
        run_late(world, [&](int rank) { world.launch_combine(problem, ranks[static_cast<size_t>(rank)], rank); });
        check_named(world, Operation::kCombine, lends ? Stage::kLoan : Stage::kRow, 1);
    }
}

TEST_CASE("low latency: a late rank is named by every replay of a graph, in dispatch and in combine") {
    const LowLatencyProblem problem = low_latency_problem();
    World world(kNumRanks, 0, impatient(), 100, low_latency_bytes(problem));
    auto ranks = make_low_latency_inputs(problem);
    fill_expert_rows(problem, ranks);
    std::vector<simt::Graph> dispatches, combines;
    for (int rank = 0; rank < kNumRanks; ++rank) {
        dispatches.push_back(
            captured(world, rank, [&] { launch(Call::kDispatch, world, problem, ranks, rank, Launches::kOne); }));
        combines.push_back(
            captured(world, rank, [&] { launch(Call::kCombine, world, problem, ranks, rank, Launches::kOne); }));
    }
    for (int call = 0; call < 2; ++call) {
        run_late(world, [&](int rank) { dispatches[static_cast<size_t>(rank)].replay(world.stream(rank)); });
        run_late(world, [&](int rank) { combines[static_cast<size_t>(rank)].replay(world.stream(rank)); });
    }
    check_named(world, Operation::kLowLatencyDispatch, Stage::kTable, 2);
    check_named(world, Operation::kLowLatencyCombine, Stage::kTable, 2);  // its weights
}

TEST_CASE("every late call is warned of, however far calls of another kind have counted") {
    const LowLatencyProblem problem = low_latency_problem();
    World world(kNumRanks, kRoomy, impatient(), 0.2, low_latency_bytes(problem));
    CHECK_EQ(low_latency_round_trip(world, problem, Launches::kOne), "");
    auto ranks = make_low_latency_inputs(problem);
    const auto starts_with = [](const std::string& text, const std::string& start) {
        CHECK_EQ(text.substr(0, start.size()), start);
    };
    starts_with(
        warning_of(world, [&](int rank) { launch(Call::kDispatch, world, problem, ranks, rank, Launches::kOne); }),
        "DeepEP warning: low_latency_dispatch, call 3, ");
    starts_with(warning_of(world, [&](int rank) { world.buffer(rank).low_latency().clean(world.stream(rank)); }),
                "DeepEP warning: clean_low_latency_buffer, call 1, ");
    const Problem of_three = problem_of_three();
    auto tensors = make_inputs(of_three);
    world.layout(of_three, tensors);
    starts_with(
        warning_of(world, [&](int rank) { world.launch_notify(of_three, tensors[static_cast<size_t>(rank)], rank); }),
        "DeepEP warning: dispatch (count exchange), call 1, ");
}

TEST_CASE("nobody is late where all come at once") {
    World world(kNumRanks, kRoomy, {});
    const Problem problem = problem_of_three();
    CHECK_EQ(round_trip(world, problem), "");
    for (int rank = 0; rank < kNumRanks; ++rank) {
        const auto waits = world.buffer(rank).read_waits();
        CHECK(std::all_of(waits.cells.begin(), waits.cells.end(),
                          [](const layout::WaitCell& cell) { return cell.times_late == 0 && cell.waited_ns == 0; }));
        CHECK_EQ(waits.num_calls, 2);
        CHECK_EQ(waits.num_low_latency_calls, 0);
    }
}

TEST_CASE("a call's longest wait and its number share a word") {
    const uint64_t wait = layout::make_longest_wait(7, 12'345);
    CHECK_EQ(layout::ns_of_wait(wait), 12'345);
    CHECK(layout::is_same_call(wait, layout::make_longest_wait(7, 1)));
    CHECK_FALSE(layout::is_same_call(wait, layout::make_longest_wait(8, 12'345)));
    CHECK(layout::is_same_call(wait, layout::make_longest_wait(7 + (1ull << 24), 3)));  // after two weeks of calls
    CHECK_EQ(layout::ns_of_wait(layout::make_longest_wait(7, ~uint64_t{0})), layout::kMaxLongestWait);
}

}  // namespace
}  // namespace deep_ep::test
