// Waits of the kernels, alone: clocks that step back, copies that do not land.
#include <doctest/doctest.h>

#include <atomic>
#include <vector>

#include "device/algo/ring.h"
#include "device/algo/watch.h"
#include "device/launch.h"
#include "device/simt/device.h"
#include "kernels/params.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

using prim::Order;
using prim::Scope;

constexpr uint64_t kSecond = 1'000'000'000;

// The memory that a kernel of rank 0 of two waits in.
struct Node {
    layout::ControlLayout control = layout::ControlLayout::make(2);
    std::vector<uint64_t> heaps[2] = {std::vector<uint64_t>(control.bytes / 8),
                                      std::vector<uint64_t>(control.bytes / 8)};
    layout::LocalState local{};
    layout::HostStatus status{};

    kernels::HeapParams heap() {
        return {.bases = {reinterpret_cast<uint8_t*>(heaps[0].data()), reinterpret_cast<uint8_t*>(heaps[1].data())},
                .rank = 0,
                .num_ranks = 2,
                .control = control,
                .first_rank = 0,
                .num_nodes = 1};
    }
    kernels::WatchParams watch(uint64_t timeout_ns) { return {&local, &status, timeout_ns, timeout_ns}; }
};

struct WaitParams {
    kernels::HeapParams heap;
    kernels::WatchParams watch;
    int num_steps;      // of the peer, before it has come
    int num_looks = 0;  // at the clock, first: every other one steps back
    int* result = nullptr;
    uint32_t* steps = nullptr;
};

EP_DEVICE algo::Watch watch_of(const WaitParams& params) {
    return {params.watch, params.heap, layout::Operation::kDispatch, 1};
}

template <class Kernel> int run_waits(const simt::SchedulerOptions& options, WaitParams params) {
    simt::Scheduler scheduler(options);
    simt::SimtDevice device(scheduler, 0, {});
    const dev::Stream stream = device.create_stream();
    int result = 0;
    uint32_t steps = 0;
    params.result = &result;
    params.steps = &steps;
    dev::LaunchConfig config;
    config.num_blocks = 2;
    config.name = "waits";
    dev::launch<Kernel>(config, stream, params);
    device.synchronize_stream(stream);
    device.destroy_stream(stream);
    return result;
}

// The second block: the peer, which comes late.
EP_DEVICE void come_late(const WaitParams& params, uint64_t* flag) {
    if (prim::lane_idx() != 0) return;
    for (int i = 0; i < params.num_steps; ++i) {
        prim::fetch_add<Order::kRelaxed, Scope::kGpu>(params.steps, 1u);
        prim::pause();
    }
    prim::store<Order::kRelease, Scope::kSys>(flag, uint64_t{1});
}

// The first block waits as `Wait` says; what it waits for comes late.
template <class Wait> struct WaitKernel {
    using Params = WaitParams;
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        const algo::Watch watch = watch_of(params);
        if (blockIdx.x == 1) return come_late(params, Wait::flag(watch));
        if (prim::lane_idx() < params.num_looks) prim::clock_ns();
        __syncwarp();
        const bool is_here = Wait::run(watch);
        if (prim::lane_idx() == 0) *params.result = is_here;
    }
};

struct ForFlag {
    static EP_DEVICE uint64_t* flag(const algo::Watch& watch) { return watch.heap.started(0, 1); }
    static EP_DEVICE bool run(const algo::Watch& watch) {
        return algo::wait_at_least(watch, {layout::Stage::kStart, 1}, flag(watch), 1);
    }
};

// Rank 1 has entered the call, and comes to its end later.
struct ForQuiet {
    static EP_DEVICE uint64_t* flag(const algo::Watch& watch) { return watch.heap.returned(0, 1); }
    static EP_DEVICE bool run(const algo::Watch& watch) {
        algo::wait_for_quiet(algo::Warp{}, watch);
        __syncwarp();
        return prim::load<Order::kAcquire, Scope::kSys>(flag(watch)) == 1;
    }
};

simt::SchedulerOptions stepping_back() {
    simt::SchedulerOptions options;
    options.clock_step_back_ns = 500'000;
    return options;
}

TEST_CASE("a clock that steps back is no timeout") {
    Node node;
    CHECK(run_waits<WaitKernel<ForFlag>>(stepping_back(), {node.heap(), node.watch(kSecond), 50}) == 1);
    CHECK_EQ(node.status.failure.state, 0);
    CHECK_EQ(node.status.warning.state, 0);
}

TEST_CASE("a clock that steps back does not end the wait for peers that still use what is lent") {
    for (int num_looks : {0, 1}) {
        CAPTURE(num_looks);
        Node node;
        node.heaps[0][node.control.started.at(1) / 8] = 1;
        CHECK(run_waits<WaitKernel<ForQuiet>>(stepping_back(), {node.heap(), node.watch(kSecond), 50, num_looks}) == 1);
    }
}

// The second item was never loaded.
struct StageKernel {
    using Params = WaitParams;
    struct Shared {
        alignas(128) uint8_t memory[2 * (128 + layout::Staging::kBarrierBytes)];
    };
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        const algo::Stages stages(shared.memory, {2, 128});
        if (blockIdx.x == 1) return;
        stages.init(algo::Warp{});
        if (prim::lane_idx() == 0) stages.load(0, params.heap.bases[0], 128);
        stages.wait(0);
        if (prim::lane_idx() == 0) prim::store<Order::kRelaxed, Scope::kSys>(params.result, 1);
        stages.wait(1);
    }
};

TEST_CASE("a wait for our own copies ends when they land, and one for a copy that nobody made is reported") {
    for (simt::BulkMode bulk : {simt::BulkMode::kEager, simt::BulkMode::kLate}) {
        Node node;
        simt::SchedulerOptions options;
        options.bulk = bulk;
        simt::Scheduler scheduler(options);
        simt::SimtDevice device(scheduler, 0, {});
        const dev::Stream stream = device.create_stream();
        static int result;
        std::atomic_ref(result).store(0, std::memory_order_relaxed);
        WaitParams params{node.heap(), node.watch(kSecond), 0};
        params.result = &result;
        // Nothing that the test deletes, and no plain read: a launch that is given up is ordered before nothing.
        static uint64_t source[16];
        params.heap.bases[0] = reinterpret_cast<uint8_t*>(source);
        dev::LaunchConfig config;
        config.name = "stages";
        dev::launch<StageKernel>(config, stream, params);
        CHECK_THROWS_WITH_AS(device.synchronize_stream(stream), doctest::Contains("mbarrier"), simt::DeadlockError);
        CHECK_EQ(std::atomic_ref(result).load(std::memory_order_relaxed), 1);
        device.destroy_stream(stream);
    }
}

}  // namespace
}  // namespace deep_ep::test
