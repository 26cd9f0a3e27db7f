// Calls beside kernels of others that have nearly all SMs (pitfall 38). On a GPU: tests/test_co_residency.py.
#include <doctest/doctest.h>

#include <functional>
#include <vector>

#include "bench/hold_sms.h"
#include "core/non_copyable.h"
#include "support/complaints.h"
#include "support/low_latency_world.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

constexpr int kNumHeld = 4;
constexpr int64_t kRoomy = 1 << 20;
constexpr uint64_t kHeldForNs = 1000'000'000'000;  // ten times as long as a call waits

// Virtual time passes only where nobody can go on: the others' kernels end when the calls have.
simt::SchedulerOptions with_free_sms(int num_free, uint64_t seed = 0) {
    simt::SchedulerOptions options = impatient();
    options.seed = seed;
    options.max_resident_blocks = kNumHeld + num_free;
    return options;
}

// On every rank a kernel of somebody else, in a stream of its own.
class Others : NonCopyable {
public:
    enum class Kind { kStay, kWaitForEachOther };

    Others(World& world, Kind kind) : world_(world), kind_(kind), words_(static_cast<size_t>(world.num_ranks())) {
        for (int rank = 0; rank < world.num_ranks(); ++rank) streams_.push_back(world.device(rank).create_stream());
    }
    ~Others() {
        for (int rank = 0; rank < world_.num_ranks(); ++rank)
            world_.device(rank).destroy_stream(streams_[static_cast<size_t>(rank)]);
    }

    void launch_on(int rank) {
        const auto peer = static_cast<size_t>((rank + 1) % world_.num_ranks());
        Words& words = words_[static_cast<size_t>(rank)];
        bench::hold_sms_on_cpu({.num_resident = &words.num_resident,
                                .is_released = kind_ == Kind::kStay ? &words.never : &words_[peer].num_resident,
                                .timeout_ns = kHeldForNs},
                               kNumHeld, 0, streams_[static_cast<size_t>(rank)]);
    }
    void launch() {
        for (int rank = 0; rank < world_.num_ranks(); ++rank) launch_on(rank);
    }

private:
    struct Words {
        uint32_t num_resident = 0, never = 0;
    };
    World& world_;
    Kind kind_;
    std::vector<Words> words_;
    std::vector<dev::Stream> streams_;
};

TEST_CASE("high throughput: the SMs that a call was given are enough, whoever has all others (pitfall 38)") {
    for (int num_sms : {1, 2, 4}) {
        for (uint64_t seed : {0, 1, 2}) {
            CAPTURE(num_sms);
            CAPTURE(seed);
            Problem problem{.num_tokens = {19, 7, 30}, .num_experts = 6, .num_topk = 3, .num_sms = num_sms};
            World world(3, kRoomy, with_free_sms(num_sms, seed));
            Others others(world, Others::Kind::kStay);
            auto ranks = make_inputs(problem);
            others.launch();
            world.layout(problem, ranks);
            for (int num_extra_rows : {0, 2}) {
                problem.num_extra_rows = num_extra_rows;
                others.launch();
                world.dispatch(problem, ranks);
                CHECK_EQ(check_dispatch(problem, ranks), "");
                others.launch();
                world.combine(problem, ranks);
                CHECK_EQ(check_combine(problem, ranks), "");
            }
            problem.num_extra_rows = 0;
            others.launch();
            world.dispatch_cached(problem, ranks);
            CHECK_EQ(check_dispatch(problem, ranks, true), "");
        }
    }
}

TEST_CASE("low latency: one free SM is enough, whoever has all others (pitfall 38)") {
    for (Launches launches : {Launches::kOne, Launches::kTwo}) {
        for (uint64_t seed : {0, 1, 2}) {
            CAPTURE(seed);
            const LowLatencyProblem problem{.num_tokens = {5, 9, 2}, .num_experts = 6, .seed = seed};
            World world(3, 0, with_free_sms(1, seed), 100, low_latency_bytes(problem));
            Others others(world, Others::Kind::kStay);
            auto ranks = make_low_latency_inputs(problem);
            others.launch();
            run_on(Call::kDispatch, world, problem, ranks, all_ranks(problem), launches);
            CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
            fill_expert_rows(problem, ranks);
            others.launch();
            run_on(Call::kCombine, world, problem, ranks, all_ranks(problem), launches);
            CHECK_EQ(check_low_latency_combine(problem, ranks), "");
            world.check_all();
        }
    }
}

// As two ranks that launch a call of ours and a collective of another library, each in its own order.
void launch_in_two_orders(World& world, Others& others, const std::function<void(int)>& launch_call) {
    constexpr int kEnoughPasses = 100;  // for what is launched to get its SMs
    const auto let_begin = [&] {
        int num_passes = 0;
        world.device(0).host_wait([&] { return ++num_passes > kEnoughPasses; }, 1.0);
    };
    others.launch_on(0);
    let_begin();
    launch_call(0);
    launch_call(1);
    let_begin();
    others.launch_on(1);
    world.run();
}

// Everything before the combine has all SMs.
void combine_in_two_orders(World& world, const Problem& problem, std::vector<RankTensors>& ranks) {
    Others others(world, Others::Kind::kWaitForEachOther);
    world.layout(problem, ranks);
    world.dispatch(problem, ranks);
    for (int rank : {0, 1}) prepare_combine(problem, ranks[static_cast<size_t>(rank)], rank);
    launch_in_two_orders(world, others,
                         [&](int rank) { world.launch_combine(problem, ranks[static_cast<size_t>(rank)], rank); });
}

TEST_CASE("high throughput: ranks may launch other collectives before and after a call (pitfalls 13, 38)") {
    for (uint64_t seed : {0, 1, 2, 3}) {
        CAPTURE(seed);
        const Problem problem{.num_tokens = {19, 7}, .num_topk = 3, .num_sms = 2};
        World world(2, kRoomy, with_free_sms(problem.num_sms, seed));
        auto ranks = make_inputs(problem);
        combine_in_two_orders(world, problem, ranks);
        CHECK_EQ(check_combine(problem, ranks), "");
        for (int rank : {0, 1}) world.buffer(rank).check();
    }
}

TEST_CASE("low latency: ranks may launch other collectives before and after a call (pitfalls 13, 38)") {
    for (uint64_t seed : {0, 1, 2, 3}) {
        CAPTURE(seed);
        const LowLatencyProblem problem{.num_tokens = {9, 4}, .seed = seed};
        World world(2, 0, with_free_sms(1, seed), 100, low_latency_bytes(problem));
        Others others(world, Others::Kind::kWaitForEachOther);
        auto ranks = make_low_latency_inputs(problem);
        launch_in_two_orders(world, others,
                             [&](int rank) { launch(Call::kDispatch, world, problem, ranks, rank, Launches::kOne); });
        CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
        for (int rank : {0, 1}) world.buffer(rank).check();
    }
}

// Nobody can do better: rank 0 has no SM for the call before rank 1 has one for the other collective, and the reverse.
TEST_CASE("a circle of ranks and SMs ends as an error that names the rank, and the device works on (pitfall 38)") {
    const Problem problem{.num_tokens = {19, 7}, .num_topk = 3, .num_sms = kNumHeld};
    World world(2, kRoomy, with_free_sms(0));
    auto ranks = make_inputs(problem);
    combine_in_two_orders(world, problem, ranks);
    CHECK(testing::contains(testing::error_of([&] { world.buffer(1).check(); }), "rank 0"));
    CHECK(testing::contains(testing::error_of([&] { world.buffer(0).check(); }), "rank 1"));
}

}  // namespace
}  // namespace deep_ep::test
