// Bare kernels: ways to move the bytes of dispatch and combine between two GPUs, without a protocol around them.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 -o ways benchmarks/bare/intranode_ways.cu && ./ways [dispatch | combine]
//
// Two GPUs, both directions at once, 4096 tokens that each go to both ranks, rows of 14336 and 7168 bytes. Prints
// microseconds a launch (of 12 in a row, the slower GPU). What came out: docs/performance/intranode.md, from step 19.
#include "intranode_ways.h"

// -- Dispatch ------------------------------------------------------------------------------------------------------------

// kWay 0: own row first; 1: remote row first; 2: all remote rows, then all own ones; 3: warps below `split` of each block
// move remote rows, the others own ones; 4: blocks below `split` remote, the others own; 5: remote rows alone;
// 6: as 3, but warps that are done with own rows help with the remote ones, which are dealt by a counter of the block.
template <int kWay, int U> __global__ void __launch_bounds__(768) push(Args a) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int num_warps = blockDim.x / 32;
    const Rows all = rows_of_grid(warp, num_warps);
    auto go = [&](const Rows& rows, bool is_own, bool is_remote) {
        for (int t = rows.first; t < kTokens; t += rows.step) {
            const uint8_t* from = a.x + static_cast<int64_t>(t) * a.row;
            uint8_t* own = a.own + static_cast<int64_t>(t) * a.row;
            uint8_t* remote = a.remote + static_cast<int64_t>(t) * a.row;
            if (is_own && is_remote)
                kWay == 1 ? move<U>(from, remote, own, a.row, lane) : move<U>(from, own, remote, a.row, lane);
            else
                move<U>(from, is_own ? own : remote, nullptr, a.row, lane);
        }
    };
    if (kWay == 0 || kWay == 1) go(all, true, true);
    if (kWay == 2 || kWay == 5) go(all, false, true);
    if (kWay == 2) go(all, true, false);
    if (kWay == 3) go(rows_by_warp(a, num_warps), warp >= a.split, warp < a.split);
    if (kWay == 4) go(rows_by_block(a, num_warps), blockIdx.x >= a.split, blockIdx.x < a.split);
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

// A row comes by bulk load; one copy of it goes by bulk store, the other by ordinary stores out of shared memory.
// kOwnByBulk: the own row is the one that goes by bulk store. kBoth: both do.
enum class Bulk { kOwn, kRemote, kBoth };
template <Bulk kWhat, int P, int S> __global__ void __launch_bounds__(768) push_bulk(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    uint8_t* stages = memory + warp * (S * P + 128);
    auto* bars = reinterpret_cast<uint64_t*>(stages + S * P);
    if (lane == 0) init_bars(bars, S);
    __syncwarp();
    const Rows pieces = rows_of_grid(warp, blockDim.x / 32);
    const int count = count_of(kTokens * (a.row / P), pieces.first, pieces.step);
    auto at = [&](int item) { return static_cast<int64_t>(pieces.token(item)) * P; };
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
                store(to + base, held);
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        __syncwarp();
    }
    bulk_wait<0>();
}

// -- Combine -------------------------------------------------------------------------------------------------------------

// The far part of the next piece is on its way while this one is summed.
template <int U, int T> __global__ void __launch_bounds__(T) pull_ahead(Args a) {
    const int lane = threadIdx.x % 32;
    const int per_row = a.row / (U * 512);
    const Rows rows = rows_of_grid(threadIdx.x / 32, T / 32);
    const int pieces = rows.count() * per_row;
    auto at = [&](int piece) {
        return static_cast<int64_t>(rows.token(piece / per_row)) * a.row + piece % per_row * (U * 512) + lane * 16;
    };
    Vec f[U];
    if (pieces > 0) load(f, a.peer_x + at(0));
    for (int piece = 0; piece < pieces; ++piece) {
        Vec n[U], next[U];
        load(n, a.x + at(piece));
        if (piece + 1 < pieces) load(next, a.peer_x + at(piece + 1));
#pragma unroll
        for (int i = 0; i < U; ++i) store(a.result + at(piece) + i * 512, sum(f[i], n[i]));
#pragma unroll
        for (int i = 0; i < U; ++i) f[i] = next[i];
    }
}

// Slots that hold all rows: warps below `split` push rows there, with a flag for each; the others sum what has come.
// kSend 0: ordinary loads and stores; else bulk copies, kSend stages of a whole row for each warp.
template <int kSend, int U, int T, int SU = 7, int B = 1> __global__ void __launch_bounds__(T) through_slots(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const Rows rows = rows_by_warp(a, T / 32);
    if (warp >= a.split) return reduce_slots<U>(a, rows, lane);
    send<kSend, SU, B>(a, memory, warp, rows, lane);
}

static void run_dispatch() {
    for (int row : {14336, 7168}) {
        std::printf("\ndispatch, rows of %d bytes                     8 SMs     12      14      16      20      24\n",
                    row);
        const auto check = [&](const char* what) {
            check_rows(what, gpus[1].out, gpus[0].x, static_cast<size_t>(kTokens) * row);
        };
        const auto measure_push = [&](const char* name, auto kernel, int split = 0) {
            measure(name, kernel, 768, 0, row, split, To::kOutput);
        };
        const auto measure_bulk = [&](const char* name, auto kernel, int warps, int stage_bytes) {
            measure(name, kernel, warps * 32, warps * (stage_bytes + 128), row, 0, To::kOutput);
        };
        measure_push("own, remote (24 warps)", push<0, 7>);
        measure_push("remote, own", push<1, 7>);
        check("push");
        measure_push("all remote, then all own", push<2, 7>);
        measure_push("remote alone (no own rows)", push<5, 7>);
        measure_push("warps: 16 remote, 8 own", push<3, 7>, 16);
        measure_push("warps: 12 remote, 12 own", push<3, 7>, 12);
        measure_push("warps: 20 remote, 4 own", push<3, 7>, 20);
        measure_push("warps: 16 remote, 8 own, then help", push<6, 7>, 16);
        measure_push("warps: 20 remote, 4 own, then help", push<6, 7>, 20);
        measure_push("warps: 12 remote, 12 own, then help", push<6, 7>, 12);
        measure_push("blocks: all but 4 remote", push<4, 7>, 2000 - 4);
        measure_push("blocks: all but 6 remote", push<4, 7>, 2000 - 6);
        measure_bulk("bulk load; own by bulk, 14 x 2 x 7168", push_bulk<Bulk::kOwn, 7168, 2>, 14, 2 * 7168);
        measure_bulk("bulk load; remote by bulk, 14 x 2 x 7168", push_bulk<Bulk::kRemote, 7168, 2>, 14, 2 * 7168);
        check("bulk");
        measure_bulk("bulk load; both by bulk, 14 x 2 x 7168", push_bulk<Bulk::kBoth, 7168, 2>, 14, 2 * 7168);
        measure_bulk("bulk load; own by bulk, 20 x 3 x 3584", push_bulk<Bulk::kOwn, 3584, 3>, 20, 3 * 3584);
        measure_bulk("bulk load; remote by bulk, 20 x 3 x 3584", push_bulk<Bulk::kRemote, 3584, 3>, 20, 3 * 3584);
    }
}

static void run_combine() {
    const int row = kMaxRow;
    std::printf("\ncombine, rows of 14336 bytes                     8 SMs     12      14      16      20      24\n");
    const auto measure_pull = [&](const char* name, auto kernel, int warps) {
        measure(name, kernel, warps * 32, 0, row, 0, To::kOutput);
    };
    // Of `warps`, those that send have so many stages each.
    const auto measure_slots = [&](const char* name, auto kernel, int warps, int send_warps, int stages = 0) {
        const int shared_bytes = stages == 0 ? 0 : send_warps * (stages * row + 128);
        measure(name, kernel, warps * 32, shared_bytes, row, send_warps, To::kSlots);
    };
    measure_pull("pull, 24 warps x 4", pull<4, 768>, 24);
    measure_pull("pull, 16 warps x 7", pull<7, 512>, 16);
    measure_pull("pull, 24 warps x 7", pull<7, 768>, 24);
    measure_pull("pull, 12 warps x 7", pull<7, 384>, 12);
    measure_pull("pull, 32 warps x 4", pull<4, 1024>, 32);
    measure_pull("pull ahead, 16 warps x 4", pull_ahead<4, 512>, 16);
    measure_pull("pull ahead, 12 warps x 7", pull_ahead<7, 384>, 12);
    measure_slots("slots, 4 bulk send x 2, 12 reduce x 7", through_slots<2, 7, 512>, 16, 4, 2);
    check_rows("slots", gpus[1].slots, gpus[0].x, static_cast<size_t>(kTokens) * row);
    measure_slots("slots, 7 bulk send x 2 batch 2, 9 reduce x 7", through_slots<2, 7, 512, 7, 2>, 16, 7, 2);
    measure_slots("slots, 7 bulk send x 2 batch 4, 9 reduce x 7", through_slots<2, 7, 512, 7, 4>, 16, 7, 2);
    measure_slots("slots, 7 bulk send x 2 batch 4, 13 reduce x 7", through_slots<2, 7, 640, 7, 4>, 20, 7, 2);
    measure_slots("slots, 12 plain send, 12 reduce x 4", through_slots<0, 4, 768>, 24, 12);
    measure_slots("slots, 12 plain send batch 2, 12 reduce x 4", through_slots<0, 4, 768, 7, 2>, 24, 12);
    measure_slots("slots, 8 plain send x 14, 8 reduce x 7", through_slots<0, 7, 512, 14, 1>, 16, 8);
    measure_slots("slots, 10 plain send x 14, 10 reduce x 7", through_slots<0, 7, 640, 14, 1>, 20, 10);
    measure_slots("slots, 10 plain send x 14 batch 2, 10 reduce x 7", through_slots<0, 7, 640, 14, 2>, 20, 10);
    measure_slots("slots, 12 plain send x 14 batch 2, 8 reduce x 7", through_slots<0, 7, 640, 14, 2>, 20, 12);
    measure_slots("slots, 8 plain send x 14 batch 2, 12 reduce x 7", through_slots<0, 7, 640, 14, 2>, 20, 8);
    measure_slots("slots, 16 plain send batch 2, 16 reduce x 4", through_slots<0, 4, 1024, 7, 2>, 32, 16);
}

int main(int argc, char** argv) {
    const auto is_wanted = [&](const char* what) { return argc < 2 || std::strcmp(argv[1], what) == 0; };
    set_up();
    if (is_wanted("dispatch")) run_dispatch();
    if (is_wanted("combine")) run_combine();
    return 0;
}
