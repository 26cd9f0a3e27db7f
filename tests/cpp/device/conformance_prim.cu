// The primitives: what they return, what they order, and bulk copies against both proxies. One source, run by the CPU
// executor (conformance_test.cc) and on a GPU (device_cuda.cmake).
#include <cstring>
#include <iterator>
#include <numeric>
#include <vector>

#include "core/non_copyable.h"
#include "device/launch.h"
#include "device/prim.h"
#include "device/test_device.h"
#include "support/testing.h"

namespace deep_ep::testing {
namespace {

using prim::Order;
using prim::Scope;
using prim::Vec16;

// Device memory with values, for the life of a test.
template <class T> class Words : NonCopyable {
public:
    explicit Words(size_t count) : count_(count), data_(static_cast<T*>(test_device()->allocate(count * sizeof(T)))) {}
    explicit Words(const std::vector<T>& values) : Words(values.size()) {
        test_device()->copy_now(data_, values.data(), count_ * sizeof(T));
    }
    ~Words() { test_device()->free(data_); }

    T* data() const { return data_; }
    std::vector<T> read() const {
        std::vector<T> values(count_);
        test_device()->copy_now(values.data(), data_, count_ * sizeof(T));
        return values;
    }

private:
    size_t count_;
    T* data_;
};

template <class K>
void run(int num_blocks, int num_threads, const typename K::Params& params, int dynamic_shared_bytes = 0) {
    const auto device = test_device();
    const auto stream = device->create_stream();
    dev::LaunchConfig config;
    config.num_blocks = num_blocks;
    config.num_threads = num_threads;
    config.dynamic_shared_bytes = dynamic_shared_bytes;
    config.is_cooperative = num_blocks > 1;
    config.name = "test";
    dev::launch<K>(config, stream, params);
    device->synchronize_stream(stream);
    device->destroy_stream(stream);
}

// ---------------------------------------------------------------------------------------------------------------
// Accesses
// ---------------------------------------------------------------------------------------------------------------

template <class T, Scope S> struct AccessKernel {
    struct Params {
        T* words;  // [0] stored, [1] added to, [2] swapped, [3...] results; [12] more bits set
    };
    struct Shared {
        T word;
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        if (threadIdx.x != 0) return;
        T* words = p.words;
        prim::store<Order::kRelaxed, S>(&words[0], static_cast<T>(-5));
        words[3] = prim::load<Order::kAcquire, S>(&words[0]);
        prim::store<Order::kRelease, S>(&words[0], static_cast<T>(7));
        words[4] = prim::load<Order::kRelaxed, S>(&words[0]);
        words[5] = prim::fetch_add<Order::kRelaxed, S>(&words[1], static_cast<T>(40));
        words[6] = prim::fetch_add<Order::kAcquire, S>(&words[1], static_cast<T>(-1));
        words[7] = prim::fetch_add<Order::kRelease, S>(&words[1], static_cast<T>(-50));
        words[8] = prim::fetch_add<Order::kAcqRel, S>(&words[1], static_cast<T>(1));
        words[9] = prim::compare_swap<Order::kAcqRel, S>(&words[2], static_cast<T>(1), static_cast<T>(9));
        words[10] = prim::compare_swap<Order::kRelaxed, S>(&words[2], static_cast<T>(0), static_cast<T>(9));
        prim::fence<Order::kAcqRel, S>();
        prim::store<Order::kRelaxed, Scope::kCta>(&shared.word, static_cast<T>(3));
        prim::fetch_add<Order::kAcqRel, Scope::kCta>(&shared.word, static_cast<T>(4));
        words[11] = prim::load<Order::kRelaxed, Scope::kCta>(&shared.word);
        prim::store<Order::kRelaxed, S>(&words[12], static_cast<T>(5));
        words[13] = prim::fetch_or<Order::kAcqRel, S>(&words[12], static_cast<T>(6));
        words[14] = 41;
        auto* count = reinterpret_cast<uint32_t*>(&words[14]);
        words[15] = prim::fetch_increment<Order::kRelaxed, S>(count);
        words[16] = prim::fetch_increment<Order::kAcqRel, S>(count);
    }
};

template <class T, Scope S> void check_accesses() {
    Words<T> words(17);
    run<AccessKernel<T, S>>(1, 32, {words.data()});
    const auto got = words.read();
    const std::vector<T> expected{
        7, static_cast<T>(-10), 9, static_cast<T>(-5), 7, 0, 40, 39, static_cast<T>(-11), 0, 0, 7, 7, 5, 43, 41, 42};
    for (size_t i = 0; i < expected.size(); ++i) CHECK_EQ(got[i], expected[i]);
}

template <class T> void check_accesses_at_every_scope() {
    check_accesses<T, Scope::kCta>();
    check_accesses<T, Scope::kGpu>();
    check_accesses<T, Scope::kSys>();
}

TEST_CASE("loads, stores and atomics give what was there, for each type and scope") {
    check_accesses_at_every_scope<int32_t>();
    check_accesses_at_every_scope<uint32_t>();
    check_accesses_at_every_scope<int64_t>();
    check_accesses_at_every_scope<uint64_t>();
    check_accesses_at_every_scope<unsigned long long>();
}

struct CopyKernel {
    struct Params {
        const Vec16* source;
        Vec16* by_input;
        Vec16* by_peer;
        int num_vecs;
    };
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        for (int i = static_cast<int>(threadIdx.x); i < p.num_vecs; i += static_cast<int>(blockDim.x)) {
            prim::store_streaming(p.by_input + i, prim::load_input(p.source + i));
            prim::store_streaming(p.by_peer + i, prim::load_shared_with_peers(p.source + i));
        }
    }
};

std::vector<uint32_t> numbers(size_t count, uint32_t seed) {
    std::vector<uint32_t> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = static_cast<uint32_t>(i) * 2654435761u + seed;
    return values;
}

TEST_CASE("16-byte accesses move every bit") {
    const auto values = numbers(4 * 1000, 1);
    Words<uint32_t> source(values), by_input(values.size()), by_peer(values.size());
    run<CopyKernel>(1, 128,
                    {reinterpret_cast<const Vec16*>(source.data()), reinterpret_cast<Vec16*>(by_input.data()),
                     reinterpret_cast<Vec16*>(by_peer.data()), 1000});
    CHECK(by_input.read() == values);
    CHECK(by_peer.read() == values);
}

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------------------------

struct RoundKernel {
    struct Params {
        const uint32_t* floats;  // by their bits
        uint32_t* pairs;
        int num_pairs;
    };
    struct Shared {};

    static EP_DEVICE float value(uint32_t bits) {
        float result;
        memcpy(&result, &bits, sizeof(result));
        return result;
    }

    static EP_DEVICE void run(const Params& p, Shared&) {
        for (int i = static_cast<int>(threadIdx.x); i < p.num_pairs; i += static_cast<int>(blockDim.x))
            p.pairs[i] = prim::round_to_bf16x2(value(p.floats[2 * i]), value(p.floats[2 * i + 1]));
    }
};

uint32_t nearest_bf16(uint32_t bits) {
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    const uint32_t rest = bits & 0xffffu;
    const bool goes_up = rest > 0x8000u || (rest == 0x8000u && (bits >> 16 & 1u) != 0);
    return (bits >> 16) + (goes_up ? 1 : 0);
}

TEST_CASE("floats become the nearest bfloat16, ties the even one, every NaN the same") {
    auto floats = numbers(2 * 4000, 3);
    const uint32_t special[] = {0x00000000, 0x80000000, 0x00000001, 0x80008000, 0x3f808000, 0x3f818000,
                                0x3f808001, 0x7f7fffff, 0x7f7f8000, 0xff7f7fff, 0x7f800000, 0xff800000,
                                0x7fc00000, 0xffc00001, 0x7f800001, 0xffffffff, 0x00018000, 0x007fffff};
    for (size_t i = 0; i < std::size(special); ++i) floats[i] = special[i];
    std::vector<uint32_t> expected(floats.size() / 2);
    for (size_t i = 0; i < expected.size(); ++i)
        expected[i] = nearest_bf16(floats[2 * i]) | nearest_bf16(floats[2 * i + 1]) << 16;
    Words<uint32_t> source(floats), pairs(expected.size());
    run<RoundKernel>(1, 128, {source.data(), pairs.data(), static_cast<int>(expected.size())});
    CHECK(pairs.read() == expected);
}

// ---------------------------------------------------------------------------------------------------------------
// Order
// ---------------------------------------------------------------------------------------------------------------

// Block 0 writes a row with all its threads, meets in a barrier, and one thread publishes it; block 1 the other way
// round. A round ends when the receiver has given the row back.
template <Scope S> struct MessageKernel {
    struct Params {
        uint32_t* row;    // [blockDim]
        uint64_t* full;   // the round that is written
        uint64_t* empty;  // the round that has been read
        uint32_t* num_wrong;
        int num_rounds;
    };
    struct Shared {};

    static EP_DEVICE void wait(const uint64_t* flag, uint64_t round) {
        if (threadIdx.x == 0)
            while (prim::load<Order::kAcquire, S>(flag) < round) prim::pause();
        __syncthreads();
    }
    static EP_DEVICE void tell(uint64_t* flag, uint64_t round) {
        __syncthreads();
        if (threadIdx.x == 0) prim::store<Order::kRelease, S>(flag, round);
    }

    static EP_DEVICE void run(const Params& p, Shared&) {
        for (int i = 1; i <= p.num_rounds; ++i) {
            const auto round = static_cast<uint64_t>(i);
            const uint32_t value = static_cast<uint32_t>(i) * 1000u + threadIdx.x;
            if (blockIdx.x == 0) {
                wait(p.empty, round - 1);
                p.row[threadIdx.x] = value;
                tell(p.full, round);
            } else {
                wait(p.full, round);
                if (p.row[threadIdx.x] != value) prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.num_wrong, 1u);
                tell(p.empty, round);
            }
        }
    }
};

template <Scope S> uint32_t count_wrong_messages() {
    Words<uint32_t> row(256), num_wrong(1);
    Words<uint64_t> full(1), empty(1);
    run<MessageKernel<S>>(2, 256, {row.data(), full.data(), empty.data(), num_wrong.data(), 2000});
    return num_wrong.read()[0];
}

TEST_CASE("what a block wrote before a release is there after the acquire of another") {
    CHECK_EQ(count_wrong_messages<Scope::kGpu>(), 0u);
    CHECK_EQ(count_wrong_messages<Scope::kSys>(), 0u);
}

// Block 0 sends a word to each thread of block 1, round after round, in the same places: no flag says that they are there.
template <Scope S> struct PacketKernel {
    struct Params {
        prim::Packet* row;  // [blockDim]
        uint64_t* empty;    // the round that has been read
        uint32_t* num_wrong;
        int num_rounds;
    };
    struct Shared {};

    static EP_DEVICE uint32_t value_of(uint32_t round) { return round * 1000u + threadIdx.x; }

    static EP_DEVICE void send(const Params& p, uint32_t round) {
        if (threadIdx.x == 0)
            while (prim::load<Order::kAcquire, S>(p.empty) + 1 < round) prim::pause();
        __syncthreads();
        prim::store_packet<S>(&p.row[threadIdx.x], round, value_of(round));
    }
    static EP_DEVICE void receive(const Params& p, uint32_t round) {
        uint32_t data = 0;
        while (!prim::load_packet<S>(&p.row[threadIdx.x], round, data)) prim::pause();
        if (data != value_of(round)) prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.num_wrong, 1u);
        if (prim::load_packet<S>(&p.row[threadIdx.x], round + 1, data))
            prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.num_wrong, 1u);
        __syncthreads();
        if (threadIdx.x == 0) prim::store<Order::kRelease, S>(p.empty, static_cast<uint64_t>(round));
    }

    static EP_DEVICE void run(const Params& p, Shared&) {
        for (int i = 1; i <= p.num_rounds; ++i) {
            if (blockIdx.x == 0)
                send(p, static_cast<uint32_t>(i));
            else
                receive(p, static_cast<uint32_t>(i));
        }
    }
};

template <Scope S> uint32_t count_wrong_packets() {
    Words<prim::Packet> row(256);
    Words<uint32_t> num_wrong(1);
    Words<uint64_t> empty(1);
    run<PacketKernel<S>>(2, 256, {row.data(), empty.data(), num_wrong.data(), 2000});
    return num_wrong.read()[0];
}

TEST_CASE("packets are there with their epoch, whole, and not before") {
    CHECK_EQ(count_wrong_packets<Scope::kGpu>(), 0u);
    CHECK_EQ(count_wrong_packets<Scope::kSys>(), 0u);
}

// Warps 0 and 1 pass a word to and fro through named barriers while warps 2 and 3 use another barrier.
struct NamedBarrierKernel {
    struct Params {
        uint32_t* results;  // [4]
        int num_rounds;
    };
    struct Shared {
        uint32_t sums[2][64];
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const int pair = static_cast<int>(threadIdx.x) / 64;
        const int place = static_cast<int>(threadIdx.x) % 64;
        uint32_t* sums = shared.sums[pair];
        sums[place] = 0;
        prim::barrier_sync(pair + 1, 64);
        for (int i = 0; i < p.num_rounds * (pair + 1); ++i) {
            const uint32_t seen = sums[63 - place];
            prim::barrier_sync(pair + 1, 64);
            sums[place] = seen + 1;
            prim::barrier_sync(pair + 1, 64);
        }
        if (place == 0) p.results[pair] = sums[0];
    }
};

TEST_CASE("named barriers hold their own threads and no others") {
    Words<uint32_t> results(2);
    run<NamedBarrierKernel>(1, 128, {results.data(), 500});
    CHECK_EQ(results.read()[0], 500u);
    CHECK_EQ(results.read()[1], 1000u);
}

// In round i thread i alone says yes, and in the round after it nobody.
struct BlockVoteKernel {
    struct Params {
        uint32_t* num_wrong;
    };
    struct Shared {
        uint32_t word;
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const int thread = static_cast<int>(threadIdx.x);
        const int num_threads = static_cast<int>(blockDim.x);
        for (int round = 0; round < num_threads; ++round) {
            if (thread == round) shared.word = static_cast<uint32_t>(round);
            bool is_right = prim::sync_block_any(thread == round, __FILE__, __LINE__);
            is_right &= shared.word == static_cast<uint32_t>(round);  // it is a barrier too
            is_right &= !prim::sync_block_any(false, __FILE__, __LINE__);
            if (!is_right) prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.num_wrong, 1u);
        }
    }
};

TEST_CASE("one thread's answer in a barrier of the block is known to all, and forgotten by the next") {
    Words<uint32_t> num_wrong(1);
    run<BlockVoteKernel>(1, 96, {num_wrong.data()});
    CHECK_EQ(num_wrong.read()[0], 0u);
}

struct ClockKernel {
    struct Params {
        uint64_t* times;  // [2]
        uint64_t* alignment;
    };
    struct Shared {
        char odd[3];
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        if (threadIdx.x != 0) return;
        shared.odd[0] = 1;
        p.times[0] = prim::clock_ns();
        while (prim::clock_ns() - p.times[0] < 200'000) prim::pause();
        p.times[1] = prim::clock_ns();
        *p.alignment = reinterpret_cast<uint64_t>(prim::dynamic_shared()) % 128;
    }
};

TEST_CASE("the clock runs on while a thread pauses, and dynamic shared memory is aligned") {
    Words<uint64_t> times(2), alignment(1);
    run<ClockKernel>(1, 32, {times.data(), alignment.data()}, 1024);
    CHECK_GE(times.read()[1] - times.read()[0], 200'000u);
    CHECK_EQ(alignment.read()[0], 0u);
}

// ---------------------------------------------------------------------------------------------------------------
// mbarriers and bulk copies
// ---------------------------------------------------------------------------------------------------------------

// Every thread arrives and waits, phase after phase; the word may only move when all have arrived.
struct PhaseKernel {
    struct Params {
        uint32_t* num_wrong;
        int num_phases;
    };
    struct Shared {
        prim::MBarrier bar;
        uint32_t count;
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        if (threadIdx.x == 0) {
            prim::mbarrier_init(&shared.bar, blockDim.x);
            prim::mbarrier_init_fence();
            shared.count = 0;
        }
        __syncthreads();
        for (int phase = 0; phase < p.num_phases; ++phase) {
            prim::fetch_add<Order::kRelaxed, Scope::kCta>(&shared.count, 1u);
            prim::mbarrier_arrive(&shared.bar);
            while (!prim::mbarrier_try_wait(&shared.bar, static_cast<uint32_t>(phase) % 2)) prim::pause();
            if (prim::load<Order::kRelaxed, Scope::kCta>(&shared.count) < (phase + 1) * blockDim.x)
                prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.num_wrong, 1u);
        }
    }
};

TEST_CASE("an mbarrier completes a phase when all have arrived, and tells phases apart") {
    Words<uint32_t> num_wrong(1);
    run<PhaseKernel>(1, 96, {num_wrong.data(), 301});
    CHECK_EQ(num_wrong.read()[0], 0u);
}

// One thread moves `num_rows` rows through a ring of shared-memory stages; between load and store all threads add one
// to each word: the row passes from the async proxy to the generic one and back.
struct RingKernel {
    static constexpr int kStages = 3;
    struct Params {
        const uint32_t* source;
        uint32_t* destination;
        int num_rows, row_words;
    };
    struct Shared {
        prim::MBarrier full[kStages];
    };

    static EP_DEVICE uint32_t* stage(const Params& p, int row) {
        return static_cast<uint32_t*>(prim::dynamic_shared()) + (row % kStages) * p.row_words;
    }
    static EP_DEVICE void load_row(const Params& p, Shared& shared, int row) {
        const auto bytes = static_cast<uint32_t>(p.row_words) * 4;
        prim::MBarrier* bar = &shared.full[row % kStages];
        prim::mbarrier_arrive_expect_tx(bar, bytes);
        prim::bulk_load(stage(p, row), p.source + static_cast<int64_t>(row) * p.row_words, bytes, bar);
    }
    static EP_DEVICE void store_row(const Params& p, int row) {
        prim::bulk_store(p.destination + static_cast<int64_t>(row) * p.row_words, stage(p, row),
                         static_cast<uint32_t>(p.row_words) * 4);
        prim::bulk_commit();
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        if (!prim::has_bulk_copy()) return;
        if (threadIdx.x == 0) {
            for (int i = 0; i < kStages; ++i) prim::mbarrier_init(&shared.full[i], 1);
            prim::mbarrier_init_fence();
            for (int row = 0; row < kStages - 1 && row < p.num_rows; ++row) load_row(p, shared, row);
        }
        __syncthreads();
        for (int row = 0; row < p.num_rows; ++row) {
            while (!prim::mbarrier_try_wait(&shared.full[row % kStages], static_cast<uint32_t>(row / kStages) % 2))
                prim::pause();
            for (int i = static_cast<int>(threadIdx.x); i < p.row_words; i += static_cast<int>(blockDim.x))
                stage(p, row)[i] += 1;
            prim::fence_async_shared();  // each writer, before the barrier that the issuing thread waits in
            __syncthreads();
            if (threadIdx.x != 0) continue;
            store_row(p, row);
            // The stage that the next load fills was the source of the store before this one.
            prim::bulk_wait_read<1>();
            if (row + kStages - 1 < p.num_rows) load_row(p, shared, row + kStages - 1);
        }
        if (threadIdx.x == 0) prim::bulk_wait<0>();
    }
};

TEST_CASE("rows go through a ring of bulk loads and stores unharmed") {
    if (!test_device()->has_bulk_copy()) {
        MESSAGE("skipped: no bulk copies here");
        return;
    }
    for (const int row_words : {4, 128, 3584}) {
        const int num_rows = 50;
        auto values = numbers(static_cast<size_t>(num_rows * row_words), 7);
        Words<uint32_t> source(values), destination(values.size());
        run<RingKernel>(1, 128, {source.data(), destination.data(), num_rows, row_words},
                        RingKernel::kStages * row_words * 4);
        for (uint32_t& value : values) value += 1;
        CHECK(destination.read() == values);
    }
}

// Block 0 fills a row in shared memory, bulk-stores it to a slot and publishes it; block 1 bulk-loads it, checks it and
// gives the slot back.
struct BulkMessageKernel {
    static constexpr int kWords = 1024;
    struct Params {
        uint32_t* slot;  // [kWords]
        uint64_t* full;
        uint64_t* empty;
        uint32_t* num_wrong;
        int num_rounds;
    };
    struct Shared {
        prim::MBarrier bar;
    };

    static EP_DEVICE void send(const Params& p, uint32_t* row, int round) {
        for (int i = static_cast<int>(threadIdx.x); i < kWords; i += static_cast<int>(blockDim.x))
            row[i] = static_cast<uint32_t>(round * kWords + i);
        prim::fence_async_shared();
        __syncthreads();
        if (threadIdx.x != 0) return;
        while (prim::load<Order::kAcquire, Scope::kSys>(p.empty) + 1 < static_cast<uint64_t>(round)) prim::pause();
        prim::bulk_store(p.slot, row, kWords * 4);
        prim::bulk_commit();
        prim::bulk_wait<0>();
        prim::fence_async_global();
        prim::store<Order::kRelease, Scope::kSys>(p.full, static_cast<uint64_t>(round));
    }

    static EP_DEVICE void receive(const Params& p, Shared& shared, uint32_t* row, int round) {
        if (threadIdx.x == 0) {
            while (prim::load<Order::kAcquire, Scope::kSys>(p.full) < static_cast<uint64_t>(round)) prim::pause();
            prim::fence_async_global();
            prim::mbarrier_arrive_expect_tx(&shared.bar, kWords * 4);
            prim::bulk_load(row, p.slot, kWords * 4, &shared.bar);
        }
        while (!prim::mbarrier_try_wait(&shared.bar, static_cast<uint32_t>(round - 1) % 2)) prim::pause();
        for (int i = static_cast<int>(threadIdx.x); i < kWords; i += static_cast<int>(blockDim.x)) {
            if (row[i] != static_cast<uint32_t>(round * kWords + i))
                prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.num_wrong, 1u);
        }
        prim::fence_async_shared();  // the row is read; the next load may overwrite it
        __syncthreads();
        if (threadIdx.x == 0) prim::store<Order::kRelease, Scope::kSys>(p.empty, static_cast<uint64_t>(round));
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        if (!prim::has_bulk_copy()) return;
        auto* row = static_cast<uint32_t*>(prim::dynamic_shared());
        if (threadIdx.x == 0) {
            prim::mbarrier_init(&shared.bar, 1);
            prim::mbarrier_init_fence();
        }
        __syncthreads();
        for (int round = 1; round <= p.num_rounds; ++round) {
            if (blockIdx.x == 0)
                send(p, row, round);
            else
                receive(p, shared, row, round);
            __syncthreads();
        }
    }
};

TEST_CASE("a row that was bulk-stored and published is there for a bulk load") {
    if (!test_device()->has_bulk_copy()) {
        MESSAGE("skipped: no bulk copies here");
        return;
    }
    Words<uint32_t> slot(BulkMessageKernel::kWords), num_wrong(1);
    Words<uint64_t> full(1), empty(1);
    run<BulkMessageKernel>(2, 256, {slot.data(), full.data(), empty.data(), num_wrong.data(), 1000},
                           BulkMessageKernel::kWords * 4);
    CHECK_EQ(num_wrong.read()[0], 0u);
}

// Adds `addend` to `sums`.
struct AddKernel {
    static constexpr int kVecs = 512;
    struct Params {
        const Vec16* addend;  // [kVecs], eight bfloat16 each
        Vec16* sums;
    };
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        if (!prim::has_bf16_add()) return;
        for (int i = static_cast<int>(threadIdx.x); i < kVecs; i += static_cast<int>(blockDim.x))
            prim::add_bf16(p.sums + i, p.addend[i]);
    }
};

TEST_CASE("sums of bfloat16 in memory are those of FP32, rounded") {
    if (!test_device()->has_bulk_copy()) {
        MESSAGE("skipped: no such instruction here");
        return;
    }
    auto addend = numbers(4 * AddKernel::kVecs, 11), before = numbers(4 * AddKernel::kVecs, 12);
    for (size_t i = 0; i < addend.size(); i += 2) before[i] = addend[i] ^ 0x00010001u;  // next to each other
    Words<uint32_t> sums(before);
    const Words<uint32_t> added(addend);
    run<AddKernel>(1, 128, {reinterpret_cast<const Vec16*>(added.data()), reinterpret_cast<Vec16*>(sums.data())});
    const auto found = sums.read();
    const auto value = [](uint32_t word, int half) {
        const uint32_t bits = word >> (16 * half) << 16;
        float result;
        std::memcpy(&result, &bits, sizeof(result));
        return result;
    };
    int num_wrong = 0;
    for (size_t i = 0; i < addend.size(); ++i)
        for (int half = 0; half < 2; ++half) {
            const float sum = value(addend[i], half) + value(before[i], half);
            uint32_t bits;
            std::memcpy(&bits, &sum, sizeof(bits));
            const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
            const float result = value(found[i], half);
            num_wrong += sum != sum ? result == result : result != value(rounded, 0);
        }
    CHECK_EQ(num_wrong, 0);
}

}  // namespace
}  // namespace deep_ep::testing
