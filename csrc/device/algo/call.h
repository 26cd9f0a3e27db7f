// The frame of one call of the high-throughput mode: number it, announce it, wait for the peers' banks, finish it.
#pragma once

#include "device/algo/watch.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

EP_DEVICE uint64_t current_call(const layout::LocalState* local) {
    // Written by an earlier kernel of the same stream only.
    return prim::load<prim::Order::kRelaxed, prim::Scope::kGpu>(&local->num_calls) + 1;
}

EP_DEVICE int bank_of(uint64_t call) { return static_cast<int>(call % layout::kNumBanks); }

// One warp. Tells every peer that this rank has entered `watch.call`, that is: has finished the calls before it.
EP_DEVICE void announce_start(const Watch& watch) {
    for (int peer = prim::lane_idx(); peer < watch.heap.num_ranks(); peer += prim::kWarpSize)
        // Release: what this rank read in earlier calls is read. Pairs with: wait_for_banks at the peer.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(watch.heap.started(peer, watch.heap.rank()), watch.call);
}

// One warp. True once no peer still reads the bank of this call: it was last used two calls ago, so mostly at the first look.
EP_DEVICE bool wait_for_banks(const Watch& watch) {
    bool is_ready = true;
    for (int peer = prim::lane_idx(); peer < watch.heap.num_ranks(); peer += prim::kWarpSize)
        is_ready &= wait_at_least(watch, {layout::Stage::kStart, peer}, watch.heap.started(watch.heap.rank(), peer),
                                  watch.call - 1);
    return __all_sync(prim::kFullMask, is_ready);
}

// All threads of all blocks, last, and after a barrier of the block that follows their reading of the call's number: the
// block that comes last counts the call as done. Nothing of this launch looks at the count any more, and the end of the
// launch publishes it, so no order is needed.
EP_DEVICE void finish_call(const Watch& watch) {
    using prim::Order;
    using prim::Scope;
    if (threadIdx.x != 0) return;
    layout::LocalState* local = watch.words.local;
    if (prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&local->num_done_blocks, 1u) + 1 != gridDim.x) return;
    prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_done_blocks, 0u);
    prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_calls, watch.call);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
