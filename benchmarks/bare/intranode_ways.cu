// Bare kernels: ways to move the bytes of dispatch and combine between two GPUs, without a protocol around them.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 -o ways benchmarks/bare/intranode_ways.cu && ./ways [dispatch | combine | blocks | add | roles]
//
// Two GPUs, both directions at once, 4096 tokens that each go to both ranks, rows of 14336 and 7168 bytes. Prints
// microseconds a launch (of 12 in a row, the slower GPU). What came out: docs/performance/intranode.md, from step 19.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define CHECK(call)                                                                    \
    do {                                                                               \
        const cudaError_t error = (call);                                              \
        if (error != cudaSuccess) {                                                    \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error)); \
            std::exit(1);                                                              \
        }                                                                              \
    } while (0)

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

__device__ int warp_of_grid(int warp) { return warp * gridDim.x + blockIdx.x; }

// Piece `i` of U x 512 bytes of a row of our input, to one place or two.
template <int U> __device__ void move(const uint8_t* from, uint8_t* first, uint8_t* second, int row, int lane) {
    for (int base = lane * 16; base < row; base += U * 512) {
        Vec held[U];
#pragma unroll
        for (int i = 0; i < U; ++i) held[i] = load(from + base + i * 512);
#pragma unroll
        for (int i = 0; i < U; ++i) store(first + base + i * 512, held[i]);
        if (second == nullptr) continue;
#pragma unroll
        for (int i = 0; i < U; ++i) store(second + base + i * 512, held[i]);
    }
}

// -- Dispatch ------------------------------------------------------------------------------------------------------------

// kWay 0: own row first; 1: remote row first; 2: all remote rows, then all own ones; 3: warps below `split` of each block
// move remote rows, the others own ones; 4: blocks below `split` remote, the others own; 5: remote rows alone;
// 6: as 3, but warps that are done with own rows help with the remote ones, which are dealt by a counter of the block.
template <int kWay, int U> __global__ void __launch_bounds__(768) push(Args a) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int num_warps = blockDim.x / 32;
    const int all = num_warps * gridDim.x;
    auto go = [&](int first, int step, bool is_own, bool is_remote) {
        for (int t = first; t < kTokens; t += step) {
            const uint8_t* from = a.x + static_cast<int64_t>(t) * a.row;
            uint8_t* own = a.own + static_cast<int64_t>(t) * a.row;
            uint8_t* remote = a.remote + static_cast<int64_t>(t) * a.row;
            if (is_own && is_remote)
                kWay == 1 ? move<U>(from, remote, own, a.row, lane) : move<U>(from, own, remote, a.row, lane);
            else
                move<U>(from, is_own ? own : remote, nullptr, a.row, lane);
        }
    };
    if (kWay == 0 || kWay == 1) go(warp_of_grid(warp), all, true, true);
    if (kWay == 2) {
        go(warp_of_grid(warp), all, false, true);
        go(warp_of_grid(warp), all, true, false);
    }
    if (kWay == 3) {
        if (warp < a.split)
            go(warp_of_grid(warp), a.split * gridDim.x, false, true);
        else
            go(warp_of_grid(warp - a.split), (num_warps - a.split) * gridDim.x, true, false);
    }
    if (kWay == 4) {
        const bool is_remote = blockIdx.x < a.split;
        const int blocks = is_remote ? a.split : gridDim.x - a.split;
        const int block = is_remote ? blockIdx.x : blockIdx.x - a.split;
        go(warp * blocks + block, num_warps * blocks, !is_remote, is_remote);
    }
    if (kWay == 5) go(warp_of_grid(warp), all, false, true);
    if (kWay == 6) {
        __shared__ int next[2];
        if (threadIdx.x < 2) next[threadIdx.x] = 0;
        __syncthreads();
        for (int kind = warp < a.split ? 0 : 1, done = 0; done < 2;) {
            int i = 0;
            if (lane == 0) i = atomicAdd(&next[kind], 1);
            i = __shfl_sync(~0u, i, 0);
            const int t = i * gridDim.x + blockIdx.x;
            if (t >= kTokens) {
                kind ^= 1;
                ++done;
                continue;
            }
            const int64_t at = static_cast<int64_t>(t) * a.row;
            move<U>(a.x + at, (kind == 0 ? a.remote : a.own) + at, nullptr, a.row, lane);
        }
    }
}

__device__ void bar_init(uint64_t* bar) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem(bar)) : "memory");
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

// A row comes by bulk load; one copy of it goes by bulk store, the other by ordinary stores out of shared memory.
// kOwnByBulk: the own row is the one that goes by bulk store. kBoth: both do.
enum class Bulk { kOwn, kRemote, kBoth };
template <Bulk kWhat, int P, int S> __global__ void __launch_bounds__(768) push_bulk(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    uint8_t* stages = memory + warp * (S * P + 128);
    auto* bars = reinterpret_cast<uint64_t*>(stages + S * P);
    if (lane == 0) {
        for (int s = 0; s < S; ++s) bar_init(bars + s);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    const int pieces = kTokens * (a.row / P);
    const int first = warp_of_grid(warp);
    const int step = gridDim.x * (blockDim.x / 32);
    const int count = first < pieces ? (pieces - first + step - 1) / step : 0;
    auto at = [&](int item) { return static_cast<int64_t>(first + item * step) * P; };
    for (int item = 0; item < S - 1 && item < count; ++item)
        if (lane == 0) bulk_load(stages + item * P, a.x + at(item), P, bars + item);
    for (int item = 0; item < count; ++item) {
        const int s = item % S;
        if (item + S - 1 < count && lane == 0) {
            bulk_wait_read<0>();  // of the item before, whose stage this is
            bulk_load(stages + (item + S - 1) % S * P, a.x + at(item + S - 1), P, bars + (item + S - 1) % S);
        }
        bar_wait(bars + s, item / S & 1);
        uint8_t* stage = stages + s * P;
        if (lane == 0) {
            if (kWhat != Bulk::kRemote) bulk_store(a.own + at(item), stage, P);
            if (kWhat != Bulk::kOwn) bulk_store(a.remote + at(item), stage, P);
        }
        if (kWhat != Bulk::kBoth) {
            uint8_t* to = (kWhat == Bulk::kOwn ? a.remote : a.own) + at(item);
            for (int base = lane * 16; base < P; base += 7 * 512) {
                Vec held[7];
#pragma unroll
                for (int i = 0; i < 7; ++i) held[i] = load_smem(smem(stage) + base + i * 512);
#pragma unroll
                for (int i = 0; i < 7; ++i) store(to + base + i * 512, held[i]);
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        __syncwarp();
    }
    bulk_wait<0>();
}

// -- Combine -------------------------------------------------------------------------------------------------------------

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
#pragma unroll
        for (int i = 0; i < U; ++i) f[i] = load(far + base + i * 512);
#pragma unroll
        for (int i = 0; i < U; ++i) n[i] = load(near + base + i * 512);
#pragma unroll
        for (int i = 0; i < U; ++i) store(to + base + i * 512, sum(f[i], n[i]));
    }
}

template <int U, int T> __global__ void __launch_bounds__(T) pull(Args a) {
    const int lane = threadIdx.x % 32;
    for (int t = warp_of_grid(threadIdx.x / 32); t < kTokens; t += T / 32 * gridDim.x) {
        const int64_t at = static_cast<int64_t>(t) * a.row;
        reduce_row<U>(a.peer_x + at, a.x + at, a.result + at, a.row, lane);
    }
}

// The far part of the next piece is on its way while this one is summed.
template <int U, int T> __global__ void __launch_bounds__(T) pull_ahead(Args a) {
    const int lane = threadIdx.x % 32;
    const int per_row = a.row / (U * 512);
    const int first = warp_of_grid(threadIdx.x / 32);
    const int step = T / 32 * gridDim.x;
    const int pieces = first < kTokens ? (kTokens - first + step - 1) / step * per_row : 0;
    auto at = [&](int piece) {
        return static_cast<int64_t>(first + piece / per_row * step) * a.row + piece % per_row * (U * 512) + lane * 16;
    };
    Vec f[U];
    if (pieces > 0)
#pragma unroll
        for (int i = 0; i < U; ++i) f[i] = load(a.peer_x + at(0) + i * 512);
    for (int piece = 0; piece < pieces; ++piece) {
        Vec n[U], next[U];
#pragma unroll
        for (int i = 0; i < U; ++i) n[i] = load(a.x + at(piece) + i * 512);
        if (piece + 1 < pieces)
#pragma unroll
            for (int i = 0; i < U; ++i) next[i] = load(a.peer_x + at(piece + 1) + i * 512);
#pragma unroll
        for (int i = 0; i < U; ++i) store(a.result + at(piece) + i * 512, sum(f[i], n[i]));
#pragma unroll
        for (int i = 0; i < U; ++i) f[i] = next[i];
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

// One lane: rows first, first + step, ... of our input to `remote`, S stages of a whole row, flags B at a time.
template <int S, int B> __device__ void send_bulk(const Args& a, uint8_t* memory, int warp, int first, int step) {
    uint8_t* stages = memory + warp * (S * a.row + 128);
    auto* bars = reinterpret_cast<uint64_t*>(stages + S * a.row);
    for (int s = 0; s < S; ++s) bar_init(bars + s);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const int count = first < kTokens ? (kTokens - first + step - 1) / step : 0;
    auto at = [&](int item) { return static_cast<int64_t>(first + item * step) * a.row; };
    constexpr int kAhead = S > 2 ? S - 2 : 1;
    int told = 0;  // items whose flag is set
    for (int item = 0; item < kAhead && item < count; ++item)
        bulk_load(stages + item * a.row, a.x + at(item), a.row, bars + item);
    for (int item = 0; item < count; ++item) {
        const int s = item % S;
        if (item + kAhead < count) {
            bulk_wait_read<(S > 2 ? 1 : 0)>();
            bulk_load(stages + (item + kAhead) % S * a.row, a.x + at(item + kAhead), a.row, bars + (item + kAhead) % S);
        }
        bar_wait(bars + s, item / S & 1);
        bulk_store(a.remote + at(item), stages + s * a.row, a.row);
        if (item - told >= B) {
            bulk_wait<1>();
            for (; told < item; ++told) publish(a.peer_flags + first + told * step, a.epoch);
        }
    }
    bulk_wait<0>();
    for (; told < count; ++told) publish(a.peer_flags + first + told * step, a.epoch);
}

// Slots that hold all rows: warps below `split` push rows there, with a flag for each; the others sum what has come.
// kSend 0: ordinary loads and stores; else bulk copies, kSend stages of a whole row for each warp.
template <int kSend, int U, int T, int SU = 7, int B = 1> __global__ void __launch_bounds__(T) through_slots(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    if (warp >= a.split) {
        const int step = (T / 32 - a.split) * gridDim.x;
        for (int t = warp_of_grid(warp - a.split); t < kTokens; t += step) {
            if (lane == 0)
                while (look(a.flags + t) < a.epoch) __nanosleep(20);
            __syncwarp();
            const int64_t at = static_cast<int64_t>(t) * a.row;
            reduce_row<U>(a.arrived + at, a.x + at, a.result + at, a.row, lane);
        }
        return;
    }
    const int first = warp_of_grid(warp);
    const int step = a.split * gridDim.x;
    if (kSend == 0) {
        for (int t = first; t < kTokens; t += step * B) {
#pragma unroll 1
            for (int b = 0; b < B && t + b * step < kTokens; ++b) {
                const int64_t at = static_cast<int64_t>(t + b * step) * a.row;
                move<SU>(a.x + at, a.remote + at, nullptr, a.row, lane);
            }
            __syncwarp();
            if (lane < B && t + lane * step < kTokens) publish(a.peer_flags + t + lane * step, a.epoch);
        }
        return;
    }
    if (lane == 0) send_bulk<kSend == 0 ? 1 : kSend, B>(a, memory, warp, first, step);
}

// Slots for all rows, roles by block: blocks below `split` push rows, 24 warps with ordinary loads and stores (kSend 0) or
// `W` warps with bulk copies of kSend stages each; the other blocks sum what has come. `R` warps of each reduce.
template <int kSend, int W, int U, int R, int B = 1> __global__ void __launch_bounds__(768) by_block(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    if (blockIdx.x >= a.split) {
        const int blocks = gridDim.x - a.split;
        if (warp >= R) return;
        for (int t = warp * blocks + blockIdx.x - a.split; t < kTokens; t += R * blocks) {
            if (lane == 0)
                while (look(a.flags + t) < a.epoch) __nanosleep(20);
            __syncwarp();
            const int64_t at = static_cast<int64_t>(t) * a.row;
            reduce_row<U>(a.arrived + at, a.x + at, a.result + at, a.row, lane);
        }
        return;
    }
    if (warp >= W) return;
    if (kSend == 0) {
        for (int t = warp * a.split + blockIdx.x; t < kTokens; t += W * a.split) {
            const int64_t at = static_cast<int64_t>(t) * a.row;
            move<7>(a.x + at, a.remote + at, nullptr, a.row, lane);
            __syncwarp();
            if (lane == 0) publish(a.peer_flags + t, a.epoch);
        }
        return;
    }
    if (lane == 0) send_bulk<kSend == 0 ? 1 : kSend, B>(a, memory, warp, warp * a.split + blockIdx.x, W * a.split);
}

// The peer's rows come straight into our result, and our own rows are added there, by the L2: nothing of what has come is
// loaded. Of two rows of BF16 the sum has the bits of one in FP32 that is rounded afterwards.
__device__ void add(uint8_t* p, const Vec& v) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]),
                 "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}
__device__ void bulk_add(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(to),
                 "r"(smem(from)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// No row of this launch comes before the peer has ended the one before.
__device__ void meet(const Args& a) {
    if (threadIdx.x == 0) {
        if (blockIdx.x == 0) publish(a.peer_flags + kTokens, a.epoch);
        while (look(a.flags + kTokens) < a.epoch) {
        }
    }
    __syncthreads();
}

// Warps below `split` of each block send (kSend 0: ordinary loads and stores; else bulk copies with so many stages), the others
// add their own rows: kAdd 0: U vectors a lane by ordinary loads and vector reductions; else bulk copies, so many stages.
template <int kSend, int kAdd, int U, int T, int B = 1> __global__ void __launch_bounds__(T) push_add(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    meet(a);
    if (warp < a.split) {
        const int first = warp_of_grid(warp);
        const int step = a.split * gridDim.x;
        if (kSend > 0) {
            if (lane == 0) send_bulk<kSend == 0 ? 1 : kSend, B>(a, memory, warp, first, step);
            return;
        }
        for (int t = first; t < kTokens; t += step) {
            const int64_t at = static_cast<int64_t>(t) * a.row;
            move<7>(a.x + at, a.remote + at, nullptr, a.row, lane);
            __syncwarp();
            if (lane == 0) publish(a.peer_flags + t, a.epoch);
        }
        return;
    }
    const int first = warp_of_grid(warp - a.split);
    const int step = (T / 32 - a.split) * gridDim.x;
    if (kAdd == 0) {
        for (int t = first; t < kTokens; t += step) {
            const int64_t at = static_cast<int64_t>(t) * a.row;
            bool is_here = false;
            for (int base = lane * 16; base < a.row; base += U * 512) {
                Vec held[U];
#pragma unroll
                for (int i = 0; i < U; ++i) held[i] = load(a.x + at + base + i * 512);
                if (!is_here) {
                    if (lane == 0)
                        while (look(a.flags + t) < a.epoch) __nanosleep(20);
                    __syncwarp();
                    is_here = true;
                }
#pragma unroll
                for (int i = 0; i < U; ++i) add(a.result + at + base + i * 512, held[i]);
            }
        }
        return;
    }
    constexpr int S = kAdd == 0 ? 1 : kAdd;
    uint8_t* stages = memory + a.split * (kSend == 0 ? 0 : kSend * a.row + 128) + (warp - a.split) * (S * a.row + 128);
    auto* bars = reinterpret_cast<uint64_t*>(stages + S * a.row);
    if (lane != 0) return;
    for (int s = 0; s < S; ++s) bar_init(bars + s);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const int count = first < kTokens ? (kTokens - first + step - 1) / step : 0;
    auto at = [&](int item) { return static_cast<int64_t>(first + item * step) * a.row; };
    for (int item = 0; item < S - 1 && item < count; ++item)
        bulk_load(stages + item * a.row, a.x + at(item), a.row, bars + item);
    for (int item = 0; item < count; ++item) {
        const int s = item % S;
        if (item + S - 1 < count) {
            bulk_wait_read<0>();
            bulk_load(stages + (item + S - 1) % S * a.row, a.x + at(item + S - 1), a.row, bars + (item + S - 1) % S);
        }
        while (look(a.flags + first + item * step) < a.epoch) __nanosleep(20);
        asm volatile("fence.proxy.async;" ::: "memory");
        bar_wait(bars + s, item / S & 1);
        bulk_add(a.result + at(item), stages + s * a.row, a.row);
    }
    bulk_wait<0>();
}

// The other way round: our own rows are stored into our result, and the peer adds its own over the link. Told row by row as well.
template <int S, int T> __global__ void __launch_bounds__(T) add_over_link(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    meet(a);
    if (lane != 0) return;
    const bool is_own = warp >= a.split;
    const int first = warp_of_grid(is_own ? warp - a.split : warp);
    const int step = (is_own ? T / 32 - a.split : a.split) * gridDim.x;
    uint8_t* stages = memory + warp * (S * a.row + 128);
    auto* bars = reinterpret_cast<uint64_t*>(stages + S * a.row);
    for (int s = 0; s < S; ++s) bar_init(bars + s);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const int count = first < kTokens ? (kTokens - first + step - 1) / step : 0;
    auto at = [&](int item) { return static_cast<int64_t>(first + item * step) * a.row; };
    int told = 0;
    for (int item = 0; item < S - 1 && item < count; ++item)
        bulk_load(stages + item * a.row, a.x + at(item), a.row, bars + item);
    for (int item = 0; item < count; ++item) {
        const int s = item % S;
        if (item + S - 1 < count) {
            bulk_wait_read<0>();
            bulk_load(stages + (item + S - 1) % S * a.row, a.x + at(item + S - 1), a.row, bars + (item + S - 1) % S);
        }
        if (!is_own) {
            while (look(a.flags + first + item * step) < a.epoch) __nanosleep(20);
            asm volatile("fence.proxy.async;" ::: "memory");
        }
        bar_wait(bars + s, item / S & 1);
        if (!is_own) {
            bulk_add(a.remote + at(item), stages + s * a.row, a.row);
            continue;
        }
        bulk_store(a.result + at(item), stages + s * a.row, a.row);
        if (item - told >= 2) {
            bulk_wait<1>();
            for (; told < item; ++told) publish(a.peer_flags + first + told * step, a.epoch);
        }
    }
    bulk_wait<0>();
    if (is_own)
        for (; told < count; ++told) publish(a.peer_flags + first + told * step, a.epoch);
}

// One warp of a block sets the flags that the others ask for, so that none of them waits for its stores.
struct Requests {
    uint32_t of_warp[32][2];
};
__device__ void ask(Requests& requests, int warp, int n, uint32_t value) {
    auto* word = static_cast<volatile uint32_t*>(&requests.of_warp[warp][n & 1]);
    while (*word != 0) {
    }
    asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(smem(&requests.of_warp[warp][n & 1])), "r"(value)
                 : "memory");
}
constexpr uint32_t kNoMore = 0x80000000u;
__device__ void serve(Requests& requests, uint32_t* flags, uint32_t epoch, int num_warps) {
    const int lane = threadIdx.x % 32;
    bool more = lane < num_warps;
    int n = 0;
    while (__any_sync(0xffffffffu, more)) {
        uint32_t request = 0;
        if (more) {
            const uint32_t word = smem(&requests.of_warp[lane][n & 1]);
            asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(request) : "r"(word) : "memory");
            if (request != 0) {
                requests.of_warp[lane][n & 1] = 0;
                ++n;
            }
        }
        if (request == kNoMore) more = false;
        const bool due = request != 0 && request != kNoMore;
        if (__any_sync(0xffffffffu, due) && due) publish(flags + request - 1, epoch);
    }
}

// Roles by block: blocks below `split` push rows by W warps, ordinary loads and stores; a warp more sets the flags where kAsks,
// else each warp sets those of B rows together. The other blocks, R warps each: kAdds: add their own rows to what has come into
// the result; else sum the slots. U vectors a lane.
template <bool kAdds, bool kAsks, int W, int R, int U, int B, int T>
__global__ void __launch_bounds__(T) roles(Args a) {
    __shared__ Requests requests;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    if (threadIdx.x < 64) requests.of_warp[threadIdx.x / 2][threadIdx.x % 2] = 0;
    __syncthreads();
    if (kAdds) meet(a);
    if (blockIdx.x < a.split) {
        if (warp == W && kAsks) serve(requests, a.peer_flags, a.epoch, W);
        if (warp >= W) return;
        int n = 0;
        for (int t = warp * a.split + blockIdx.x; t < kTokens; t += W * a.split * B) {
#pragma unroll 1
            for (int b = 0; b < B && t + b * W * a.split < kTokens; ++b) {
                const int64_t at = static_cast<int64_t>(t + b * W * a.split) * a.row;
                move<7>(a.x + at, a.remote + at, nullptr, a.row, lane);
            }
            __syncwarp();
            if (kAsks) {
                if (lane == 0) ask(requests, warp, n++, t + 1);
            } else if (lane < B && t + lane * W * a.split < kTokens) {
                publish(a.peer_flags + t + lane * W * a.split, a.epoch);
            }
        }
        if (kAsks && lane == 0) ask(requests, warp, n, kNoMore);
        return;
    }
    if (warp >= R) return;
    const int blocks = gridDim.x - a.split;
    for (int t = warp * blocks + blockIdx.x - a.split; t < kTokens; t += R * blocks) {
        const int64_t at = static_cast<int64_t>(t) * a.row;
        if (!kAdds) {
            if (lane == 0)
                while (look(a.flags + t) < a.epoch) __nanosleep(20);
            __syncwarp();
            reduce_row<U>(a.arrived + at, a.x + at, a.result + at, a.row, lane);
            continue;
        }
        bool is_here = false;
        for (int base = lane * 16; base < a.row; base += U * 512) {
            Vec held[U];
#pragma unroll
            for (int i = 0; i < U; ++i) held[i] = load(a.x + at + base + i * 512);
            if (!is_here) {
                if (lane == 0)
                    while (look(a.flags + t) < a.epoch) __nanosleep(20);
                __syncwarp();
                is_here = true;
            }
#pragma unroll
            for (int i = 0; i < U; ++i) add(a.result + at + base + i * 512, held[i]);
        }
    }
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
        float slowest = 0;
        for (int gpu = 0; gpu < 2; ++gpu) {
            CHECK(cudaSetDevice(gpu));
            CHECK(cudaStreamSynchronize(gpus[gpu].stream));
            float ms = 0;
            CHECK(cudaEventElapsedTime(&ms, gpus[gpu].begin, gpus[gpu].end));
            slowest = ms > slowest ? ms : slowest;
        }
        std::printf(" %7.1f", slowest * 1000 / kLaunches);
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

static void run_dispatch() {
    for (int row : {14336, 7168}) {
        std::printf("\ndispatch, rows of %d bytes                     8 SMs     12      14      16      20      24\n",
                    row);
        measure("own, remote (24 warps)", push<0, 7>, 768, 0, row, 0, To::kOutput);
        measure("remote, own", push<1, 7>, 768, 0, row, 0, To::kOutput);
        check_rows("push", gpus[1].out, gpus[0].x, static_cast<size_t>(kTokens) * row);
        measure("all remote, then all own", push<2, 7>, 768, 0, row, 0, To::kOutput);
        measure("remote alone (no own rows)", push<5, 7>, 768, 0, row, 0, To::kOutput);
        measure("warps: 16 remote, 8 own", push<3, 7>, 768, 0, row, 16, To::kOutput);
        measure("warps: 12 remote, 12 own", push<3, 7>, 768, 0, row, 12, To::kOutput);
        measure("warps: 20 remote, 4 own", push<3, 7>, 768, 0, row, 20, To::kOutput);
        measure("warps: 16 remote, 8 own, then help", push<6, 7>, 768, 0, row, 16, To::kOutput);
        measure("warps: 20 remote, 4 own, then help", push<6, 7>, 768, 0, row, 20, To::kOutput);
        measure("warps: 12 remote, 12 own, then help", push<6, 7>, 768, 0, row, 12, To::kOutput);
        measure("blocks: all but 4 remote", push<4, 7>, 768, 0, row, 2000 - 4, To::kOutput);
        measure("blocks: all but 6 remote", push<4, 7>, 768, 0, row, 2000 - 6, To::kOutput);
        const int small = 14 * (2 * 7168 + 128);
        measure("bulk load; own by bulk, 14 x 2 x 7168", push_bulk<Bulk::kOwn, 7168, 2>, 14 * 32, small, row, 0,
                To::kOutput);
        measure("bulk load; remote by bulk, 14 x 2 x 7168", push_bulk<Bulk::kRemote, 7168, 2>, 14 * 32, small, row, 0,
                To::kOutput);
        check_rows("bulk", gpus[1].out, gpus[0].x, static_cast<size_t>(kTokens) * row);
        measure("bulk load; both by bulk, 14 x 2 x 7168", push_bulk<Bulk::kBoth, 7168, 2>, 14 * 32, small, row, 0,
                To::kOutput);
        measure("bulk load; own by bulk, 20 x 3 x 3584", push_bulk<Bulk::kOwn, 3584, 3>, 20 * 32, 20 * (3 * 3584 + 128),
                row, 0, To::kOutput);
        measure("bulk load; remote by bulk, 20 x 3 x 3584", push_bulk<Bulk::kRemote, 3584, 3>, 20 * 32,
                20 * (3 * 3584 + 128), row, 0, To::kOutput);
    }
}

static void run_combine() {
    const int row = kMaxRow;
    std::printf("\ncombine, rows of 14336 bytes                     8 SMs     12      14      16      20      24\n");
    measure("pull, 24 warps x 4", pull<4, 768>, 768, 0, row, 0, To::kOutput);
    measure("pull, 16 warps x 7", pull<7, 512>, 512, 0, row, 0, To::kOutput);
    measure("pull, 24 warps x 7", pull<7, 768>, 768, 0, row, 0, To::kOutput);
    measure("pull, 12 warps x 7", pull<7, 384>, 384, 0, row, 0, To::kOutput);
    measure("pull, 32 warps x 4", pull<4, 1024>, 1024, 0, row, 0, To::kOutput);
    measure("pull ahead, 16 warps x 4", pull_ahead<4, 512>, 512, 0, row, 0, To::kOutput);
    measure("pull ahead, 12 warps x 7", pull_ahead<7, 384>, 384, 0, row, 0, To::kOutput);
    const int stage2 = 2 * row + 128;
    measure("slots, 4 bulk send x 2, 12 reduce x 7", through_slots<2, 7, 512>, 512, 4 * stage2, row, 4, To::kSlots);
    check_rows("slots", gpus[1].slots, gpus[0].x, static_cast<size_t>(kTokens) * row);
    measure("slots, 7 bulk send x 2 batch 2, 9 reduce x 7", through_slots<2, 7, 512, 7, 2>, 512, 7 * stage2, row, 7,
            To::kSlots);
    measure("slots, 7 bulk send x 2 batch 4, 9 reduce x 7", through_slots<2, 7, 512, 7, 4>, 512, 7 * stage2, row, 7,
            To::kSlots);
    measure("slots, 7 bulk send x 2 batch 4, 13 reduce x 7", through_slots<2, 7, 640, 7, 4>, 640, 7 * stage2, row, 7,
            To::kSlots);
    measure("slots, 12 plain send, 12 reduce x 4", through_slots<0, 4, 768>, 768, 0, row, 12, To::kSlots);
    measure("slots, 12 plain send batch 2, 12 reduce x 4", through_slots<0, 4, 768, 7, 2>, 768, 0, row, 12, To::kSlots);
    measure("slots, 8 plain send x 14, 8 reduce x 7", through_slots<0, 7, 512, 14, 1>, 512, 0, row, 8, To::kSlots);
    measure("slots, 10 plain send x 14, 10 reduce x 7", through_slots<0, 7, 640, 14, 1>, 640, 0, row, 10, To::kSlots);
    measure("slots, 10 plain send x 14 batch 2, 10 reduce x 7", through_slots<0, 7, 640, 14, 2>, 640, 0, row, 10,
            To::kSlots);
    measure("slots, 12 plain send x 14 batch 2, 8 reduce x 7", through_slots<0, 7, 640, 14, 2>, 640, 0, row, 12,
            To::kSlots);
    measure("slots, 8 plain send x 14 batch 2, 12 reduce x 7", through_slots<0, 7, 640, 14, 2>, 640, 0, row, 8,
            To::kSlots);
    measure("slots, 16 plain send batch 2, 16 reduce x 4", through_slots<0, 4, 1024, 7, 2>, 1024, 0, row, 16,
            To::kSlots);
}

// Beside others that are measured: what they have to give.
static std::vector<uint8_t> sums_by_pull(const std::vector<int>& sms) {
    measure("pull, 16 warps x 7", pull<7, 512>, 512, 0, kMaxRow, 0, To::kOutput, sms);
    std::vector<uint8_t> sums(static_cast<size_t>(kTokens) * kMaxRow);
    CHECK(cudaMemcpy(sums.data(), gpus[0].result, sums.size(), cudaMemcpyDefault));
    return sums;
}

static void run_blocks() {
    const std::vector<int> sms{14, 16, 18, 20, 24};
    std::printf("\nroles by block, rows of 14336 bytes             14 SMs     16      18      20      24\n");
    const std::vector<uint8_t> sums = sums_by_pull(sms);
    const auto measure_splits = [&](const char* what, auto kernel, int shared_bytes) {
        CHECK(cudaMemset(gpus[0].result, 0, sums.size()));
        for (int split : {5, 6, 7, 8, 9}) {
            char name[64];
            std::snprintf(name, sizeof name, "%d blocks send %s", split, what);
            measure(name, kernel, 768, shared_bytes, kMaxRow, split, To::kSlots, sms);
        }
        check_rows(what, gpus[0].result, sums.data(), sums.size());
    };
    const auto stages = [](int warps, int each) { return warps * (each * kMaxRow + 128); };
    measure_splits("plain 24; 20 reduce x 7", by_block<0, 24, 7, 20>, 0);
    measure_splits("plain 24; 24 reduce x 4", by_block<0, 24, 4, 24>, 0);
    measure_splits("bulk 4 x 2; 20 reduce x 7", by_block<2, 4, 7, 20, 2>, stages(4, 2));
    measure_splits("bulk 2 x 4; 20 reduce x 7", by_block<4, 2, 7, 20, 2>, stages(2, 4));
    measure_splits("bulk 7 x 2; 20 reduce x 7", by_block<2, 7, 7, 20, 2>, stages(7, 2));
    measure_splits("bulk 5 x 3; 20 reduce x 7", by_block<3, 5, 7, 20, 2>, stages(5, 3));
}

static void run_add() {
    const std::vector<int> sms{8, 12, 14, 16, 20, 24};
    std::printf("\nadded in the result, rows of 14336 bytes         8 SMs     12      14      16      20      24\n");
    const std::vector<uint8_t> sums = sums_by_pull(sms);
    // Bulk copies: (send warps x stages) + (warps that add x stages).
    const auto measure_add = [&](const char* name, auto kernel, int threads, int split, int stages) {
        CHECK(cudaMemset(gpus[0].result, 0, sums.size()));
        const int shared_bytes = stages == 0 ? 0 : stages * kMaxRow + 16 * 128;
        measure(name, kernel, threads, shared_bytes, kMaxRow, split, To::kResult, sms);
        check_rows(name, gpus[0].result, sums.data(), sums.size());
    };
    measure_add("bulk 3 x 2 + bulk 3 x 2", push_add<2, 2, 7, 192, 2>, 192, 3, 12);
    measure_add("bulk 4 x 2 + bulk 3 x 2", push_add<2, 2, 7, 224, 2>, 224, 4, 14);
    measure_add("bulk 3 x 2 + bulk 2 x 2", push_add<2, 2, 7, 160, 2>, 160, 3, 10);
    measure_add("bulk 2 x 3 + bulk 2 x 3", push_add<3, 3, 7, 128, 2>, 128, 2, 12);
    measure_add("bulk 2 x 4 + bulk 2 x 3", push_add<4, 3, 7, 128, 2>, 128, 2, 14);
    measure_add("bulk 4 x 2 + plain 12 x 7", push_add<2, 0, 7, 512, 2>, 512, 4, 8);
    measure_add("bulk 5 x 2 + plain 11 x 7", push_add<2, 0, 7, 512, 2>, 512, 5, 10);
    measure_add("bulk 7 x 2 + plain 9 x 7", push_add<2, 0, 7, 512, 2>, 512, 7, 14);
    measure_add("bulk 6 x 2 + plain 8 x 14", push_add<2, 0, 14, 448, 2>, 448, 6, 12);
    measure_add("plain 12 x 7 + plain 8 x 7", push_add<0, 0, 7, 640>, 640, 12, 0);
    measure_add("plain 14 x 7 + plain 10 x 7", push_add<0, 0, 7, 768>, 768, 14, 0);
    measure_add("plain 16 x 7 + plain 8 x 7", push_add<0, 0, 7, 768>, 768, 16, 0);
    measure_add("plain 12 x 7 + plain 8 x 14", push_add<0, 0, 14, 640>, 640, 12, 0);
    measure_add("plain 12 x 7 + bulk 4 x 3", push_add<0, 3, 7, 512>, 512, 12, 12);
    measure_add("plain 16 x 7 + bulk 3 x 2", push_add<0, 2, 7, 608>, 608, 16, 6);
    measure_add("over the link: 3 x 2 adds, own 3 x 2", add_over_link<2, 192>, 192, 3, 12);
    measure_add("over the link: 4 x 2 adds, own 3 x 2", add_over_link<2, 224>, 224, 4, 14);
}

static void run_roles() {
    std::printf("\nroles by block, what each number of blocks that send takes, rows of 14336 bytes\n");
    const std::vector<uint8_t> sums = sums_by_pull({16, 20, 24});
    const auto measure_splits = [&](const char* what, auto kernel, int threads, To to) {
        CHECK(cudaMemset(gpus[0].result, 0, sums.size()));
        for (int num_sms : {16, 20, 24})
            for (int split = num_sms / 2 - 1; split <= num_sms / 2 + 4; ++split) {
                char name[64];
                std::snprintf(name, sizeof name, "%d of %d blocks send, %s", split, num_sms, what);
                measure(name, kernel, threads, 0, kMaxRow, split, to, {num_sms});
            }
        check_rows(what, gpus[0].result, sums.data(), sums.size());
    };
    measure_splits("flag warp, 20 sum x 7", roles<false, true, 24, 20, 7, 1, 800>, 800, To::kSlots);
    measure_splits("batch 2, 20 sum x 7", roles<false, false, 24, 20, 7, 2, 768>, 768, To::kSlots);
    measure_splits("flag warp, 24 add x 7", roles<true, true, 24, 24, 7, 1, 800>, 800, To::kResult);
    measure_splits("flag warp, 16 add x 14", roles<true, true, 24, 16, 14, 1, 800>, 800, To::kResult);
    measure_splits("batch 2, 24 add x 7", roles<true, false, 24, 24, 7, 2, 768>, 768, To::kResult);
    measure_splits("batch 4, 24 add x 7", roles<true, false, 24, 24, 7, 4, 768>, 768, To::kResult);
    measure_splits("flag warp, 20 send, 16 add x 7", roles<true, true, 20, 16, 7, 1, 672>, 672, To::kResult);
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

int main(int argc, char** argv) {
    const auto is_wanted = [&](const char* what) { return argc < 2 || std::strcmp(argv[1], what) == 0; };
    set_up();
    if (is_wanted("dispatch")) run_dispatch();
    if (is_wanted("combine")) run_combine();
    if (is_wanted("blocks")) run_blocks();
    if (is_wanted("add")) run_add();
    if (is_wanted("roles")) run_roles();
    return 0;
}
