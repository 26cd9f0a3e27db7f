// A call of the high-throughput mode: its number, its bank, and what its ranks tell each other when they enter it.
#pragma once

#include "device/algo/peers.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

EP_DEVICE uint64_t current_call(const layout::LocalState* local) {
    // Written by an earlier kernel of the same stream only.
    return prim::load<prim::Order::kRelaxed, prim::Scope::kGpu>(&local->num_calls) + 1;
}

EP_DEVICE int bank_of(uint64_t call) { return static_cast<int>(call % layout::kNumBanks); }

// Tells every peer that this rank has entered `watch.call`, that is: has finished the calls before it.
EP_DEVICE void announce_start(Warp warp, const Watch& watch) {
    const Heap& heap = watch.heap;
    // Release: what this rank read in earlier calls is read. Pairs with: wait_for_banks at the peer.
    algo::publish<prim::Order::kRelease, prim::Scope::kSys>(
        warp, heap.num_ranks(), AllRanks{}, [&](int peer) { return heap.started(peer, heap.rank()); }, watch.call);
}

// True once no peer still reads the bank of this call: it was last used two calls ago, so mostly at the first look.
EP_DEVICE bool wait_for_banks(Warp warp, const Watch& watch) {
    const Heap& heap = watch.heap;
    return wait_for_ranks(
        warp, watch, layout::Stage::kStart, AllRanks{}, [&](int peer) { return heap.started(heap.rank(), peer); },
        watch.call - 1);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
