// Bare kernels: combine between two GPUs, with roles by block, and with own rows added to the peer's where those are.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 -o ways benchmarks/bare/combine_ways.cu && ./ways [blocks | add | roles | staged]
//
// As intranode_ways.cu. What came out: docs/performance/intranode.md, steps 38 and 39.
#include "intranode_ways.h"

// Slots for all rows, roles by block: blocks below `split` push rows, 24 warps with ordinary loads and stores (kSend 0) or
// `W` warps with bulk copies of kSend stages each; the other blocks sum what has come. `R` warps of each reduce.
template <int kSend, int W, int U, int R, int B = 1> __global__ void __launch_bounds__(768) by_block(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    if (blockIdx.x >= a.split) {
        if (warp < R) reduce_slots<U>(a, rows_by_block(a, R), lane);
    } else if (warp < W) {
        send<kSend, 7, B>(a, memory, warp, rows_by_block(a, W), lane);
    }
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

// A warp: adds our own rows to the peer's where those are, U vectors a lane; the first of them are loaded before it waits.
template <int U> __device__ void add_plain(const Args& a, const Rows& rows, int lane) {
    for (int t = rows.first; t < kTokens; t += rows.step) {
        const int64_t at = static_cast<int64_t>(t) * a.row;
        bool is_here = false;
        for (int base = lane * 16; base < a.row; base += U * 512) {
            Vec held[U];
            load(held, a.x + at + base);
            if (!is_here) await_row(a, t, lane);
            is_here = true;
#pragma unroll
            for (int i = 0; i < U; ++i) add(a.result + at + base + i * 512, held[i]);
        }
    }
}

// One lane: the same by bulk copies, to the rows at `sums` for which our peer has set the flags.
template <int S> __device__ void add_bulk(const Args& a, uint8_t* stages, const Rows& rows, uint8_t* sums) {
    through_stages<S, S - 1>(a, stages, rows, [&](int item, int64_t at, const uint8_t* stage) {
        while (look(a.flags + rows.token(item)) < a.epoch) __nanosleep(20);
        asm volatile("fence.proxy.async;" ::: "memory");
        bulk_add(sums + at, stage, a.row);
    });
}

// Warps below `split` of each block send (kSend 0: ordinary loads and stores; else bulk copies with so many stages), the others
// add their own rows: kAdd 0: U vectors a lane by ordinary loads and vector reductions; else bulk copies, so many stages.
template <int kSend, int kAdd, int U, int T, int B = 1> __global__ void __launch_bounds__(T) push_add(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const Rows rows = rows_by_warp(a, T / 32);
    meet(a);
    if (warp < a.split) return send<kSend, 7, B>(a, memory, warp, rows, lane);
    if (kAdd == 0) return add_plain<U>(a, rows, lane);
    constexpr int S = kAdd == 0 ? 1 : kAdd;
    uint8_t* behind_those_that_send = kSend == 0 ? memory : stages_of(memory, a.split, kSend, a.row);
    if (lane == 0) add_bulk<S>(a, stages_of(behind_those_that_send, warp - a.split, S, a.row), rows, a.result);
}

// The other way round: our own rows are stored into our result, and the peer adds its own over the link. Told row by row as well.
template <int S, int T> __global__ void __launch_bounds__(T) add_over_link(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    meet(a);
    if (lane != 0) return;
    const Rows rows = rows_by_warp(a, T / 32);
    uint8_t* stages = stages_of(memory, warp, S, a.row);
    if (warp < a.split) return add_bulk<S>(a, stages, rows, a.remote);
    send_bulk<S, 2>(a, stages, rows, a.result);
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
        const Rows rows = rows_by_block(a, W);
        if (!kAsks) return send_plain<7, B>(a, rows, lane);
        int n = 0;
        for (int t = rows.first; t < kTokens; t += rows.step) {
            const int64_t at = static_cast<int64_t>(t) * a.row;
            move<7>(a.x + at, a.remote + at, nullptr, a.row, lane);
            __syncwarp();
            if (lane == 0) ask(requests, warp, n++, t + 1);
        }
        if (lane == 0) ask(requests, warp, n, kNoMore);
        return;
    }
    if (warp >= R) return;
    if (kAdds) return add_plain<U>(a, rows_by_block(a, R), lane);
    reduce_slots<U>(a, rows_by_block(a, R), lane);
}

// A warp that sends of the next kernel, B rows to a release. kLate: it waits for their stores while the next row is loaded.
template <int B, bool kLate> __device__ void send_rows(const Args& a, const Rows& rows, int lane) {
    const int step = rows.step;
    int told = rows.first;
    const auto tell_until = [&](int end) {
        const int mine = told + lane * step;
        if (mine < end && lane < B) publish(a.peer_flags + mine, a.epoch);
        told = end;
    };
    int t = told;
    for (; t < kTokens; t += step) {
        const uint8_t* from = a.x + static_cast<int64_t>(t) * a.row;
        uint8_t* to = a.remote + static_cast<int64_t>(t) * a.row;
        const bool is_due = t - told >= B * step;
        if (is_due && !kLate) tell_until(t);
        for (int base = lane * 16; base < a.row; base += 7 * 512) {
            Vec held[7];
            load(held, from + base);
            __syncwarp();
            if (is_due && kLate && base == lane * 16) tell_until(t);
            store(to + base, held);
        }
        __syncwarp();
    }
    tell_until(t);
}

// Roles by block as above; the blocks that add keep whole rows of their own on their way, S stages of shared memory to each of R
// warps (S = 0: 7 vectors of each lane), and add them by ordinary instructions or, kBulk, by bulk copies.
template <int W, int B, bool kLate, int R, int S, bool kBulk>
__global__ void __launch_bounds__(768) roles_staged(Args a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    meet(a);
    if (blockIdx.x < a.split) {
        if (warp < W) send_rows<B, kLate>(a, rows_by_block(a, W), lane);
        return;
    }
    if (warp >= R) return;
    const Rows rows = rows_by_block(a, R);
    if constexpr (S == 0) {
        add_plain<7>(a, rows, lane);
    } else {
        const int count = rows.count();
        const auto at = [&](int item) { return static_cast<int64_t>(rows.token(item)) * a.row; };
        uint8_t* stages = stages_of(memory, warp, S, a.row);
        auto* bars = reinterpret_cast<uint64_t*>(stages + S * a.row);
        if (lane == 0) {
            init_bars(bars, S);
            for (int item = 0; item < S && item < count; ++item)
                bulk_load(stages + item * a.row, a.x + at(item), a.row, bars + item);
        }
        __syncwarp();
        for (int item = 0; item < count; ++item) {
            const int s = item % S;
            await_row(a, rows.token(item), lane);
            bar_wait(bars + s, item / S & 1);
            if (kBulk) {
                if (lane == 0) {
                    asm volatile("fence.proxy.async;" ::: "memory");
                    bulk_add(a.result + at(item), stages + s * a.row, a.row);
                    bulk_wait_read<0>();
                }
            } else {
                for (int base = lane * 16; base < a.row; base += 7 * 512) {
#pragma unroll
                    for (int i = 0; i < 7; ++i)
                        add(a.result + at(item) + base + i * 512, load_smem(smem(stages + s * a.row + base + i * 512)));
                }
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                __syncwarp();
            }
            if (lane == 0 && item + S < count) bulk_load(stages + s * a.row, a.x + at(item + S), a.row, bars + s);
        }
        if (kBulk && lane == 0) bulk_wait<0>();
    }
}

// A way to make the same sums, which `measure_it` measures.
template <class Measure>
static void check_sums(const char* what, const std::vector<uint8_t>& sums, const Measure& measure_it) {
    CHECK(cudaMemset(gpus[0].result, 0, sums.size()));
    measure_it();
    check_rows(what, gpus[0].result, sums.data(), sums.size());
}

template <class Kernel>
static void measure_split(const char* what, Kernel kernel, int threads, int shared_bytes, int split, To to,
                          const std::vector<int>& sms) {
    char name[64];
    std::snprintf(name, sizeof name, "%d blocks send, %s", split, what);
    measure(name, kernel, threads, shared_bytes, kMaxRow, split, to, sms);
}

static void run_blocks() {
    const std::vector<int> sms{14, 16, 18, 20, 24};
    std::printf("\nroles by block, rows of 14336 bytes             14 SMs     16      18      20      24\n");
    const std::vector<uint8_t> sums = sums_by_pull(sms);
    const auto measure_splits = [&](const char* what, auto kernel, int shared_bytes) {
        check_sums(what, sums, [&] {
            for (int split : {5, 6, 7, 8, 9}) measure_split(what, kernel, 768, shared_bytes, split, To::kSlots, sms);
        });
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
        const int shared_bytes = stages == 0 ? 0 : stages * kMaxRow + 16 * 128;
        check_sums(name, sums, [&] { measure(name, kernel, threads, shared_bytes, kMaxRow, split, To::kResult, sms); });
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
        check_sums(what, sums, [&] {
            for (int num_sms : {16, 20, 24}) {
                std::printf("%d SMs:\n", num_sms);
                for (int split = num_sms / 2 - 1; split <= num_sms / 2 + 4; ++split)
                    measure_split(what, kernel, threads, 0, split, to, {num_sms});
            }
        });
    };
    measure_splits("flag warp, 20 sum x 7", roles<false, true, 24, 20, 7, 1, 800>, 800, To::kSlots);
    measure_splits("batch 2, 20 sum x 7", roles<false, false, 24, 20, 7, 2, 768>, 768, To::kSlots);
    measure_splits("flag warp, 24 add x 7", roles<true, true, 24, 24, 7, 1, 800>, 800, To::kResult);
    measure_splits("flag warp, 16 add x 14", roles<true, true, 24, 16, 14, 1, 800>, 800, To::kResult);
    measure_splits("batch 2, 24 add x 7", roles<true, false, 24, 24, 7, 2, 768>, 768, To::kResult);
    measure_splits("batch 4, 24 add x 7", roles<true, false, 24, 24, 7, 4, 768>, 768, To::kResult);
    measure_splits("flag warp, 20 send, 16 add x 7", roles<true, true, 20, 16, 7, 1, 672>, 672, To::kResult);
}

static void run_staged() {
    std::printf("\nroles by block, own rows added out of stages\n");
    const std::vector<uint8_t> sums = sums_by_pull({16, 20, 24});
    const auto measure_splits = [&](const char* what, auto kernel, int stages) {
        check_sums(what, sums, [&] {
            for (int split = 7; split <= 11; ++split)
                measure_split(what, kernel, 768, stages * kMaxRow + 16 * 128, split, To::kResult, {16, 18, 20, 24});
        });
    };
    measure_splits("batch 2, 24 add x 7", roles_staged<24, 2, false, 24, 0, false>, 0);
    measure_splits("late 1, 24 add x 7", roles_staged<24, 1, true, 24, 0, false>, 0);
    measure_splits("late 2, 24 add x 7", roles_staged<24, 2, true, 24, 0, false>, 0);
    measure_splits("late 3, 24 add x 7", roles_staged<24, 3, true, 24, 0, false>, 0);
    measure_splits("late 2, 7 add x 2 stages", roles_staged<24, 2, true, 7, 2, false>, 14);
    measure_splits("late 2, 14 add x 1 stage", roles_staged<24, 2, true, 14, 1, false>, 14);
    measure_splits("late 2, 7 x 2 stages bulk", roles_staged<24, 2, true, 7, 2, true>, 14);
}

int main(int argc, char** argv) {
    const auto is_wanted = [&](const char* what) { return argc < 2 || std::strcmp(argv[1], what) == 0; };
    set_up();
    if (is_wanted("blocks")) run_blocks();
    if (is_wanted("add")) run_add();
    if (is_wanted("roles")) run_roles();
    if (is_wanted("staged")) run_staged();
    return 0;
}
