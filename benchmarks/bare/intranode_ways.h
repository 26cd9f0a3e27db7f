// What the bare kernels in this folder have in common: two GPUs, their memory, loads and stores, and the clock.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"

constexpr int kTokens = 4096;
constexpr int kMaxRow = 14336;

struct Args {
    const uint8_t* x;        // own rows
    const uint8_t* peer_x;   // the peer's (pull)
    uint8_t* own;            // our part of our output
    uint8_t* remote;         // our part of the peer's output, or our slots there
    const uint8_t* arrived;  // slots that the peer fills here
    uint8_t* result;
    uint32_t* flags;       // of `arrived`
    uint32_t* peer_flags;  // of `remote`
    uint32_t epoch;
    int row;    // bytes
    int split;  // of the variant: warps, or blocks
};

struct alignas(16) Vec {
    uint32_t w[4];
};

__device__ Vec load(const uint8_t* p) {
    Vec v;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p));
    return v;
}
__device__ Vec load_smem(uint32_t p) {
    Vec v;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "r"(p));
    return v;
}
__device__ void store(uint8_t* p, const Vec& v) {
    asm volatile("st.global.L1::no_allocate.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]),
                 "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}
__device__ uint32_t smem(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A lane's part of U x 512 bytes.
template <int U> __device__ void load(Vec (&held)[U], const uint8_t* from) {
#pragma unroll
    for (int i = 0; i < U; ++i) held[i] = load(from + i * 512);
}
template <int U> __device__ void store(uint8_t* to, const Vec (&held)[U]) {
#pragma unroll
    for (int i = 0; i < U; ++i) store(to + i * 512, held[i]);
}

// Piece `i` of U x 512 bytes of a row of our input, to one place or two.
template <int U> __device__ void move(const uint8_t* from, uint8_t* first, uint8_t* second, int row, int lane) {
    for (int base = lane * 16; base < row; base += U * 512) {
        Vec held[U];
        load(held, from + base);
        store(first + base, held);
        if (second != nullptr) store(second + base, held);
    }
}

// One lane, of `count` stages.
__device__ void init_bars(uint64_t* bars, int count) {
    for (int s = 0; s < count; ++s)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem(bars + s)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* bar) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(bar)), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem(to)),
        "l"(from), "r"(bytes), "r"(smem(bar))
        : "memory");
}
__device__ void bulk_store(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(smem(from)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int N> __device__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N> __device__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }
__device__ void bar_wait(uint64_t* bar, uint32_t parity) {
    uint32_t done = 0;
    while (done == 0)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0,1,0,p;\n}"
                     : "=r"(done)
                     : "r"(smem(bar)), "r"(parity)
                     : "memory");
}

__device__ float low(uint32_t w) { return __uint_as_float(w << 16); }
__device__ float high(uint32_t w) { return __uint_as_float(w & 0xffff0000u); }
__device__ uint32_t pack(float l, float h) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(h), "f"(l));
    return pair;
}
__device__ Vec sum(const Vec& a, const Vec& b) {
    Vec out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.w[i] = pack(low(a.w[i]) + low(b.w[i]), high(a.w[i]) + high(b.w[i]));
    return out;
}

template <int U> __device__ void reduce_row(const uint8_t* far, const uint8_t* near, uint8_t* to, int row, int lane) {
    for (int base = lane * 16; base < row; base += U * 512) {
        Vec f[U], n[U];
        load(f, far + base);
        load(n, near + base);
#pragma unroll
        for (int i = 0; i < U; ++i) store(to + base + i * 512, sum(f[i], n[i]));
    }
}

__device__ void publish(uint32_t* flag, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ uint32_t look(const uint32_t* flag) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

// Of `total`, those that are first, first + step, ...
__device__ int count_of(int total, int first, int step) {
    return first < total ? (total - first + step - 1) / step : 0;
}

// The rows first, first + step, ...: a warp's, or those of one lane that issues bulk copies.
struct Rows {
    int first, step;

    __device__ int count() const { return count_of(kTokens, first, step); }
    __device__ int token(int item) const { return first + item * step; }
    // One lane: sets the flags of items up to `end`, of which `told` have been set.
    __device__ void tell(const Args& a, int& told, int end) const {
        for (; told < end; ++told) publish(a.peer_flags + token(told), a.epoch);
    }
};

// Of `warp`, where `num_warps` of each block share them.
__device__ Rows rows_of_grid(int warp, int num_warps) {
    return {static_cast<int>(warp * gridDim.x + blockIdx.x), static_cast<int>(num_warps * gridDim.x)};
}
// Of this warp, where those below `split` of each block have one role, the others another one.
__device__ Rows rows_by_warp(const Args& a, int num_warps) {
    const int warp = threadIdx.x / 32;
    return warp < a.split ? rows_of_grid(warp, a.split) : rows_of_grid(warp - a.split, num_warps - a.split);
}
// The same where blocks below `split` have one role; `num_warps` of a block share the rows of this warp's.
__device__ Rows rows_by_block(const Args& a, int num_warps) {
    const int warp = threadIdx.x / 32;
    const bool is_first = blockIdx.x < a.split;
    const int blocks = is_first ? a.split : gridDim.x - a.split;
    const int block = is_first ? blockIdx.x : blockIdx.x - a.split;
    return {warp * blocks + block, num_warps * blocks};
}

template <int U, int T> __global__ void __launch_bounds__(T) pull(Args a) {
    const int lane = threadIdx.x % 32;
    const Rows rows = rows_of_grid(threadIdx.x / 32, T / 32);
    for (int t = rows.first; t < kTokens; t += rows.step) {
        const int64_t at = static_cast<int64_t>(t) * a.row;
        reduce_row<U>(a.peer_x + at, a.x + at, a.result + at, a.row, lane);
    }
}

// A whole warp: until the peer's row `t` is here.
__device__ void await_row(const Args& a, int t, int lane) {
    if (lane == 0)
        while (look(a.flags + t) < a.epoch) __nanosleep(20);
    __syncwarp();
}

// A warp: rows of our input to `remote` by ordinary loads and stores, the flags of B rows together.
template <int U, int B = 1> __device__ void send_plain(const Args& a, const Rows& rows, int lane) {
    for (int t = rows.first; t < kTokens; t += rows.step * B) {
#pragma unroll 1
        for (int b = 0; b < B && t + b * rows.step < kTokens; ++b) {
            const int64_t at = static_cast<int64_t>(t + b * rows.step) * a.row;
            move<U>(a.x + at, a.remote + at, nullptr, a.row, lane);
        }
        __syncwarp();
        const int mine = t + lane * rows.step;
        if (lane < B && mine < kTokens) publish(a.peer_flags + mine, a.epoch);
    }
}

// A warp: sums what has come into slots with our own rows.
template <int U> __device__ void reduce_slots(const Args& a, const Rows& rows, int lane) {
    for (int t = rows.first; t < kTokens; t += rows.step) {
        await_row(a, t, lane);
        const int64_t at = static_cast<int64_t>(t) * a.row;
        reduce_row<U>(a.arrived + at, a.x + at, a.result + at, a.row, lane);
    }
}

// One lane: rows of our input into S stages of a whole row, kAhead of them before their turn; `put(item, at, stage)` issues the
// bulk copy out of a stage to where the row begins.
template <int S, int kAhead, class Put>
__device__ void through_stages(const Args& a, uint8_t* stages, const Rows& rows, const Put& put) {
    auto* bars = reinterpret_cast<uint64_t*>(stages + S * a.row);
    init_bars(bars, S);
    const int count = rows.count();
    auto at = [&](int item) { return static_cast<int64_t>(rows.token(item)) * a.row; };
    auto fill = [&](int item) { bulk_load(stages + item % S * a.row, a.x + at(item), a.row, bars + item % S); };
    for (int item = 0; item < kAhead && item < count; ++item) fill(item);
    for (int item = 0; item < count; ++item) {
        if (item + kAhead < count) {
            bulk_wait_read<(S - kAhead > 1 ? S - kAhead - 1 : 0)>();
            fill(item + kAhead);
        }
        bar_wait(bars + item % S, item / S & 1);
        put(item, at(item), stages + item % S * a.row);
    }
    bulk_wait<0>();
}

// One lane: rows of our input to the rows at `to`, flags B at a time.
template <int S, int B> __device__ void send_bulk(const Args& a, uint8_t* stages, const Rows& rows, uint8_t* to) {
    int told = 0;
    auto put = [&](int item, int64_t at, const uint8_t* stage) {
        bulk_store(to + at, stage, a.row);
        if (item - told < B) return;
        bulk_wait<1>();
        rows.tell(a, told, item);
    };
    through_stages<S, (S > 2 ? S - 2 : 1)>(a, stages, rows, put);
    rows.tell(a, told, rows.count());
}

// The stages of a warp, of `stages` whole rows each.
__device__ uint8_t* stages_of(uint8_t* memory, int warp, int stages, int row) {
    return memory + warp * (stages * row + 128);
}

// A warp: the same to `remote`. kSend 0: by ordinary loads and stores, U vectors a lane; else by bulk copies through so many stages.
template <int kSend, int U, int B>
__device__ void send(const Args& a, uint8_t* memory, int warp, const Rows& rows, int lane) {
    if constexpr (kSend == 0)
        send_plain<U, B>(a, rows, lane);
    else if (lane == 0)
        send_bulk<kSend, B>(a, stages_of(memory, warp, kSend, a.row), rows, a.remote);
}

// -- Running them --------------------------------------------------------------------------------------------------------

struct Gpu {
    uint8_t *x, *out, *slots, *result;
    uint32_t* flags;
    cudaStream_t stream;
    cudaEvent_t begin, end;
};
static Gpu gpus[2];
static uint32_t epoch = 0;

static Args args_of(int gpu, int row, int split) {
    const Gpu &mine = gpus[gpu], &peer = gpus[1 - gpu];
    const int64_t part = static_cast<int64_t>(kTokens) * row;
    return {mine.x,
            peer.x,
            mine.out + gpu * part,
            peer.out + gpu * part,
            mine.slots,
            mine.result,
            mine.flags,
            peer.flags,
            epoch,
            row,
            split};
}

// Waits for both; how long the slower one took from `begin` to `end`.
static float slowest_us() {
    float slowest_ms = 0;
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaSetDevice(gpu));
        CHECK(cudaStreamSynchronize(gpus[gpu].stream));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, gpus[gpu].begin, gpus[gpu].end));
        slowest_ms = ms > slowest_ms ? ms : slowest_ms;
    }
    return slowest_ms * 1000;
}

// What of the peer is written to.
enum class To { kOutput, kSlots, kResult };

template <class Kernel>
static void measure(const char* name, Kernel kernel, int threads, int shared_bytes, int row, int split, To to,
                    std::vector<int> sms = {8, 12, 14, 16, 20, 24}) {
    constexpr int kLaunches = 12;
    std::printf("%-44s", name);
    for (int num_sms : sms) {
        for (int gpu = 0; gpu < 2; ++gpu) {
            CHECK(cudaSetDevice(gpu));
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        }
        for (int i = -2; i < kLaunches; ++i) {
            ++epoch;
            for (int gpu = 0; gpu < 2; ++gpu) {
                CHECK(cudaSetDevice(gpu));
                if (i == 0) CHECK(cudaEventRecord(gpus[gpu].begin, gpus[gpu].stream));
                Args args = args_of(gpu, row, split < 1000 ? split : split - 2000 + num_sms);
                if (to == To::kSlots) args.remote = gpus[1 - gpu].slots;
                if (to == To::kResult) args.remote = gpus[1 - gpu].result;
                kernel<<<num_sms, threads, shared_bytes, gpus[gpu].stream>>>(args);
                CHECK(cudaGetLastError());
                if (i == kLaunches - 1) CHECK(cudaEventRecord(gpus[gpu].end, gpus[gpu].stream));
            }
        }
        std::printf(" %7.1f", slowest_us() / kLaunches);
        std::fflush(stdout);
    }
    std::printf("\n");
}

static void check_rows(const char* what, const uint8_t* found, const uint8_t* expected, size_t bytes) {
    std::vector<uint8_t> a(bytes), b(bytes);
    CHECK(cudaMemcpy(a.data(), found, bytes, cudaMemcpyDefault));
    CHECK(cudaMemcpy(b.data(), expected, bytes, cudaMemcpyDefault));
    if (std::memcmp(a.data(), b.data(), bytes) != 0) std::printf("WRONG: %s\n", what);
}

// What other ways to combine have to give, on GPU 0.
static std::vector<uint8_t> sums_by_pull(const std::vector<int>& sms) {
    measure("pull, 16 warps x 7", pull<7, 512>, 512, 0, kMaxRow, 0, To::kOutput, sms);
    std::vector<uint8_t> sums(static_cast<size_t>(kTokens) * kMaxRow);
    CHECK(cudaMemcpy(sums.data(), gpus[0].result, sums.size(), cudaMemcpyDefault));
    return sums;
}

static void set_up() {
    const size_t part = static_cast<size_t>(kTokens) * kMaxRow;
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaSetDevice(gpu));
        CHECK(cudaDeviceEnablePeerAccess(1 - gpu, 0));
        Gpu& g = gpus[gpu];
        CHECK(cudaMalloc(&g.x, part));
        CHECK(cudaMalloc(&g.out, 2 * part));
        CHECK(cudaMalloc(&g.slots, part));
        CHECK(cudaMalloc(&g.result, part));
        CHECK(cudaMalloc(&g.flags, (kTokens + 1) * 4));
        CHECK(cudaMemset(g.flags, 0, (kTokens + 1) * 4));
        std::vector<uint16_t> values(part / 2);
        for (size_t i = 0; i < values.size(); ++i)
            values[i] = static_cast<uint16_t>(0x3c00 + (i * 2654435761u >> (13 + gpu)) % 1024);
        CHECK(cudaMemcpy(g.x, values.data(), part, cudaMemcpyHostToDevice));
        CHECK(cudaStreamCreateWithFlags(&g.stream, cudaStreamNonBlocking));
        CHECK(cudaEventCreate(&g.begin));
        CHECK(cudaEventCreate(&g.end));
    }
    CHECK(cudaDeviceSynchronize());
}
