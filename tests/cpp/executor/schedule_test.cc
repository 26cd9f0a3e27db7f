// Schedules: exact replay, deadlocks, residency, streams and events, several hosts, clocks.
#include <doctest/doctest.h>

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "device/launch.h"
#include "device/prim.h"
#include "device/simt/device.h"
#include "device/simt/happens_before.h"
#include "executor/faults.h"
#include "support/complaints.h"

using namespace deep_ep;
using namespace deep_ep::testing;
using prim::Order;
using prim::Scope;

namespace {

// Every thread appends itself to a log.
struct LogKernel {
    struct Params {
        uint32_t* length;
        uint32_t* log;
        uint32_t tag;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        for (int round = 0; round < 4; ++round) {
            const uint32_t place = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(params.length, 1u);
            params.log[place] = params.tag + blockIdx.x * blockDim.x + threadIdx.x;
        }
        __syncthreads();
    }
};

// Says two things, one after the other.
struct TwoWordsKernel {
    struct Params {
        uint32_t* words;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        for (int i = 0; i < 2; ++i) {
            if (threadIdx.x == 0) prim::store<Order::kRelaxed, Scope::kSys>(&params.words[i], 1u);
            __syncwarp();
        }
    }
};

// Waits for the first word, and keeps what the second one is then.
struct FirstWordKernel {
    struct Params {
        uint32_t* words;
        uint32_t* second;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        if (threadIdx.x != 0) return;
        while (prim::load<Order::kRelaxed, Scope::kSys>(&params.words[0]) == 0) prim::pause();
        *params.second = prim::load<Order::kRelaxed, Scope::kSys>(&params.words[1]);
    }
};

struct Run {
    uint64_t trace;
    std::vector<uint32_t> log;
    bool operator==(const Run&) const = default;
};

Run run_log(uint64_t seed) {
    simt::Scheduler scheduler({.seed = seed, .bulk = simt::BulkMode::kRandom});
    simt::SimtDevice device(scheduler, 0);
    constexpr int kEntries = 2 * 3 * 64 * 4;
    auto* words = static_cast<uint32_t*>(device.allocate(4 * (kEntries + 1)));
    for (uint32_t kernel = 0; kernel < 2; ++kernel) {
        dev::launch<LogKernel>({.num_blocks = 3, .num_threads = 64, .name = "log"}, device.create_stream(),
                               {words, words + 1, kernel * 1000});
    }
    scheduler.run_until_idle();
    return {scheduler.trace_hash(), {words + 1, words + 1 + kEntries}};
}

// Block 0 waits for a flag that the last block sets.
struct BackwardsKernel {
    struct Params {
        uint32_t* flag;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        if (threadIdx.x == 0 && blockIdx.x + 1 == gridDim.x) prim::store<Order::kRelease, Scope::kGpu>(params.flag, 1u);
        if (threadIdx.x == 0) {
            while (prim::load<Order::kAcquire, Scope::kGpu>(params.flag) == 0) {
                simt::describe_wait("the last block of", gridDim.x);
                prim::pause();
            }
        }
        __syncwarp();
    }
};

// A warp whose polls are votes, as in algo::serve_streams.
struct VotingKernel {
    struct Params {
        uint32_t* flag;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        const uint32_t* flag = params.flag;
        while (!__any_sync(prim::kFullMask, prim::load<Order::kRelaxed, Scope::kGpu>(flag) != 0)) prim::pause();
    }
};

struct AddKernel {
    struct Params {
        int* word;
        int addend;
        int factor;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        if (threadIdx.x == 0) *params.word = *params.word * params.factor + params.addend;
    }
};

struct SleepKernel {
    struct Params {
        uint64_t* elapsed;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        const uint64_t start = prim::clock_ns();
        while (prim::clock_ns() - start < 5'000'000) prim::pause();
        if (threadIdx.x == 0) *params.elapsed = prim::clock_ns() - start;
    }
};

std::string failure_of(simt::Scheduler& scheduler) {
    return error_of([&] { scheduler.run_until_idle(); });
}

}  // namespace

TEST_CASE("a seed repeats a schedule exactly, another seed gives another one") {
    const Run in_order = run_log(0);
    CHECK(run_log(0) == in_order);
    std::set<uint64_t> traces{in_order.trace};
    for (uint64_t seed = 1; seed <= 5; ++seed) {
        const Run first = run_log(seed);
        CHECK(run_log(seed) == first);
        CHECK(first.log != in_order.log);
        traces.insert(first.trace);
    }
    CHECK(traces.size() == 6);
}

TEST_CASE("a grid that relies on all blocks being resident deadlocks when they are not, and the report says so") {
    for (const int limit : {0, 3, 2}) {
        simt::Scheduler scheduler({.max_resident_blocks = limit});
        simt::SimtDevice device(scheduler, 1);
        auto* flag = static_cast<uint32_t*>(device.allocate(4));
        dev::launch<BackwardsKernel>({.num_blocks = 3, .name = "backwards"}, device.create_stream(), {flag});
        const std::string report = failure_of(scheduler);
        if (limit != 2) {
            CHECK(report == "");
            continue;
        }
        CHECK(
            contains(report, "block 0 warp 0 lanes 0x1: waits for the last block of 3 device 1 memory #0 + 0, sees 0"));
        CHECK(contains(report, "block 0 warp 0 lanes 0xfffffffe: __syncwarp(0xffffffff) at "));
        CHECK(contains(report, "missing lanes 0x1"));
        CHECK(contains(report, "1 of 3 blocks are not resident (max_resident_blocks = 2)"));
    }
}

TEST_CASE("a slow device goes on only when no other can, and not further than to what they wait for") {
    for (const int slow : {-1, 1}) {
        simt::Scheduler scheduler({.slow_device = slow});
        simt::SimtDevice quick(scheduler, 0), other(scheduler, 1);
        auto* words = static_cast<uint32_t*>(quick.allocate(4 * 3));
        dev::launch<TwoWordsKernel>({.name = "two words"}, other.create_stream(), {words});
        dev::launch<FirstWordKernel>({.name = "first word"}, quick.create_stream(), {words, words + 2});
        scheduler.run_until_idle();
        CHECK(words[1] == 1);
        CHECK(words[2] == (slow < 0 ? 1 : 0));
    }
}

TEST_CASE("a slow device that waits for ever is a deadlock, with a poll or a vote, and needs turns in order") {
    simt::Scheduler scheduler({.slow_device = 1});
    simt::SimtDevice device(scheduler, 1);
    auto* flag = static_cast<uint32_t*>(device.allocate(4 * 2));
    dev::launch<FirstWordKernel>({.name = "first word"}, device.create_stream(), {flag, flag + 1});
    CHECK(contains(failure_of(scheduler), "kernel \"first word\" block 0 warp 0 lanes 0x1: polls"));
    dev::launch<VotingKernel>({.num_blocks = 2, .name = "voting"}, device.create_stream(), {flag});
    CHECK(contains(failure_of(scheduler), "block 1 warp 0 lanes 0xffffffff: polls"));
    CHECK_THROWS_AS(simt::Scheduler({.seed = 1, .slow_device = 1}), Error);
}

TEST_CASE("a warp that polls with a vote is seen to wait for ever, like one that polls with loads alone") {
    for (const uint64_t seed : {0, 4}) {
        simt::Scheduler scheduler({.seed = seed});
        simt::SimtDevice device(scheduler, 1);
        auto* flag = static_cast<uint32_t*>(device.allocate(4));
        dev::launch<VotingKernel>({.num_blocks = 2, .name = "voting"}, device.create_stream(), {flag});
        CHECK(contains(failure_of(scheduler), "block 1 warp 0 lanes 0xffffffff: polls device 1 memory #0 + 0"));
    }
}

TEST_CASE("a cooperative launch waits until all its blocks fit") {
    simt::Scheduler scheduler({.seed = 3, .max_resident_blocks = 4});
    simt::SimtDevice device(scheduler, 0);
    auto* flags = static_cast<uint32_t*>(device.allocate(4 * 64));
    for (int i = 0; i < 6; ++i) {
        dev::launch<BackwardsKernel>({.num_blocks = 3, .is_cooperative = true, .name = "backwards"},
                                     device.create_stream(), {flags + i});
    }
    CHECK(failure_of(scheduler) == "");
}

TEST_CASE("a stream keeps its order, whatever the seed") {
    for (uint64_t seed = 0; seed < 10; ++seed) {
        simt::Scheduler scheduler({.seed = seed});
        simt::SimtDevice device(scheduler, 0);
        const auto stream = device.create_stream();
        auto* words = static_cast<int*>(device.allocate(8));
        device.memset_async(words, 1, 4, stream);  // 0x01010101
        dev::launch<AddKernel>({.name = "add"}, stream, {words, 1, 0});
        dev::launch<AddKernel>({.name = "add"}, stream, {words, 2, 10});
        device.memcpy_async(words + 1, words, 4, stream);
        dev::launch<AddKernel>({.name = "add"}, stream, {words, 3, 10});
        device.synchronize_stream(stream);
        CHECK(words[0] == 123);
        CHECK(words[1] == 12);
        device.destroy_stream(stream);
    }
}

TEST_CASE("events order streams: the latest record before the wait counts, an event never recorded does not block") {
    for (uint64_t seed = 0; seed < 10; ++seed) {
        simt::Scheduler scheduler({.seed = seed});
        simt::SimtDevice device(scheduler, 0);
        const auto first = device.create_stream(), second = device.create_stream();
        const auto event = device.create_event(), never = device.create_event();
        auto* word = static_cast<int*>(device.allocate(4));
        CHECK(device.query_event(never));
        device.synchronize_event(never);
        device.stream_wait_event(second, never);
        for (int i = 1; i <= 3; ++i) dev::launch<AddKernel>({.name = "add"}, first, {word, i, 10});
        device.record_event(event, first);
        device.stream_wait_event(second, event);
        dev::launch<AddKernel>({.name = "add"}, second, {word, 4, 10});
        device.record_event(event, second);
        while (!device.query_event(event)) {
        }
        CHECK(*word == 1234);
        device.destroy_event(event);
        device.destroy_event(never);
    }
}

TEST_CASE("streams that wait for each other's events are a deadlock with a report") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    auto* flag = static_cast<uint32_t*>(device.allocate(8));
    const auto first = device.create_stream(), second = device.create_stream();
    const auto event = device.create_event();
    dev::launch<faults::ReceiveKernel<faults::Receive::kAcquire>>({.name = "receive"}, first, {flag, flag, flag + 1});
    device.record_event(event, first);
    device.stream_wait_event(second, event);
    const std::string report = failure_of(scheduler);
    CHECK(contains(report, "kernel \"receive\" block 0 warp 0 lanes 0x1: polls device 0 memory #0 + 0, sees 0"));
    CHECK(contains(report, "device 0 stream: waits for an event"));
    CHECK(device.query_event(event));  // nobody is left waiting for what was given up
    device.destroy_event(event);
}

TEST_CASE("a thread that waits for the clock alone is asleep, not deadlocked") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    auto* elapsed = static_cast<uint64_t*>(device.allocate(8));
    dev::launch<SleepKernel>({.name = "sleep"}, device.create_stream(), {elapsed});
    CHECK(failure_of(scheduler) == "");
    CHECK(*elapsed >= 5'000'000);
    CHECK(*elapsed < 50'000'000);
}

TEST_CASE("memory freed while a kernel uses it lives until the kernel ends") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    const auto stream = device.create_stream();
    auto* words = static_cast<int*>(device.allocate(8 << 20));
    dev::launch<AddKernel>({.name = "add"}, stream, {words, 1, 1});
    device.free(words);
    device.destroy_stream(stream);
    scheduler.run_until_idle();
    CHECK_THROWS_AS(device.free(words), InternalError);
}

// Each rank's host code blocks on its own device, and the ranks' kernels wait for each other.
TEST_CASE("hosts of several ranks run in one thread, and replay exactly") {
    const auto run = [](uint64_t seed) {
        simt::Scheduler scheduler({.seed = seed});
        constexpr int kRanks = 3;
        std::vector<std::unique_ptr<simt::SimtDevice>> devices;
        for (int rank = 0; rank < kRanks; ++rank) {
            devices.push_back(std::make_unique<simt::SimtDevice>(scheduler, rank));
        }
        auto* words = static_cast<uint32_t*>(devices[0]->allocate(4 * 4096));
        std::vector<std::function<void()>> hosts;
        for (int rank = 0; rank < kRanks; ++rank) {
            hosts.push_back([&, rank] {
                auto& device = *devices[rank];
                const auto stream = device.create_stream();
                for (int round = 0; round < 3; ++round) {
                    // A chain: rank r passes on to r + 1; rank 0 starts a round when the last one has ended it.
                    uint32_t* const mine = words + 1024 * rank + 128 * round;
                    uint32_t* const next = words + 1024 * (rank + 1) + 128 * round;
                    if (rank > 0) {
                        dev::launch<faults::ReceiveKernel<faults::Receive::kAcquire>>({.name = "receive"}, stream,
                                                                                      {mine, mine + 64, mine + 65});
                    }
                    dev::launch<faults::SendKernel<faults::Send::kRelease>>({.name = "send"}, stream,
                                                                            {next, next + 64, nullptr});
                    if (rank == 0) {
                        const uint32_t* const last = words + 1024 * kRanks + 128 * round + 64;
                        const auto has_come = [&] { return prim::load<Order::kAcquire, Scope::kSys>(last) != 0; };
                        CHECK(device.host_wait(has_come, 10.0));
                    }
                    device.synchronize_stream(stream);
                }
            });
        }
        scheduler.run_hosts(hosts);
        for (int i = 0; i < 4096; ++i) CHECK((i % 128 != 65 || words[i] == 0));
        return scheduler.trace_hash();
    };
    CHECK(run(0) == run(0));
    CHECK(run(7) == run(7));
    CHECK(run(7) != run(8));
}

TEST_CASE("a host that waits for ever is reported together with the kernels, and every host hears of it") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0), other(scheduler, 1);
    std::atomic<int> num_deadlocks = 0;
    const auto wait = [&](simt::SimtDevice& self) {
        try {
            self.host_wait([] { return false; }, 100.0);
        } catch (const simt::DeadlockError& error) {
            CHECK(contains(error.what(), "host 0: blocking call"));
            ++num_deadlocks;
        }
    };
    scheduler.run_hosts({[&] { wait(device); }, [&] { wait(other); }});
    CHECK(num_deadlocks == 2);
    scheduler.run_hosts({[&] { CHECK_THROWS_AS(throw Error("caught"), Error); }});
    CHECK_THROWS_WITH(scheduler.run_hosts({[] {}, [] { throw Error("second host"); }}), "second host");
}

TEST_CASE("a host's wait ends at its timeout when the clock may advance") {
    simt::Scheduler scheduler({.idle = simt::IdlePolicy::kAdvanceClock});
    simt::SimtDevice device(scheduler, 0);
    CHECK_FALSE(device.host_wait([] { return false; }, 60.0));
    CHECK(device.host_wait([] { return true; }, 0.0));
}
