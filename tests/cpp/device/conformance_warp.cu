// Warp collectives, bit functions and barriers: plain CUDA names, the same on both devices. One source, run by the CPU
// executor (conformance_test.cc) and on a GPU (device_cuda.cmake).
#include <cstdint>
#include <vector>

#include "device/launch.h"
#include "device/prim.h"
#include "device/test_device.h"
#include "support/testing.h"

namespace deep_ep::testing {
namespace {

using prim::Order;
using prim::Scope;

constexpr int kWarp = prim::kWarpSize;

// Runs K on one block with `num_words` of results and reads them back.
template <class K, class Word = uint32_t>
std::vector<Word> results_of(int num_threads, size_t num_words, int argument = 0) {
    const auto device = test_device();
    const auto stream = device->create_stream();
    auto* words = static_cast<Word*>(device->allocate(num_words * sizeof(Word)));
    dev::LaunchConfig config;
    config.num_threads = num_threads;
    config.name = "warp test";
    dev::launch<K>(config, stream, {words, argument});
    device->synchronize_stream(stream);
    std::vector<Word> values(num_words);
    device->copy_now(values.data(), words, num_words * sizeof(Word));
    device->free(words);
    device->destroy_stream(stream);
    return values;
}

// ---------------------------------------------------------------------------------------------------------------
// Shuffles
// ---------------------------------------------------------------------------------------------------------------

// What lane `lane` gets from each kind of shuffle with this width and argument, by the book.
struct Expected {
    int index, by_xor, up, down;
};

Expected expected_shuffle(int lane, int width, int argument) {
    const int first = lane / width * width;
    const int within = lane % width;
    Expected expected;
    expected.index = first + argument % width;
    expected.by_xor = (lane ^ argument) < first + width ? (lane ^ argument) : lane;
    expected.up = within >= argument ? lane - argument : lane;
    expected.down = within + argument < width ? lane + argument : lane;
    return expected;
}

template <class T> struct ShuffleKernel {
    struct Params {
        T* results;  // [4 widths][4 kinds][32 lanes]
        int argument;
    };
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const int lane = static_cast<int>(threadIdx.x);
        const T value = static_cast<T>(lane + 100);
        for (int i = 0; i < 4; ++i) {
            const int width = 4 << i;
            T* results = p.results + i * 4 * kWarp + lane;
            results[0] = __shfl_sync(prim::kFullMask, value, p.argument, width);
            results[kWarp] = __shfl_xor_sync(prim::kFullMask, value, p.argument, width);
            results[2 * kWarp] = __shfl_up_sync(prim::kFullMask, value, static_cast<unsigned>(p.argument), width);
            results[3 * kWarp] = __shfl_down_sync(prim::kFullMask, value, static_cast<unsigned>(p.argument), width);
        }
    }
};

template <class T> void check_shuffles() {
    for (const int argument : {0, 1, 2, 3, 5, 16, 31}) {
        CAPTURE(argument);
        const auto got = results_of<ShuffleKernel<T>, T>(kWarp, 16 * kWarp, argument);
        int num_wrong = 0;
        for (int i = 0; i < 4; ++i) {
            for (int lane = 0; lane < kWarp; ++lane) {
                const Expected expected = expected_shuffle(lane, 4 << i, argument);
                const T* results = got.data() + i * 4 * kWarp + lane;
                num_wrong += results[0] != static_cast<T>(expected.index + 100);
                num_wrong += results[kWarp] != static_cast<T>(expected.by_xor + 100);
                num_wrong += results[2 * kWarp] != static_cast<T>(expected.up + 100);
                num_wrong += results[3 * kWarp] != static_cast<T>(expected.down + 100);
            }
        }
        CHECK_EQ(num_wrong, 0);
    }
}

TEST_CASE("shuffles read the right lane for each type, width and argument") {
    check_shuffles<int>();
    check_shuffles<unsigned>();
    check_shuffles<float>();
    check_shuffles<long long>();
    check_shuffles<unsigned long long>();
    check_shuffles<double>();
}

struct WideShuffleKernel {
    struct Params {
        uint64_t* results;  // [32]
        int argument;
    };
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const uint64_t value = 0x0123456789abcdefull * (threadIdx.x + 1);
        p.results[threadIdx.x] = __shfl_xor_sync(prim::kFullMask, value, p.argument);
    }
};

TEST_CASE("a 64-bit shuffle moves both halves") {
    const auto got = results_of<WideShuffleKernel, uint64_t>(kWarp, kWarp, 9);
    for (uint64_t lane = 0; lane < kWarp; ++lane) CHECK_EQ(got[lane], 0x0123456789abcdefull * ((lane ^ 9) + 1));
}

// ---------------------------------------------------------------------------------------------------------------
// Votes
// ---------------------------------------------------------------------------------------------------------------

struct VoteKernel {
    struct Params {
        uint32_t* results;  // [7][32]
        int argument;
    };
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const int lane = static_cast<int>(threadIdx.x);
        uint32_t* results = p.results + lane;
        results[0] = __ballot_sync(prim::kFullMask, lane % 3 == 0);
        results[kWarp] = static_cast<uint32_t>(__any_sync(prim::kFullMask, lane == p.argument) != 0);
        results[2 * kWarp] = static_cast<uint32_t>(__any_sync(prim::kFullMask, lane == 99) != 0);
        results[3 * kWarp] = static_cast<uint32_t>(__all_sync(prim::kFullMask, lane < 32) != 0);
        results[4 * kWarp] = static_cast<uint32_t>(__all_sync(prim::kFullMask, lane != p.argument) != 0);
        // Halves of the warp vote apart: only lanes of the mask count, and any non-zero predicate is a yes.
        const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
        results[5 * kWarp] = __ballot_sync(half, lane & 4);
        results[6 * kWarp] = static_cast<uint32_t>(__all_sync(half, lane < 16 ? 2 : 0) != 0);
    }
};

TEST_CASE("votes count the lanes of their mask") {
    const auto got = results_of<VoteKernel>(kWarp, 7 * kWarp, 17);
    for (size_t lane = 0; lane < kWarp; ++lane) {
        CHECK_EQ(got[lane], 0x49249249u);
        CHECK_EQ(got[kWarp + lane], 1u);
        CHECK_EQ(got[2 * kWarp + lane], 0u);
        CHECK_EQ(got[3 * kWarp + lane], 1u);
        CHECK_EQ(got[4 * kWarp + lane], 0u);
        CHECK_EQ(got[5 * kWarp + lane], lane < 16 ? 0x0000f0f0u : 0xf0f00000u);
        CHECK_EQ(got[6 * kWarp + lane], lane < 16 ? 1u : 0u);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Order within warp and block
// ---------------------------------------------------------------------------------------------------------------

// Quarters of a warp pass words round at speeds of their own.
struct QuarterKernel {
    struct Params {
        uint32_t* results;  // [32]
        int num_rounds;
    };
    struct Shared {
        uint32_t words[kWarp];
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const unsigned lane = threadIdx.x;
        const unsigned quarter = lane / 8;
        const uint32_t mask = 0xffu << (quarter * 8);
        const unsigned next = quarter * 8 + (lane + 1) % 8;
        shared.words[lane] = lane % 8;
        __syncwarp(mask);
        for (unsigned round = 0; round < static_cast<unsigned>(p.num_rounds) * (quarter + 1); ++round) {
            const uint32_t seen = shared.words[next];
            __syncwarp(mask);
            shared.words[lane] = seen;
            __syncwarp(mask);
        }
        p.results[lane] = shared.words[lane];
    }
};

TEST_CASE("__syncwarp with a part mask orders the lanes of the mask, and holds no others") {
    const int num_rounds = 50;
    const auto got = results_of<QuarterKernel>(kWarp, kWarp, num_rounds);
    for (int lane = 0; lane < kWarp; ++lane) {
        const int passes = num_rounds * (lane / 8 + 1);
        CHECK_EQ(got[static_cast<size_t>(lane)], static_cast<uint32_t>((lane + passes) % 8));
    }
}

struct BlockScanKernel {
    struct Params {
        uint32_t* results;  // [blockDim]
        int argument;
    };
    struct Shared {
        uint32_t words[2][1024];
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        int from = 0;
        shared.words[0][threadIdx.x] = threadIdx.x;
        __syncthreads();
        for (unsigned distance = 1; distance < blockDim.x; distance *= 2) {
            uint32_t sum = shared.words[from][threadIdx.x];
            if (threadIdx.x >= distance) sum += shared.words[from][threadIdx.x - distance];
            from = 1 - from;
            shared.words[from][threadIdx.x] = sum;
            __syncthreads();
        }
        p.results[threadIdx.x] = shared.words[from][threadIdx.x];
    }
};

TEST_CASE("__syncthreads orders a block of any size") {
    for (const int num_threads : {32, 96, 1024}) {
        const auto got = results_of<BlockScanKernel>(num_threads, static_cast<size_t>(num_threads));
        int num_wrong = 0;
        for (uint32_t i = 0; i < got.size(); ++i) num_wrong += got[i] != i * (i + 1) / 2;
        CHECK_EQ(num_wrong, 0);
    }
}

// All fifteen named barriers and __syncthreads at once: warp pairs meet in barriers of changing names.
struct AllBarriersKernel {
    struct Params {
        uint32_t* results;  // [1] wrong words
        int num_rounds;
    };
    struct Shared {
        uint32_t words[1024];
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const int pair = static_cast<int>(threadIdx.x) / 64;
        for (int round = 0; round < p.num_rounds; ++round) {
            const int id = 1 + (pair + round) % 15;
            shared.words[threadIdx.x] = static_cast<uint32_t>(round);
            prim::barrier_sync(id, 64);
            if (shared.words[threadIdx.x ^ 32u] != static_cast<uint32_t>(round))
                prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.results, 1u);
            __syncthreads();
        }
    }
};

TEST_CASE("fifteen named barriers work side by side") {
    CHECK_EQ(results_of<AllBarriersKernel>(15 * 64, 1, 40)[0], 0u);
}

// ---------------------------------------------------------------------------------------------------------------
// Bits and numbers
// ---------------------------------------------------------------------------------------------------------------

struct BitsKernel {
    struct Params {
        uint64_t* results;  // [24]
        int five;           // not known to the compiler
    };
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        if (threadIdx.x != 0) return;
        const int zero = p.five - 5;
        const unsigned pattern = 0x00f00100u + static_cast<unsigned>(zero);
        const auto wide = 0x00000f0000000010ull + static_cast<unsigned long long>(zero);
        uint64_t* out = p.results;
        *out++ = static_cast<uint64_t>(__popc(pattern));
        *out++ = static_cast<uint64_t>(__popcll(wide));
        *out++ = static_cast<uint64_t>(__ffs(static_cast<int>(pattern)));
        *out++ = static_cast<uint64_t>(__ffs(zero));
        *out++ = static_cast<uint64_t>(__ffsll(static_cast<long long>(wide)));
        *out++ = static_cast<uint64_t>(__clz(static_cast<int>(pattern)));
        *out++ = static_cast<uint64_t>(__clz(zero));
        *out++ = static_cast<uint64_t>(__clzll(static_cast<long long>(wide)));
        *out++ = __brev(pattern);
        *out++ = __float_as_uint(static_cast<float>(p.five));
        *out++ = static_cast<uint64_t>(__uint_as_float(0x40a00000u + static_cast<unsigned>(zero)));
        *out++ = static_cast<uint64_t>(__float_as_int(static_cast<float>(p.five)));
        *out++ = static_cast<uint64_t>(__int_as_float(0x40a00000 + zero));
        *out++ = static_cast<uint64_t>(min(p.five, 7) + max(p.five, 7) * 10);
        *out++ = min(static_cast<unsigned>(p.five), 0xfffffff0u);
        *out++ = max(-1, static_cast<unsigned>(p.five));  // both unsigned, as in CUDA
        *out++ = static_cast<uint64_t>(min(static_cast<int64_t>(p.five), static_cast<int64_t>(-7)) + 10);
        *out++ = static_cast<uint64_t>(max(static_cast<float>(p.five), 7.5f) * 2.0f);
    }
};

TEST_CASE("bit functions, bit casts, min and max") {
    const std::vector<uint64_t> expected{5,          5, 9,          0, 5,          8, 32,          20, 0x00800f00u,
                                         0x40a00000, 5, 0x40a00000, 5, 5 + 7 * 10, 5, 0xffffffffu, 3,  15};
    const auto got = results_of<BitsKernel, uint64_t>(kWarp, 24, 5);
    for (size_t i = 0; i < expected.size(); ++i) {
        CAPTURE(i);
        CHECK_EQ(got[i], expected[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Coordinates and atomics across blocks
// ---------------------------------------------------------------------------------------------------------------

struct CountKernel {
    struct Params {
        uint32_t* tickets;     // [num threads in all] how often each number was drawn
        uint64_t* sum;         // of all coordinates
        uint32_t* lock;        // taken by compare_swap
        uint32_t* guarded;     // a plain word that the lock guards
        uint32_t* dimensions;  // [2]
    };
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const uint32_t me = blockIdx.x * blockDim.x + threadIdx.x;
        const uint32_t ticket = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.dimensions + 2, 1u);
        prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.tickets + ticket, 1u);
        prim::fetch_add<Order::kRelaxed, Scope::kSys>(p.sum, static_cast<uint64_t>(me) << 20);
        if (threadIdx.x % 32 == 0) {
            while (prim::compare_swap<Order::kAcquire, Scope::kGpu>(p.lock, 0u, 1u) != 0) prim::pause();
            *p.guarded += 1;
            prim::store<Order::kRelease, Scope::kGpu>(p.lock, 0u);
        }
        if (me == 0) {
            p.dimensions[0] = gridDim.x * 1000 + gridDim.y * 10 + gridDim.z;
            p.dimensions[1] = blockDim.x * 1000 + blockDim.y * 10 + blockDim.z;
        }
    }
};

TEST_CASE("atomics of many blocks lose nothing, and compare_swap makes a lock") {
    const auto device = test_device();
    const auto stream = device->create_stream();
    constexpr uint32_t kBlocks = 6, kThreads = 160, kAll = kBlocks * kThreads;
    auto* words = static_cast<uint32_t*>(device->allocate((kAll + 16) * sizeof(uint32_t)));
    auto* sum = static_cast<uint64_t*>(device->allocate(sizeof(uint64_t)));
    dev::LaunchConfig config;
    config.num_blocks = kBlocks;
    config.num_threads = kThreads;
    config.name = "count";
    dev::launch<CountKernel>(config, stream, {words + 16, sum, words, words + 1, words + 2});
    device->synchronize_stream(stream);
    std::vector<uint32_t> got(kAll + 16);
    uint64_t got_sum = 0;
    device->copy_now(got.data(), words, got.size() * sizeof(uint32_t));
    device->copy_now(&got_sum, sum, sizeof(got_sum));
    CHECK_EQ(got[0], 0u);
    CHECK_EQ(got[1], kAll / 32);
    CHECK_EQ(got[2], kBlocks * 1000 + 11);
    CHECK_EQ(got[3], kThreads * 1000 + 11);
    CHECK_EQ(got[4], kAll);
    uint32_t num_wrong = 0;
    for (uint32_t i = 0; i < kAll; ++i) num_wrong += got[16 + i] != 1;
    CHECK_EQ(num_wrong, 0u);
    CHECK_EQ(got_sum, (static_cast<uint64_t>(kAll) * (kAll - 1) / 2) << 20);
    device->free(words);
    device->free(sum);
    device->destroy_stream(stream);
}

// Message passing by fences: relaxed accesses on both sides.
struct FenceKernel {
    struct Params {
        uint32_t* row;  // [blockDim]
        uint32_t* full;
        uint32_t* empty;
        uint32_t* num_wrong;
        int num_rounds;
    };
    struct Shared {};

    static EP_DEVICE void await(const uint32_t* flag, uint32_t round) {
        if (threadIdx.x == 0) {
            while (prim::load<Order::kRelaxed, Scope::kSys>(flag) < round) prim::pause();
            prim::fence<Order::kAcqRel, Scope::kSys>();
        }
        __syncthreads();
    }
    static EP_DEVICE void tell(uint32_t* flag, uint32_t round) {
        __syncthreads();
        if (threadIdx.x != 0) return;
        prim::fence<Order::kAcqRel, Scope::kSys>();
        prim::store<Order::kRelaxed, Scope::kSys>(flag, round);
    }
    static EP_DEVICE void run(const Params& p, Shared&) {
        for (uint32_t round = 1; round <= static_cast<uint32_t>(p.num_rounds); ++round) {
            if (blockIdx.x == 0) {
                await(p.empty, round - 1);
                p.row[threadIdx.x] = round * 1000 + threadIdx.x;
                tell(p.full, round);
            } else {
                await(p.full, round);
                if (p.row[threadIdx.x] != round * 1000 + threadIdx.x)
                    prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.num_wrong, 1u);
                tell(p.empty, round);
            }
        }
    }
};

TEST_CASE("fences around relaxed accesses pass messages") {
    const auto device = test_device();
    const auto stream = device->create_stream();
    auto* words = static_cast<uint32_t*>(device->allocate(1024 * sizeof(uint32_t)));
    dev::LaunchConfig config;
    config.num_blocks = 2;
    config.num_threads = 256;
    config.is_cooperative = true;
    config.name = "fence";
    dev::launch<FenceKernel>(config, stream, {words, words + 512, words + 576, words + 640, 500});
    device->synchronize_stream(stream);
    uint32_t num_wrong = 1;
    device->copy_now(&num_wrong, words + 640, sizeof(num_wrong));
    CHECK_EQ(num_wrong, 0u);
    device->free(words);
    device->destroy_stream(stream);
}

// Three stores in flight: bulk_wait_read<2>, <1>, <0> give slots back in the order in which they were committed, and
// several stores may share a group.
struct GroupsKernel {
    struct Params {
        uint32_t* rows;  // [num_rows][2][32]
        int num_rows;
    };
    struct Shared {
        alignas(16) uint32_t slots[3][2][32];
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        if (!prim::has_bulk_copy()) return;
        for (int row = 0; row < p.num_rows; ++row) {
            uint32_t(*slot)[32] = shared.slots[row % 3];
            if (threadIdx.x == 0) prim::bulk_wait_read<2>();
            __syncwarp();
            for (int half = 0; half < 2; ++half)
                slot[half][threadIdx.x] = static_cast<uint32_t>((row * 2 + half) * 32) + threadIdx.x;
            prim::fence_async_shared();
            __syncwarp();
            if (threadIdx.x != 0) continue;
            prim::bulk_store(p.rows + row * 64, slot[0], 128);
            prim::bulk_store(p.rows + row * 64 + 32, slot[1], 128);
            prim::bulk_commit();
        }
        if (threadIdx.x == 0) {
            prim::bulk_wait_read<1>();
            prim::bulk_wait<0>();
            prim::fence_async_global();
        }
    }
};

TEST_CASE("bulk groups are waited for in the order of their commits") {
    if (!test_device()->has_bulk_copy()) {
        MESSAGE("skipped: no bulk copies here");
        return;
    }
    const auto got = results_of<GroupsKernel>(kWarp, 40 * 64, 40);
    int num_wrong = 0;
    for (uint32_t i = 0; i < got.size(); ++i) num_wrong += got[i] != i;
    CHECK_EQ(num_wrong, 0);
}

}  // namespace
}  // namespace deep_ep::testing
