// Calls that end on one rank only: what the others learn of them, and when.
#include <doctest/doctest.h>

#include "core/error.h"
#include "support/low_latency_world.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

constexpr int64_t kRoomy = 1 << 20;

TEST_CASE("a bad expert id stops a peer that waits for the call, with the reason") {
    World world(2, kRoomy, impatient());
    const Problem problem{.num_tokens = {10, 10}, .num_experts = 2};
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    world.launch_notify(problem, ranks[0], 0);
    ranks[1].topk_idx[7] = 2;
    world.launch_layout(problem, ranks[1], 1);
    CHECK_FALSE(world.buffer(0).look() != "");
    while (world.buffer(1).look().empty()) world.scheduler().run_hosts({[&] {}});
    CHECK_THROWS_WITH_AS(world.wait_counts(0), doctest::Contains("topk_idx of token 3 must be -1"), TimeoutError);
    world.run();
}

TEST_CASE("a call that was announced and not finished stops the peers, with the reason, and the next call says so") {
    World world(3, kRoomy, impatient());
    const Problem problem{.num_tokens = {10, 10, 10}, .num_experts = 3, .drop_probability = 0.0};
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    for (int rank = 0; rank < 3; ++rank) {
        world.buffer(rank).begin_call();
        world.launch_notify(problem, ranks[static_cast<size_t>(rank)], rank);
    }
    for (int rank = 0; rank < 3; ++rank)
        ranks[static_cast<size_t>(rank)].num_recv_tokens = world.wait_counts(rank).num_tokens;
    world.buffer(0).abandon_call("dispatch: OutOfMemoryError: 7 bytes");
    for (int rank : {1, 2}) {
        prepare_recv(problem, ranks[static_cast<size_t>(rank)], ranks[static_cast<size_t>(rank)].num_recv_tokens);
        world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kExchanged);
    }
    world.run();
    for (int rank = 0; rank < 3; ++rank)
        CHECK_THROWS_WITH_AS(world.buffer(rank).begin_call(), doctest::Contains("OutOfMemoryError: 7 bytes"), Error);
}

TEST_CASE("a rank without a kernel learns of a peer's failure from its note, and its later kernels do not wait") {
    World world(2, kRoomy, impatient());
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 2};
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    world.buffer(0).begin_call();
    world.launch_notify(problem, ranks[0], 0);
    world.buffer(0).abandon_call("dispatch: KeyboardInterrupt: ");
    CHECK_NE(world.buffer(1).look().find("KeyboardInterrupt"), std::string::npos);
    CHECK_EQ(world.buffer(1).look(), "");  // told once
    CHECK_THROWS_WITH_AS(world.buffer(1).check(), doctest::Contains("because rank 0 failed"), TimeoutError);
    world.run();
}

TEST_CASE("the watcher waits for the reason of a rank that it looks at later, and not for ever") {
    for (bool is_told : {true, false}) {
        World world(2, kRoomy, impatient());
        const Problem problem{.num_tokens = {10, 10}, .num_experts = 2, .drop_probability = 0.0};
        auto ranks = world.dispatched(problem);
        world.launch_without_room(problem, ranks, 1, Counts::kUnknown);
        world.run();
        CHECK_EQ(world.buffer(0).look(), "");
        if (is_told) {
            CHECK_NE(world.buffer(1).look(), "");
            CHECK_NE(world.buffer(0).look().find("num_worst_tokens"), std::string::npos);
        } else {
            for (int look = 0; look < 2; ++look) CHECK_EQ(world.buffer(0).look(), "");
            CHECK_NE(world.buffer(0).look().find("an error of its own"), std::string::npos);
        }
    }
}

TEST_CASE("a refusal aborts nobody, and a peer that waits in vain quotes it; a later call withdraws it") {
    for (bool is_withdrawn : {false, true}) {
        World world(2, kRoomy, impatient(), 2.0);
        const Problem problem{.num_tokens = {4, 4}, .num_experts = 2};
        auto ranks = make_inputs(problem);
        world.layout(problem, ranks);
        world.buffer(1).begin_call();
        world.buffer(1).abandon_call("dispatch: ValueError: x must be something else");
        CHECK_NOTHROW(world.buffer(1).check());
        if (is_withdrawn) world.dispatch(problem, ranks);
        world.launch_notify(problem, ranks[0], 0);
        const std::string quoted = "it refused a call: dispatch: ValueError: x must be something else";
        try {
            world.wait_counts(0);
            FAIL("counts came");
        } catch (const TimeoutError& error) {
            CHECK_EQ(std::string(error.what()).find(quoted) == std::string::npos, is_withdrawn);
        }
        world.run();
    }
}

TEST_CASE("an unfinished call aborts the peers; a low-latency one does not where they may leave its rank out") {
    const LowLatencyProblem problem{.num_tokens = {3, 5}};
    for (bool is_shrinkable : {false, true}) {
        World world(2, 0, impatient(), 2.0, low_latency_bytes(problem), is_shrinkable);
        auto ranks = make_low_latency_inputs(problem);
        for (int rank = 0; rank < 2; ++rank) {
            world.buffer(rank).begin_call();
            launch(Call::kDispatch, world, problem, ranks, rank, Launches::kOne);
        }
        world.run();
        world.buffer(0).abandon_call("low_latency_dispatch: KeyboardInterrupt");
        CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("KeyboardInterrupt"), Error);
        CHECK_EQ(world.buffer(1).look().empty(), is_shrinkable);
        if (is_shrinkable) CHECK_NOTHROW(world.buffer(1).check());
    }
}

TEST_CASE("a kernel that ends because its rank has given up alone aborts nobody") {
    const LowLatencyProblem problem{.num_tokens = {3, 5}};
    World world(2, 0, impatient(), 100, low_latency_bytes(problem), true);
    auto ranks = make_low_latency_inputs(problem);
    abandon_dispatch_of_rank_0(world, problem, ranks);
    CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains("KeyboardInterrupt"), Error);
    CHECK_EQ(world.buffer(1).look(), "");
    run_on(Call::kDispatch, world, problem, ranks, {1}, Launches::kOne);
    CHECK_NOTHROW(world.buffer(1).check());
}

TEST_CASE("an open low-latency call whose hook will not come aborts the peers; one that was received does not") {
    const LowLatencyProblem problem{.num_tokens = {3, 5}};
    for (bool is_received : {false, true}) {
        World world(2, 0, impatient(), 2.0, low_latency_bytes(problem));
        auto ranks = make_low_latency_inputs(problem);
        for (int rank = 0; rank < 2; ++rank) send(Call::kDispatch, world, problem, ranks, rank);
        for (int rank = is_received ? 0 : 1; rank < 2; ++rank) receive(Call::kDispatch, world, problem, ranks, rank);
        world.run();
        world.buffer(0).low_latency().abandon_hook(ranks[0].ticket, "dropped");
        CHECK_EQ(world.buffer(0).failure().empty(), is_received);
        CHECK_EQ(world.buffer(1).look().find("dropped") == std::string::npos, is_received);
    }
}

TEST_CASE("a low-latency call that is refused leaves an open one as it was") {
    const LowLatencyProblem problem{.num_tokens = {3, 5}};
    World world(2, 0, {}, 100, low_latency_bytes(problem));
    auto ranks = make_low_latency_inputs(problem);
    for (int rank = 0; rank < 2; ++rank) send(Call::kDispatch, world, problem, ranks, rank);
    world.buffer(0).begin_call();
    world.buffer(0).abandon_call("low_latency_combine: ValueError: x must be something else");
    for (int rank = 0; rank < 2; ++rank) receive(Call::kDispatch, world, problem, ranks, rank);
    world.run();
    CHECK_EQ(check_low_latency_dispatch(problem, ranks), "");
}

}  // namespace
}  // namespace deep_ep::test
