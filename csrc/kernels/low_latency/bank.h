// The bank of a call: whether its flags and slots may be written again, and what tells the peers that theirs may.
#pragma once

#include "device/algo/watch.h"
#include "kernels/low_latency/call_context.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

// Makes the word of this rank at each far rank that is not masked `value`, or leaves it where that is less.
template <class Group>
EP_DEVICE void tell_far(const Group& group, const LowLatencyCall& call, const FarRanks& far, int row, uint64_t word,
                        uint64_t value) {
    algo::for_each(group, far.count(), [&](int idx) {
        const int peer = far.rank(idx);
        if (is_masked(call, peer)) return;
        uint64_t* told = far.told(row, peer);
        const uint64_t before = prim::load<Order::kRelaxed, Scope::kGpu>(told);
        if (value > before && far.add(peer, word, value - before))
            prim::store<Order::kRelaxed, Scope::kGpu>(told, value);
    });
}

// Release: the reads of those calls. Pairs with: is_bank_free at the peer.
template <class Group>
EP_DEVICE void tell_far_ended(const Group& group, const CallContext& c, int bank, uint64_t ended) {
    tell_far(group, c.call, c.far(), bank, c.far().received(bank, c.rank()), ended);
}

// Far ranks see that this rank has entered a call by its table; so they would not while it waits for its bank.
EP_DEVICE void tell_far_entered(Warp warp, const CallContext& c) {
    tell_far(warp, c.call, c.far(), LowLatencyRail::kToldEntered, c.far().entered(c.rank()), c.watch.call);
}

// The last call of the bank that this rank has received in an earlier launch.
EP_DEVICE uint64_t ended_before(const CallContext& c, int bank) {
    return prim::load<Order::kRelaxed, Scope::kGpu>(&c.watch.words.local->low_latency_ended[bank]);
}

// Tells the peers which calls this rank has received in earlier launches, so that the banks may be written again. Never after
// a wait for what a peer does once it has begun: the peer may wait for this.
EP_DEVICE void publish_ended(Warp warp, const CallContext& c) {
    warp.expect();
    constexpr int kNumBanks = layout::kNumLowLatencyBanks;
#pragma unroll 1
    for (int i = warp.thread_rank(); i < c.num_near() * kNumBanks; i += warp.size()) {
        const int bank = i % kNumBanks;
        if (is_masked(c.call, c.near_rank(i / kNumBanks))) continue;
        const uint64_t ended = ended_before(c, bank);
        // Release: the reads of an earlier launch. Pairs with: is_bank_free at the peer.
        prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.received(i / kNumBanks, bank, c.watch.heap.rank()),
                                                  ended);
    }
    if constexpr (kAcrossNodes)
        for (int bank = 0; bank < kNumBanks; ++bank) tell_far_ended(warp, c, bank, ended_before(c, bank));
}

// One look at whether a send phase may begin, by a warp that does not know the number of the call yet: that is on its way too.
// So the flags are those of both banks. Acquire.
struct BankLook {
    uint64_t abort_code;
    uint64_t received;  // of this lane: received_flag
};

// Of the flags of both banks from all peers, number `i`.
EP_DEVICE const uint64_t* received_flag(const CallContext& c, int i) {
    constexpr int kNumBanks = layout::kNumLowLatencyBanks;
    return c.received_flag(i % kNumBanks, i / kNumBanks);
}

EP_DEVICE uint64_t load_received(Warp warp, const CallContext& c, int first) {
    const int i = first + warp.thread_rank();
    const bool is_one = i < c.num_ranks() * layout::kNumLowLatencyBanks;
    return is_one ? prim::load<Order::kAcquire, Scope::kSys>(received_flag(c, i)) : 0;
}

EP_DEVICE BankLook look_at_banks(Warp warp, const CallContext& c) {
    const uint64_t code = algo::abort_code(c.watch);
    return {code, load_received(warp, c, 0)};
}

// After that: every peer has read what this rank sent it in the last use of this call's bank, two calls ago. Acquire.
EP_DEVICE bool is_bank_free(Warp warp, const CallContext& c, const BankLook& look) {
    warp.expect();
    constexpr int kNumBanks = layout::kNumLowLatencyBanks;
    const int num_flags = c.num_ranks() * kNumBanks;
    bool is_free = true;
#pragma unroll 1
    for (int first = 0; first < num_flags; first += kWarpSize) {
        const uint64_t received = first == 0 ? look.received : load_received(warp, c, first);
        const int i = first + warp.thread_rank();
        is_free &= i >= num_flags || i % kNumBanks != c.bank || received + kNumBanks >= c.watch.call;
        if (kAcrossNodes && i < num_flags && i % kNumBanks == c.bank)
            confirm_far(c.call, c.watch, i / kNumBanks, received_flag(c, i), received);
    }
    return __all_sync(kFullMask, is_free) != 0;
}

// The host refuses to open a call while this rank still has another one open in the bank. It does not see calls of a graph
// that is replayed: those fail here, and do not wait for themselves.
EP_DEVICE_COLD void refuse_open_bank(algo::Watch watch, uint64_t needed) {
    const uint64_t ended =
        prim::load<Order::kRelaxed, Scope::kGpu>(&watch.words.local->low_latency_ended[bank_of(needed)]);
    if (ended < needed)
        algo::fail(watch, layout::FailureKind::kBadInput, {Stage::kOpen, first_near(watch) + watch.heap.rank()}, needed,
                   ended, 0);
}

// False: some rank has given up.
EP_DEVICE bool wait_for_bank(Warp warp, const CallContext& c) {
    warp.expect();
    if (warp.thread_rank() == 0 && c.watch.call > layout::kNumLowLatencyBanks)
        refuse_open_bank(c.watch, c.watch.call - layout::kNumLowLatencyBanks);
#pragma unroll 1
    for (int peer = warp.thread_rank(); peer < c.num_ranks(); peer += warp.size())
        if (c.watch.call > layout::kNumLowLatencyBanks)
            wait_for_peer(&c.call, c.watch, Stage::kStart, peer, c.received_flag(c.bank, peer),
                          c.watch.call - layout::kNumLowLatencyBanks, ~uint64_t{0});
    return __all_sync(kFullMask,
                      algo::may_go_on(c.watch, site_of(c.watch, Stage::kStart, c.rank()), prim::clock_ns(), 0, 0)) != 0;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
