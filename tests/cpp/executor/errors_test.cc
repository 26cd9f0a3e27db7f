// What kernels may not do, and how the executor says so.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <string>

#include "device/launch.h"
#include "device/prim.h"
#include "device/simt/context.h"
#include "device/simt/device.h"
#include "support/complaints.h"

using namespace deep_ep;
using namespace deep_ep::testing;
using prim::Order;
using prim::Scope;

namespace {

enum class Mistake {
    kOtherOperation,
    kOtherLine,
    kOverlappingMasks,
    kExitedLane,
    kExitsWhileAwaited,
    kNotInMask,
    kShuffleFromOutside,
    kBarrierCounts,
    kBarrierId,
    kExitsBeforeSyncthreads,
    kUninitialisedMbarrier,
    kTooManyArrivals,
    kMbarrierOutsideShared,
    kBulkMisaligned,
    kBulkNotShared,
    kBulkUncommitted,
    kBulkUnread,
    kBulkLoadUnawaited,
    kMisalignedWord,
    kDeepRecursion,
    kPastStaticShared,
    kPastDynamicShared,
    kPastMemory,
    kHostCall,
    kSpins,
    kThrows,
};

struct Params {
    uint32_t* words;
    dev::Device* device;
    dev::Stream stream;
};

struct Shared {
    alignas(16) uint32_t words[32];
    prim::MBarrier bar;
};

EP_DEVICE int recurse(int depth) {
    volatile char frame[4096];
    frame[depth % 4096] = static_cast<char>(depth);
    __syncwarp();
    return depth == 0 ? frame[0] : recurse(depth - 1) + frame[depth % 4096];
}

EP_DEVICE void break_collective(Mistake mistake, unsigned lane) {
    switch (mistake) {
        case Mistake::kOtherOperation:
            if (lane < 7) {
                __syncwarp();
            } else {
                __ballot_sync(~0u, 1);
            }
            break;
        case Mistake::kOtherLine:
            if (lane < 7) {
                __syncwarp();
            } else {
                __syncwarp();
            }
            break;
        case Mistake::kOverlappingMasks: __syncwarp(lane < 16 ? 0x1ffffu : 0xffff8000u); break;
        case Mistake::kExitedLane:
            if (lane == 0) return;
            __syncwarp();
            break;
        case Mistake::kExitsWhileAwaited:
            if (lane == 31) return;
            __syncwarp();
            break;
        case Mistake::kNotInMask: __syncwarp(0xffffu); break;
        case Mistake::kShuffleFromOutside:
            if (lane < 16) __shfl_sync(0xffffu, 1, 20);
            break;
        default: break;
    }
}

EP_DEVICE void break_barrier(Mistake mistake, unsigned thread, Shared& shared) {
    switch (mistake) {
        case Mistake::kBarrierCounts: prim::barrier_sync(1, thread < 32 ? 32 * 2 : 32 * 1); break;
        case Mistake::kBarrierId: prim::barrier_sync(16, 64); break;
        case Mistake::kExitsBeforeSyncthreads:
            if (thread >= 32) return;
            __syncthreads();
            break;
        case Mistake::kUninitialisedMbarrier: prim::mbarrier_arrive(&shared.bar); break;
        case Mistake::kTooManyArrivals:
            if (thread == 0) prim::mbarrier_init(&shared.bar, 64);
            __syncthreads();
            prim::mbarrier_arrive_expect_tx(&shared.bar, thread == 0 ? 16 : 0);
            __syncthreads();
            prim::mbarrier_arrive(&shared.bar);
            break;
        default: break;
    }
}

EP_DEVICE void break_bulk_copy(Mistake mistake, const Params& params, Shared& shared) {
    if (threadIdx.x != 0) return;
    switch (mistake) {
        case Mistake::kMbarrierOutsideShared:
            prim::mbarrier_init(reinterpret_cast<prim::MBarrier*>(params.words), 1);
            break;
        case Mistake::kBulkMisaligned: prim::bulk_store(params.words + 1, shared.words, 64); break;
        case Mistake::kBulkNotShared: prim::bulk_store(params.words, params.words + 64, 64); break;
        case Mistake::kBulkUncommitted: prim::bulk_store(params.words, shared.words, 64); break;
        case Mistake::kBulkUnread:
            prim::bulk_store(params.words, shared.words, 64);
            prim::bulk_commit();
            break;
        case Mistake::kBulkLoadUnawaited:
            prim::mbarrier_init(&shared.bar, 1);
            prim::mbarrier_init_fence();
            prim::bulk_load(shared.words, params.words, 64, &shared.bar);
            break;
        default: break;
    }
}

template <Mistake kMistake> struct WrongKernel {
    using Params = ::Params;
    using Shared = ::Shared;
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        break_collective(kMistake, threadIdx.x % 32);
        break_barrier(kMistake, threadIdx.x, shared);
        break_bulk_copy(kMistake, params, shared);
        auto* dynamic = static_cast<volatile char*>(prim::dynamic_shared());
        auto* past_shared = reinterpret_cast<volatile char*>(&shared) + sizeof(Shared);
        if constexpr (kMistake == Mistake::kDeepRecursion) recurse(60);
        if (kMistake == Mistake::kPastStaticShared && threadIdx.x == 0) past_shared[0] = 1;
        if (kMistake == Mistake::kPastDynamicShared && threadIdx.x == 0) dynamic[100] = 1;
        if (kMistake == Mistake::kPastMemory && threadIdx.x == 0) params.words[1024] = 1;
        if constexpr (kMistake == Mistake::kHostCall) params.device->synchronize_stream(params.stream);
        if constexpr (kMistake == Mistake::kSpins) {
            while (prim::load<Order::kAcquire, Scope::kSys>(params.words) == 0) {
            }
        }
        if constexpr (kMistake == Mistake::kThrows) throw Error("thrown by a kernel");
        if constexpr (kMistake == Mistake::kMisalignedWord) {
            prim::load<Order::kRelaxed, Scope::kGpu>(
                reinterpret_cast<const uint64_t*>(reinterpret_cast<const char*>(params.words) + 4));
        }
    }
};

template <Mistake kMistake> std::string complaint(const simt::SchedulerOptions& options = {}) {
    simt::Scheduler scheduler(options);
    simt::SimtDevice device(scheduler, 5);
    const auto stream = device.create_stream();
    auto* words = static_cast<uint32_t*>(device.allocate(4096));
    dev::launch<WrongKernel<kMistake>>({.num_threads = 64, .dynamic_shared_bytes = 100, .name = "wrong"}, stream,
                                       {words, &device, stream});
    const std::string text = error_of([&] { device.synchronize_stream(stream); });
    device.synchronize_stream(stream);  // reported once, and the device works again
    return text;
}

}  // namespace

TEST_CASE("lanes that call different collectives, or the same one from different lines") {
    const std::string operation = complaint<Mistake::kOtherOperation>();
    CHECK(contains(operation, "device 5 kernel \"wrong\" block 0 warp 0 lane 7: __ballot_sync(0xffffffff) at "));
    CHECK(contains(operation, "mismatched warp collective: lanes 0x7f wait in __syncwarp(0xffffffff) at "));
    CHECK(contains(complaint<Mistake::kOtherLine>(), "mismatched warp collective"));
    CHECK(complaint<Mistake::kOtherLine>({.check_call_sites = false}) == "");
}

TEST_CASE("masks that overlap, or leave out the caller, or the lane that is read") {
    CHECK(contains(complaint<Mistake::kOverlappingMasks>(), "lane 16: __syncwarp(0xffff8000) at "));
    CHECK(contains(complaint<Mistake::kOverlappingMasks>(), "overlapping masks: lanes 0xffff wait"));
    CHECK(contains(complaint<Mistake::kNotInMask>(), "lane 16: __syncwarp(0xffff) at "));
    CHECK(contains(complaint<Mistake::kNotInMask>(), "the calling lane is not in the mask"));
    CHECK(contains(complaint<Mistake::kShuffleFromOutside>(), "reads lane 20, which is not in the mask"));
}

TEST_CASE("lanes that return while their warp goes on") {
    CHECK(contains(complaint<Mistake::kExitedLane>(), "lanes 0x1 have returned"));
    CHECK(contains(complaint<Mistake::kExitsWhileAwaited>(), "lane 31: returns while lanes 0x7fffffff wait for it"));
    CHECK(contains(complaint<Mistake::kExitsBeforeSyncthreads>(), "returns while other threads wait in __syncthreads"));
}

TEST_CASE("named barriers whose counts disagree or whose id does not exist") {
    CHECK(contains(complaint<Mistake::kBarrierCounts>(),
                   "barrier 1: this thread expects 32 threads, earlier ones expect 64"));
    CHECK(contains(complaint<Mistake::kBarrierId>(), "barrier id 16 is outside 0..15"));
}

TEST_CASE("mbarriers that were never initialised, overflow, or are not in shared memory") {
    CHECK(
        contains(complaint<Mistake::kUninitialisedMbarrier>(), "mbarrier_arrive: the mbarrier was never initialised"));
    CHECK(contains(complaint<Mistake::kTooManyArrivals>(), "more arrivals than this phase expects"));
    CHECK(contains(complaint<Mistake::kMbarrierOutsideShared>(),
                   "is not an aligned mbarrier in this block's shared memory"));
}

TEST_CASE("bulk copies with wrong operands or an unfinished life") {
    CHECK(contains(complaint<Mistake::kBulkMisaligned>(), "must be multiples of 16"));
    CHECK(contains(complaint<Mistake::kBulkNotShared>(), "are not this block's shared memory"));
    CHECK(contains(complaint<Mistake::kBulkUncommitted>(), "returns with bulk stores that were never committed"));
    CHECK(contains(complaint<Mistake::kBulkUnread>(), "wait_group.read first"));
    CHECK(contains(complaint<Mistake::kBulkLoadUnawaited>({.bulk = simt::BulkMode::kLate}),
                   "the block has ended before a bulk load did"));
}

TEST_CASE("misaligned words and blocking calls inside kernels") {
    CHECK(contains(complaint<Mistake::kMisalignedWord>(), "misaligned address"));
    CHECK(contains(complaint<Mistake::kHostCall>(), "a kernel cannot make blocking host calls"));
}

TEST_CASE("a poll without a pause, which would hang the executor") {
    CHECK(contains(complaint<Mistake::kSpins>(), "without prim::pause() in between"));
}

TEST_CASE("an exception in a kernel reaches the host's next blocking call") {
    CHECK(complaint<Mistake::kThrows>() == "thrown by a kernel");
    CHECK(complaint<Mistake::kThrows>({.seed = 9}) == "thrown by a kernel");
}

TEST_CASE("a stack overflow is reported, not suffered") {
    CHECK(contains(complaint<Mistake::kDeepRecursion>(), "stack overflow: a fiber has"));
    CHECK(complaint<Mistake::kDeepRecursion>({.stack_bytes = 1 << 20}) == "");
}

#if defined(EP_SIMT_ASAN)

// AddressSanitizer ends the process, so each mistake gets one of its own.
static bool ends_process(const std::function<void()>& body) {
    const pid_t child = fork();
    if (child == 0) {
        std::fclose(stderr);
        body();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

TEST_CASE("AddressSanitizer sees the ends of shared memory and of device memory") {
    CHECK(ends_process([] { complaint<Mistake::kPastStaticShared>(); }));
    CHECK(ends_process([] { complaint<Mistake::kPastDynamicShared>(); }));
    CHECK(ends_process([] { complaint<Mistake::kPastMemory>(); }));
    CHECK_FALSE(ends_process([] { complaint<Mistake::kThrows>(); }));
}

#else
TEST_CASE("writes past shared memory are reported when the block ends") {
    CHECK(contains(complaint<Mistake::kPastStaticShared>(), "wrote outside its shared memory, after the static part"));
    CHECK(contains(complaint<Mistake::kPastDynamicShared>(), "after the dynamic part"));
}

#endif

TEST_CASE("launches that no device could run are refused at once") {
    simt::Scheduler scheduler({.max_resident_blocks = 4});
    simt::SimtDevice device(scheduler, 0, {.has_bulk_copy = false});
    const auto stream = device.create_stream();
    using Kernel = WrongKernel<Mistake::kBulkMisaligned>;
    CHECK_THROWS_AS(dev::launch<Kernel>({.num_threads = 48}, stream, {}), Error);
    CHECK_THROWS_AS(dev::launch<Kernel>({.num_threads = 2048}, stream, {}), Error);
    CHECK_THROWS_AS(dev::launch<Kernel>({.num_blocks = 0}, stream, {}), Error);
    CHECK_THROWS_AS(dev::launch<Kernel>({.dynamic_shared_bytes = 1 << 20}, stream, {}), Error);
    CHECK_THROWS_AS(dev::launch<Kernel>({}, nullptr, {}), Error);
    CHECK_THROWS_AS(dev::launch<Kernel>({.num_blocks = 5, .is_cooperative = true}, stream, {}), Error);
    dev::launch<Kernel>({}, stream, {});
    CHECK_THROWS_WITH(device.synchronize_stream(stream),
                      "device 0 kernel \"\" block 0 warp 0 lane 0: bulk copy on a device without bulk copies");
}
