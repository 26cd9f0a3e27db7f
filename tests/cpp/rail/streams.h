// Streams of messages between the windows of all ranks, for kernels that know no engine: rail/conformance.cu and rail/process.
#pragma once

#include "device/launch.h"
#include "rail/rail.h"

namespace deep_ep::testing {
inline namespace EP_BACKEND {

using prim::Order;
using prim::Scope;

// Places in the window of every rank. [x][y] is row-major.
struct Places {
    int num_ranks;
    int num_slots;
    uint32_t slot_bytes;

    static constexpr int kMaxSlots =
        2048;  // words stay where they are when the number of slots changes from call to call

    EP_HOST_DEVICE uint64_t word(int kind, int rank, int slot) const {
        return 8 * static_cast<uint64_t>((kind * num_ranks + rank) * kMaxSlots + slot);
    }
    EP_HOST_DEVICE uint64_t arrived(int rank, int slot) const { return word(0, rank, slot); }
    EP_HOST_DEVICE uint64_t taken(int rank, int slot) const { return word(1, rank, slot); }
    EP_HOST_DEVICE uint64_t counter() const { return word(2, 0, 0); }
    EP_HOST_DEVICE uint64_t abort() const { return word(2, 0, 16); }
    EP_HOST_DEVICE uint64_t data(int kind, int rank, int slot) const {
        return word(2, 0, 32) + static_cast<uint64_t>((kind * num_ranks + rank) * num_slots + slot) * slot_bytes;
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
        const uint32_t drawn =
            mix(seed, static_cast<uint64_t>(from * places.num_ranks + to), call, static_cast<uint64_t>(message));
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

// A worker is a warp, of any block.
EP_DEVICE int num_workers() { return static_cast<int>(gridDim.x * blockDim.x) / prim::kWarpSize; }
EP_DEVICE int worker_idx() { return prim::warp_idx() + static_cast<int>(blockIdx.x * blockDim.x) / prim::kWarpSize; }

// What the kernels have in common: all threads of `Kernel` call take_part().
template <class Kernel> struct TrafficKernel {
    using Params = Traffic;
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const rail::Rail rail(p.rail);
        Kernel::take_part(p, rail, {rail, p.places.abort(), p.timeout_ns});
    }
};

// Every rank sends a stream of messages to every other, through slots that are used again; each has a warp that sends to
// each peer and one that receives from each.
struct StreamsKernel : TrafficKernel<StreamsKernel> {
    static constexpr int kMaxThreads = 256;

    static EP_DEVICE void take_part(const Traffic& p, const rail::Rail& rail, const Patience& patience) {
        const int num_peers = p.places.num_ranks - 1;
        const int index = prim::warp_idx() % num_peers;
        const int peer = index < p.rank ? index : index + 1;
        const bool is_whole =
            prim::warp_idx() < num_peers ? send(p, rail, patience, peer) : receive(p, rail, patience, peer);
        if (!is_whole && prim::lane_idx() == 0) count(p.num_lost, 1);
    }

    static EP_DEVICE bool send(const Traffic& p, const rail::Rail& rail, const Patience& patience, int peer) {
        const int num_slots = p.places.num_slots;
        for (int i = 0; i < p.num_messages; ++i) {
            const int slot = i % num_slots;
            if (i >= num_slots && !wait_for_flag(rail, patience, p.places.taken(peer, slot), p.tag(i - num_slots)))
                return false;
            uint8_t* const there = i % 2 == 0 ? nullptr : rail::reach(rail, peer);
            const rail::Copy copy{p.places.received(p.rank, slot), p.places.staging(peer, slot),
                                  4 * p.num_words(p.rank, peer, i)};
            auto* words =
                there == nullptr ? rail::at<uint32_t>(rail, copy.src) : reinterpret_cast<uint32_t*>(there + copy.dst);
            const uint32_t num_words = copy.bytes / 4;
            for (uint32_t w = static_cast<uint32_t>(prim::lane_idx()); w < num_words; w += prim::kWarpSize)
                words[w] = p.content(p.rank, peer, i, w);
            const rail::Flag flag{p.places.arrived(p.rank, slot), p.tag(i)};
            if (!(there == nullptr ? rail::put(rail, peer, copy, flag, patience)
                                   : tell(rail, peer, copy.bytes, flag, patience)))
                return false;
        }
        return true;
    }

    // One warp, whose lanes have stored the bytes.
    static EP_DEVICE bool tell(const rail::Rail& rail, int peer, uint32_t num_bytes, rail::Flag flag,
                               const Patience& patience) {
        __syncwarp();  // each lane's stores, one lane's release
        bool is_told = true;
        if (prim::lane_idx() == 0) is_told = rail::tell(rail, peer, num_bytes, flag, patience);
        return __all_sync(prim::kFullMask, is_told);
    }

    static EP_DEVICE bool receive(const Traffic& p, const rail::Rail& rail, const Patience& patience, int peer) {
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

}  // namespace EP_BACKEND
}  // namespace deep_ep::testing
