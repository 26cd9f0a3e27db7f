// What every engine must do, in kernels that know none: run over `host` on the CPU and on GPUs, and over `sim`.
#include <cstring>
#include <vector>

#include "device/launch.h"
#include "rail/rail.h"
#include "rail/rail_world.h"
#include "support/testing.h"

namespace deep_ep::testing {
namespace {

using prim::Order;
using prim::Scope;

// Places in the window of every rank. [x][y] is row-major.
struct Places {
    int num_ranks;
    int num_slots;
    uint32_t slot_bytes;

    EP_HOST_DEVICE uint64_t word(int kind, int rank, int slot) const {
        return 8 * static_cast<uint64_t>((kind * num_ranks + rank) * num_slots + slot);
    }
    EP_HOST_DEVICE uint64_t arrived(int rank, int slot) const { return word(0, rank, slot); }
    EP_HOST_DEVICE uint64_t taken(int rank, int slot) const { return word(1, rank, slot); }
    EP_HOST_DEVICE uint64_t counter() const { return word(2, 0, 0); }
    EP_HOST_DEVICE uint64_t abort() const { return word(3, 0, 0); }
    EP_HOST_DEVICE uint64_t data(int kind, int rank, int slot) const {
        const uint64_t words = (word(4, 0, 0) + 127) / 128 * 128;
        return words + static_cast<uint64_t>((kind * num_ranks + rank) * num_slots + slot) * slot_bytes;
    }
    EP_HOST_DEVICE uint64_t staging(int rank, int slot) const { return data(0, rank, slot); }
    EP_HOST_DEVICE uint64_t received(int rank, int slot) const { return data(1, rank, slot); }
    EP_HOST_DEVICE uint64_t bytes() const { return data(2, 0, 0); }
};

EP_HOST_DEVICE uint32_t mix(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    uint64_t z = a * 0x9e3779b97f4a7c15ull + b * 0xbf58476d1ce4e5b9ull + c * 0x94d049bb133111ebull + d;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(z ^ (z >> 31));
}

struct Traffic {
    rail::Params rail;
    Places places;
    int rank;
    int num_messages;  // to each peer
    uint64_t seed;     // of sizes and contents
    uint64_t call;
    uint64_t timeout_ns;
    uint64_t* num_errors;  // words that were wrong
    uint64_t* num_lost;    // waits that gave up

    EP_HOST_DEVICE uint32_t num_words(int from, int to, int message) const {
        const uint32_t all = places.slot_bytes / 4;
        const uint32_t drawn = mix(seed, static_cast<uint64_t>(from * places.num_ranks + to), call,
                                   static_cast<uint64_t>(message));
        return drawn % 4 == 0 ? drawn / 4 % 3 : drawn % (all + 1);  // every fourth is empty or tiny
    }
    EP_HOST_DEVICE uint32_t content(int from, int to, int message, uint32_t word) const {
        return mix(seed + call, static_cast<uint64_t>(from * places.num_ranks + to), static_cast<uint64_t>(message),
                   word);
    }
    EP_HOST_DEVICE uint64_t tag(int message) const { return call << 32 | static_cast<uint64_t>(message + 1); }
};

// The caller's wait that an engine may use: gives up after a while, or when this rank is told to.
struct Patience {
    const rail::Rail& rail;
    uint64_t abort_at;
    uint64_t timeout_ns;

    template <class Look> EP_DEVICE bool operator()(uint64_t, const Look& look) const {
        uint64_t seen = 0;
        const uint64_t start_ns = timeout_ns == 0 ? 0 : prim::clock_ns();
        while (!look(seen)) {
            if (prim::load<Order::kRelaxed, Scope::kSys>(rail::at<uint64_t>(rail, abort_at)) != 0) return false;
            if (timeout_ns != 0 && prim::clock_ns() - start_ns > timeout_ns) return false;
            prim::pause();
        }
        return true;
    }
};

EP_DEVICE void count(uint64_t* counter, uint64_t n) {
    if (n != 0) prim::fetch_add<Order::kRelaxed, Scope::kGpu>(counter, n);
}

// One thread.
EP_DEVICE bool wait_for_word(const rail::Rail& rail, const Patience& patience, uint64_t offset, uint64_t value) {
    const bool is_here = patience(value, [&](uint64_t& seen) {
        seen = prim::load<Order::kRelaxed, Scope::kSys>(rail::at<uint64_t>(rail, offset));
        return seen >= value;
    });
    if (is_here) rail::confirm(rail, {offset, value});
    return is_here;
}

// One warp.
EP_DEVICE bool wait_for_flag(const rail::Rail& rail, const Patience& patience, uint64_t offset, uint64_t value) {
    const bool is_here = prim::lane_idx() == 0 && wait_for_word(rail, patience, offset, value);
    __syncwarp();  // one lane's confirm, each lane's reads
    return __any_sync(prim::kFullMask, is_here);
}

// Every rank sends a stream of messages to every other, through slots that are used again; each has a warp that sends to
// each peer and one that receives from each.
struct StreamsKernel {
    using Params = Traffic;
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const rail::Rail rail(p.rail);
        const Patience patience{rail, p.places.abort(), p.timeout_ns};
        const int num_peers = p.places.num_ranks - 1;
        const int index = prim::warp_idx() % num_peers;
        const int peer = index < p.rank ? index : index + 1;
        const bool is_whole = prim::warp_idx() < num_peers ? send(p, rail, patience, peer) : receive(p, rail, patience, peer);
        if (!is_whole && prim::lane_idx() == 0) count(p.num_lost, 1);
    }

    static EP_DEVICE bool send(const Params& p, const rail::Rail& rail, const Patience& patience, int peer) {
        const int num_slots = p.places.num_slots;
        for (int i = 0; i < p.num_messages; ++i) {
            const int slot = i % num_slots;
            if (i >= num_slots &&
                !wait_for_flag(rail, patience, p.places.taken(peer, slot), p.tag(i - num_slots)))
                return false;
            auto* words = rail::at<uint32_t>(rail, p.places.staging(peer, slot));
            const uint32_t num_words = p.num_words(p.rank, peer, i);
            for (uint32_t w = static_cast<uint32_t>(prim::lane_idx()); w < num_words; w += prim::kWarpSize)
                words[w] = p.content(p.rank, peer, i, w);
            const rail::Copy copy{p.places.received(p.rank, slot), p.places.staging(peer, slot), 4 * num_words};
            if (!rail::put(rail, peer, copy, {p.places.arrived(p.rank, slot), p.tag(i)}, patience)) return false;
        }
        return true;
    }

    static EP_DEVICE bool receive(const Params& p, const rail::Rail& rail, const Patience& patience, int peer) {
        const int num_slots = p.places.num_slots;
        for (int i = 0; i < p.num_messages; ++i) {
            const int slot = i % num_slots;
            if (!wait_for_flag(rail, patience, p.places.arrived(peer, slot), p.tag(i))) return false;
            auto* words = rail::at<uint32_t>(rail, p.places.received(peer, slot));
            const uint32_t num_words = p.num_words(peer, p.rank, i);
            uint64_t num_errors = 0;
            for (uint32_t w = static_cast<uint32_t>(prim::lane_idx()); w < num_words; w += prim::kWarpSize) {
                num_errors += words[w] != p.content(peer, p.rank, i, w);
                words[w] = 0;  // what the next message leaves out shows
            }
            count(p.num_errors, num_errors);
            __syncwarp();
            bool is_posted = true;
            if (prim::lane_idx() == 0 && i + num_slots < p.num_messages)
                is_posted = rail::set(rail, peer, {p.places.taken(p.rank, slot), p.tag(i)}, patience);
            if (!__all_sync(prim::kFullMask, is_posted)) return false;
        }
        return true;
    }
};

// Every thread of every rank adds to the counter of every peer, then waits for the sum of all.
struct AddsKernel {
    using Params = Traffic;
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const rail::Rail rail(p.rail);
        const Patience patience{rail, p.places.abort(), p.timeout_ns};
        bool is_whole = true;
        for (int i = 0; i < p.num_messages; ++i)
            for (int peer = 0; peer < p.places.num_ranks && is_whole; ++peer)
                if (peer != p.rank) is_whole = rail::add(rail, peer, p.places.counter(), threadIdx.x + 1, patience);
        __syncwarp();
        const uint64_t of_one = static_cast<uint64_t>(blockDim.x) * (blockDim.x + 1) / 2;
        const uint64_t of_all = of_one * static_cast<uint64_t>((p.places.num_ranks - 1) * p.num_messages);
        if (threadIdx.x == 0)
            is_whole = is_whole && wait_for_word(rail, patience, p.places.counter(), p.call * of_all);
        if (!is_whole) count(p.num_lost, 1);
    }
};

// A put of which the peer's kernel reads nothing: waits until it is told to stop.
struct WaitKernel {
    using Params = Traffic;
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const rail::Rail rail(p.rail);
        const Patience patience{rail, p.places.abort(), p.timeout_ns};
        if (threadIdx.x != 0) return;
        const bool is_here = wait_for_word(rail, patience, p.places.arrived(p.rank, 0), ~uint64_t{0});
        const uint64_t told = prim::load<Order::kRelaxed, Scope::kSys>(rail::at<uint64_t>(rail, p.places.abort()));
        if (told != 0) rail::confirm(rail, {p.places.abort(), told});
        count(p.num_lost, is_here ? 0 : 1);
        count(p.num_errors, told);
    }
};

// A world, and what its kernels count.
class Case {
public:
    Case(const RailOptions& options, const Places& places, int num_messages)
        : places_(places), num_messages_(num_messages), seed_(options.seed) {
        RailOptions sized = options;
        sized.num_ranks = places.num_ranks;
        sized.window_bytes = places.bytes();
        world_ = make_rail_world(sized);
        for (int rank = 0; rank < places.num_ranks; ++rank)
            counts_.push_back(static_cast<uint64_t*>(world_->device(rank).allocate(2 * sizeof(uint64_t))));
    }
    ~Case() {
        for (int rank = 0; rank < places_.num_ranks; ++rank) world_->device(rank).free(counts_[static_cast<size_t>(rank)]);
    }
    Case(const Case&) = delete;
    Case& operator=(const Case&) = delete;

    Traffic traffic(int rank, uint64_t call) const {
        uint64_t* counts = counts_[static_cast<size_t>(rank)];
        return {world_->engine(rank).params(), places_,  rank,      num_messages_, seed_, call, RailWorld::timeout_ns(),
                counts,                        counts + 1};
    }
    template <class K> void run(int num_warps, uint64_t call, const std::function<void()>& beside = [] {}) {
        world_->run(
            [&](int rank, dev::Stream stream) {
                dev::LaunchConfig config;
                config.num_threads = num_warps * prim::kWarpSize;
                config.name = "rail";
                dev::launch<K>(config, stream, traffic(rank, call));
            },
            beside);
    }
    // [0] errors, [1] lost
    std::vector<uint64_t> counts(int rank) {
        std::vector<uint64_t> values(2);
        world_->device(rank).copy_now(values.data(), counts_[static_cast<size_t>(rank)], 2 * sizeof(uint64_t));
        return values;
    }
    void check_clean() {
        for (int rank = 0; rank < places_.num_ranks; ++rank) {
            CHECK_EQ(counts(rank)[0], 0);
            CHECK_EQ(counts(rank)[1], 0);
        }
    }
    RailWorld& world() { return *world_; }

private:
    const Places places_;
    const int num_messages_;
    const uint64_t seed_;
    std::unique_ptr<RailWorld> world_;
    std::vector<uint64_t*> counts_;
};

void check_streams(const RailOptions& options, const Places& places, int num_messages, uint64_t num_calls) {
    Case test(options, places, num_messages);
    rail::Traffic expected{};
    for (uint64_t call = 1; call <= num_calls; ++call) {
        test.run<StreamsKernel>(2 * (places.num_ranks - 1), call);
        test.check_clean();
        const int num_taken = num_messages > places.num_slots ? num_messages - places.num_slots : 0;
        expected.num_messages += static_cast<uint64_t>(num_messages + num_taken);
        for (int i = 0; i < num_messages; ++i) expected.num_bytes += 4 * test.traffic(0, call).num_words(0, 1, i);
    }
    CHECK_EQ(test.world().engine(0).sent_to(1).num_messages, expected.num_messages);
    CHECK_EQ(test.world().engine(0).sent_to(1).num_bytes, expected.num_bytes);
}

TEST_CASE("rail: puts come with their flags, through slots that are used again") {
    for (const uint64_t seed : RailWorld::seeds()) {
        CAPTURE(seed);
        RailOptions options;
        options.seed = seed;
        check_streams(options, {2, 3, 512}, 20, 2);
    }
}

TEST_CASE("rail: one slot, and more than are ever used") {
    for (const uint64_t seed : RailWorld::seeds()) {
        CAPTURE(seed);
        RailOptions options;
        options.seed = seed;
        check_streams(options, {2, 1, 64}, 9, 1);
        check_streams(options, {2, 16, 64}, 5, 1);
    }
}

TEST_CASE("rail: many peers, and messages larger than anything on the way") {
    for (const uint64_t seed : RailWorld::seeds()) {
        CAPTURE(seed);
        RailOptions options;
        options.seed = seed;
        check_streams(options, {5, 2, 1024}, 8, 1);
        check_streams(options, {2, 2, 1 << 16}, 6, 1);
    }
}

TEST_CASE("rail: a ring that is full makes posters wait") {
    for (const uint64_t seed : RailWorld::seeds()) {
        CAPTURE(seed);
        RailOptions options;
        options.seed = seed;
        options.ring_capacity = 1;
        check_streams(options, {3, 4, 128}, 12, 2);
    }
}

TEST_CASE("rail: adds of all threads add up") {
    for (const uint64_t seed : RailWorld::seeds()) {
        CAPTURE(seed);
        RailOptions options;
        options.seed = seed;
        options.ring_capacity = 16;
        Case test(options, {3, 1, 64}, 3);
        for (uint64_t call = 1; call <= 2; ++call) test.run<AddsKernel>(2, call);
        test.check_clean();
        CHECK_EQ(test.world().engine(0).sent_to(1).num_messages, uint64_t{2 * 3 * 64});
    }
}

TEST_CASE("rail: a host that gives up ends the waits of its peers' kernels") {
    for (const uint64_t seed : RailWorld::seeds()) {
        CAPTURE(seed);
        RailOptions options;
        options.seed = seed;
        const Places places{3, 1, 64};
        Case test(options, places, 1);
        test.run<WaitKernel>(1, 1, [&] {
            for (const int rank : {0, 1}) test.world().engine(2).set(rank, places.abort(), 77);
            test.world().engine(0).set(2, places.abort(), 78);
        });
        for (const int rank : {0, 1, 2}) {
            CHECK_EQ(test.counts(rank)[0], rank == 2 ? 78 : 77);
            CHECK_EQ(test.counts(rank)[1], 1);
        }
    }
}

}  // namespace
}  // namespace deep_ep::testing
