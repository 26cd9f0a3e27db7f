// The executor runs at all: launches, collectives, barriers, flags between devices, background mode, deadlock, errors.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "device/launch.h"
#include "device/prim.h"
#include "device/simt/device.h"

using namespace deep_ep;
using prim::Order;
using prim::Scope;

namespace {

struct SumKernel {
    struct Params {
        const int* in;
        int* out;
        int rounds;
    };
    struct Shared {
        int partial[32];
    };
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        const int lane = threadIdx.x % 32;
        const int warp = threadIdx.x / 32;
        int sum = params.in[blockIdx.x * blockDim.x + threadIdx.x];
        for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(~0u, sum, delta);
        for (int i = 0; i < params.rounds; ++i) __syncwarp();
        if (lane == 0) shared.partial[warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            int total = 0;
            for (unsigned w = 0; w < blockDim.x / 32; ++w) total += shared.partial[w];
            params.out[blockIdx.x] = total;
        }
    }
};

// Waits for the other rank's flag, after having set its own.
struct HandshakeKernel {
    struct Params {
        uint32_t* mine;
        uint32_t* peers;
        uint64_t timeout_ns;
        uint32_t* has_timed_out;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        if (threadIdx.x == 0) {
            prim::store<Order::kRelease, Scope::kSys>(params.peers, 1u);
            const uint64_t start = prim::clock_ns();
            while (prim::load<Order::kAcquire, Scope::kSys>(params.mine) == 0) {
                if (prim::clock_ns() - start > params.timeout_ns) {
                    prim::store<Order::kRelease, Scope::kSys>(params.has_timed_out, 1u);
                    break;
                }
                prim::pause();
            }
        }
        __syncwarp();
    }
};

struct MismatchKernel {
    struct Params {};
    struct Shared {};
    static EP_DEVICE void run(const Params&, Shared&) {
        if (threadIdx.x < 16) {
            __syncwarp();
        } else {
            __shfl_sync(~0u, 1, 0);
        }
    }
};

struct DeepKernel {
    struct Params {
        int* out;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        volatile char frame[2048];
        for (int i = 0; i < 2048; ++i) frame[i] = static_cast<char>(i);
        __syncthreads();
        params.out[threadIdx.x] = frame[threadIdx.x];
    }
};

}  // namespace

TEST_CASE("kernels with shuffles and barriers compute, launches reuse their stacks") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    auto stream = device.create_stream();
    constexpr int kBlocks = 8, kThreads = 256;
    auto* in = static_cast<int*>(device.allocate(sizeof(int) * kBlocks * kThreads));
    auto* out = static_cast<int*>(device.allocate(sizeof(int) * kBlocks));
    for (int i = 0; i < kBlocks * kThreads; ++i) in[i] = i;
    for (int launch = 0; launch < 3; ++launch) {
        std::fill_n(out, kBlocks, 0);
        dev::launch<SumKernel>({.num_blocks = kBlocks, .num_threads = kThreads, .name = "sum"}, stream,
                               {.in = in, .out = out, .rounds = 2});
        device.synchronize_stream(stream);
        for (int b = 0; b < kBlocks; ++b) CHECK(out[b] == kThreads * (kThreads - 1) / 2 + b * kThreads * kThreads);
    }
    device.destroy_stream(stream);
}

TEST_CASE("a frame of 2 KiB fits the default stack") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    auto stream = device.create_stream();
    auto* out = static_cast<int*>(device.allocate(sizeof(int) * 1024));
    dev::launch<DeepKernel>({.num_blocks = 1, .num_threads = 1024, .name = "deep"}, stream, {.out = out});
    device.synchronize_stream(stream);
    CHECK(out[77] == 77);
}

TEST_CASE("ranks of one process see each other's flags") {
    for (uint64_t seed : {0, 1, 2}) {
        simt::Scheduler scheduler({.seed = seed});
        simt::SimtDevice a(scheduler, 0), b(scheduler, 1);
        auto* flags = static_cast<uint32_t*>(a.allocate(12));
        auto stream_a = a.create_stream(), stream_b = b.create_stream();
        dev::launch<HandshakeKernel>({.name = "handshake"}, stream_a, {flags, flags + 1, 1'000'000'000, flags + 2});
        dev::launch<HandshakeKernel>({.name = "handshake"}, stream_b, {flags + 1, flags, 1'000'000'000, flags + 2});
        scheduler.run_until_idle();
        CHECK(flags[0] == 1);
        CHECK(flags[1] == 1);
        CHECK(flags[2] == 0);
    }
}

TEST_CASE("a peer that never comes is a deadlock with a report, or a timeout when the clock may advance") {
    {
        simt::Scheduler scheduler;
        simt::SimtDevice device(scheduler, 3);
        auto* flags = static_cast<uint32_t*>(device.allocate(12));
        auto stream = device.create_stream();
        dev::launch<HandshakeKernel>({.name = "lonely"}, stream, {flags, flags + 1, 1'000'000'000, flags + 2});
        std::string report;
        try {
            device.synchronize_stream(stream);
        } catch (const simt::DeadlockError& error) {
            report = error.what();
        }
        CHECK(
            report.find("device 3 kernel \"lonely\" block 0 warp 0 lanes 0x1: polls device 3 memory #0 + 0, sees 0") !=
            std::string::npos);
        device.synchronize_stream(stream);  // usable again
    }
    simt::Scheduler scheduler({.idle = simt::IdlePolicy::kAdvanceClock});
    simt::SimtDevice device(scheduler, 0);
    auto* flags = static_cast<uint32_t*>(device.allocate(12));
    auto stream = device.create_stream();
    dev::launch<HandshakeKernel>({.name = "lonely"}, stream, {flags, flags + 1, 100'000'000'000, flags + 2});
    device.synchronize_stream(stream);
    CHECK(flags[2] == 1);
}

TEST_CASE("a mismatched collective is an exception at the next blocking call") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    auto stream = device.create_stream();
    dev::launch<MismatchKernel>({.name = "mismatch"}, stream, {});
    CHECK_THROWS_AS(device.synchronize_stream(stream), simt::KernelError);
    device.synchronize_stream(stream);
}

TEST_CASE("the process-wide device runs kernels on its own thread") {
    auto device = simt::make_cpu_device();
    auto stream = device->create_stream();
    auto* in = static_cast<int*>(device->allocate(sizeof(int) * 64));
    auto* out = static_cast<int*>(device->allocate(sizeof(int) * 2));
    std::fill_n(in, 64, 1);
    dev::launch<SumKernel>({.num_blocks = 2, .num_threads = 32, .name = "sum"}, stream, {in, out, 1});
    auto event = device->create_event();
    device->record_event(event, stream);
    device->synchronize_event(event);
    CHECK(out[1] == 32);
    dev::launch<MismatchKernel>({.name = "mismatch"}, stream, {});
    CHECK_THROWS_AS(device->synchronize_stream(stream), simt::KernelError);
    device->destroy_event(event);
    device->destroy_stream(stream);
    device->free(in);
    device->free(out);
}

// Not a test: prints what docs/executor.md quotes. Run with --no-skip -tc=figures.
TEST_CASE("figures" * doctest::skip()) {
    simt::Scheduler scheduler;
    constexpr int kMaxBlocks = 24, kMaxThreads = 1024;
    std::vector<std::unique_ptr<simt::SimtDevice>> devices;
    std::vector<dev::Stream> streams;
    for (int d = 0; d < 4; ++d) {
        devices.push_back(std::make_unique<simt::SimtDevice>(scheduler, d));
        streams.push_back(devices.back()->create_stream());
    }
    auto* in = static_cast<int*>(devices[0]->allocate(sizeof(int) * kMaxBlocks * kMaxThreads));
    auto* out = static_cast<int*>(devices[0]->allocate(sizeof(int) * 4 * kMaxBlocks));
    const auto run = [&](int num_blocks, int num_threads, int rounds) {
        const auto start = std::chrono::steady_clock::now();
        for (size_t rank = 0; rank < streams.size(); ++rank) {
            dev::launch<SumKernel>({.num_blocks = num_blocks, .num_threads = num_threads, .name = "sum"}, streams[rank],
                                   {in, out + rank * kMaxBlocks, rounds});
        }
        scheduler.run_until_idle();
        const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
        const double per_call = elapsed.count() * 1e6 / (4.0 * num_blocks * num_threads * std::max(rounds, 1));
        MESSAGE("4 ranks x " << num_blocks << " blocks x " << num_threads << " threads, " << rounds << " syncwarps: "
                             << elapsed.count() << " ms, " << per_call << " ns per thread and syncwarp");
    };
    for (int repeat = 0; repeat < 3; ++repeat) run(8, 256, 0);
    for (int repeat = 0; repeat < 3; ++repeat) run(8, 256, 300);
    for (int repeat = 0; repeat < 2; ++repeat) run(kMaxBlocks, kMaxThreads, 0);
}
