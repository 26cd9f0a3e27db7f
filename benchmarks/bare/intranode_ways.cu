// Bare kernels: ways to move the bytes of dispatch and combine between two GPUs, without a protocol around them.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 -o ways benchmarks/bare/intranode_ways.cu && ./ways
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
    constexpr int S = kSend == 0 ? 1 : kSend;
    uint8_t* stages = memory + warp * (S * a.row + 128);
    auto* bars = reinterpret_cast<uint64_t*>(stages + S * a.row);
    if (lane != 0) return;
    for (int s = 0; s < S; ++s) bar_init(bars + s);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    const int count = first < kTokens ? (kTokens - first + step - 1) / step : 0;
    auto at = [&](int item) { return static_cast<int64_t>(first + item * step) * a.row; };
    int told = 0;  // items whose flag is set
    for (int item = 0; item < S - 1 && item < count; ++item)
        bulk_load(stages + item * a.row, a.x + at(item), a.row, bars + item);
    for (int item = 0; item < count; ++item) {
        const int s = item % S;
        if (item + S - 1 < count) {
            bulk_wait_read<0>();
            bulk_load(stages + (item + S - 1) % S * a.row, a.x + at(item + S - 1), a.row, bars + (item + S - 1) % S);
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

template <class Kernel>
static void measure(const char* name, Kernel kernel, int threads, int shared_bytes, int row, int split, bool to_slots,
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
                if (to_slots) args.remote = gpus[1 - gpu].slots;
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

int main() {
    const size_t part = static_cast<size_t>(kTokens) * kMaxRow;
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaSetDevice(gpu));
        CHECK(cudaDeviceEnablePeerAccess(1 - gpu, 0));
        Gpu& g = gpus[gpu];
        CHECK(cudaMalloc(&g.x, part));
        CHECK(cudaMalloc(&g.out, 2 * part));
        CHECK(cudaMalloc(&g.slots, part));
        CHECK(cudaMalloc(&g.result, part));
        CHECK(cudaMalloc(&g.flags, kTokens * 4));
        CHECK(cudaMemset(g.flags, 0, kTokens * 4));
        std::vector<uint16_t> values(part / 2);
        for (size_t i = 0; i < values.size(); ++i)
            values[i] = static_cast<uint16_t>(0x3c00 + (i * 2654435761u >> 13) % 1024);
        CHECK(cudaMemcpy(g.x, values.data(), part, cudaMemcpyHostToDevice));
        CHECK(cudaStreamCreateWithFlags(&g.stream, cudaStreamNonBlocking));
        CHECK(cudaEventCreate(&g.begin));
        CHECK(cudaEventCreate(&g.end));
    }
    CHECK(cudaDeviceSynchronize());
    for (int row : {14336, 7168}) {
        std::printf("\ndispatch, rows of %d bytes                     8 SMs     12      14      16      20      24\n",
                    row);
        measure("own, remote (24 warps)", push<0, 7>, 768, 0, row, 0, false);
        measure("remote, own", push<1, 7>, 768, 0, row, 0, false);
        check_rows("push", gpus[1].out, gpus[0].x, static_cast<size_t>(kTokens) * row);
        measure("all remote, then all own", push<2, 7>, 768, 0, row, 0, false);
        measure("remote alone (no own rows)", push<5, 7>, 768, 0, row, 0, false);
        measure("warps: 16 remote, 8 own", push<3, 7>, 768, 0, row, 16, false);
        measure("warps: 12 remote, 12 own", push<3, 7>, 768, 0, row, 12, false);
        measure("warps: 20 remote, 4 own", push<3, 7>, 768, 0, row, 20, false);
        measure("warps: 16 remote, 8 own, then help", push<6, 7>, 768, 0, row, 16, false);
        measure("warps: 20 remote, 4 own, then help", push<6, 7>, 768, 0, row, 20, false);
        measure("warps: 12 remote, 12 own, then help", push<6, 7>, 768, 0, row, 12, false);
        measure("blocks: all but 4 remote", push<4, 7>, 768, 0, row, 2000 - 4, false);
        measure("blocks: all but 6 remote", push<4, 7>, 768, 0, row, 2000 - 6, false);
        const int small = 14 * (2 * 7168 + 128);
        measure("bulk load; own by bulk, 14 x 2 x 7168", push_bulk<Bulk::kOwn, 7168, 2>, 14 * 32, small, row, 0, false);
        measure("bulk load; remote by bulk, 14 x 2 x 7168", push_bulk<Bulk::kRemote, 7168, 2>, 14 * 32, small, row, 0,
                false);
        check_rows("bulk", gpus[1].out, gpus[0].x, static_cast<size_t>(kTokens) * row);
        measure("bulk load; both by bulk, 14 x 2 x 7168", push_bulk<Bulk::kBoth, 7168, 2>, 14 * 32, small, row, 0,
                false);
        measure("bulk load; own by bulk, 20 x 3 x 3584", push_bulk<Bulk::kOwn, 3584, 3>, 20 * 32, 20 * (3 * 3584 + 128),
                row, 0, false);
        measure("bulk load; remote by bulk, 20 x 3 x 3584", push_bulk<Bulk::kRemote, 3584, 3>, 20 * 32,
                20 * (3 * 3584 + 128), row, 0, false);
    }
    const int row = 14336;
    std::printf("\ncombine, rows of 14336 bytes                     8 SMs     12      14      16      20      24\n");
    measure("pull, 24 warps x 4", pull<4, 768>, 768, 0, row, 0, false);
    measure("pull, 16 warps x 7", pull<7, 512>, 512, 0, row, 0, false);
    measure("pull, 24 warps x 7", pull<7, 768>, 768, 0, row, 0, false);
    measure("pull, 12 warps x 7", pull<7, 384>, 384, 0, row, 0, false);
    measure("pull, 32 warps x 4", pull<4, 1024>, 1024, 0, row, 0, false);
    measure("pull ahead, 16 warps x 4", pull_ahead<4, 512>, 512, 0, row, 0, false);
    measure("pull ahead, 12 warps x 7", pull_ahead<7, 384>, 384, 0, row, 0, false);
    const int stage2 = 2 * row + 128;
    measure("slots, 4 bulk send x 2, 12 reduce x 7", through_slots<2, 7, 512>, 512, 4 * stage2, row, 4, true);
    check_rows("slots", gpus[1].slots, gpus[0].x, static_cast<size_t>(kTokens) * row);
    measure("slots, 7 bulk send x 2 batch 2, 9 reduce x 7", through_slots<2, 7, 512, 7, 2>, 512, 7 * stage2, row, 7,
            true);
    measure("slots, 7 bulk send x 2 batch 4, 9 reduce x 7", through_slots<2, 7, 512, 7, 4>, 512, 7 * stage2, row, 7,
            true);
    measure("slots, 7 bulk send x 2 batch 4, 13 reduce x 7", through_slots<2, 7, 640, 7, 4>, 640, 7 * stage2, row, 7,
            true);
    measure("slots, 12 plain send, 12 reduce x 4", through_slots<0, 4, 768>, 768, 0, row, 12, true);
    measure("slots, 12 plain send batch 2, 12 reduce x 4", through_slots<0, 4, 768, 7, 2>, 768, 0, row, 12, true);
    measure("slots, 8 plain send x 14, 8 reduce x 7", through_slots<0, 7, 512, 14, 1>, 512, 0, row, 8, true);
    measure("slots, 10 plain send x 14, 10 reduce x 7", through_slots<0, 7, 640, 14, 1>, 640, 0, row, 10, true);
    measure("slots, 10 plain send x 14 batch 2, 10 reduce x 7", through_slots<0, 7, 640, 14, 2>, 640, 0, row, 10, true);
    measure("slots, 12 plain send x 14 batch 2, 8 reduce x 7", through_slots<0, 7, 640, 14, 2>, 640, 0, row, 12, true);
    measure("slots, 8 plain send x 14 batch 2, 12 reduce x 7", through_slots<0, 7, 640, 14, 2>, 640, 0, row, 8, true);
    measure("slots, 16 plain send batch 2, 16 reduce x 4", through_slots<0, 4, 1024, 7, 2>, 1024, 0, row, 16, true);
    return 0;
}
