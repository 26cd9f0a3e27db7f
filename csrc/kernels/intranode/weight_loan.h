// Of a rank that lends its input to combine: a copy of its top-k weights that peers can read.
#pragma once

#include "device/algo/group.h"
#include "device/algo/watch.h"
#include "kernels/intranode/combine_context.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

// The weights go to where peers can read them; the block that comes last says so.
EP_DEVICE void lend_weights(algo::Block block, const CombineContext& c) {
    const CombineParams& p = c.p;
    const algo::Heap& heap = c.watch.heap;
    const int64_t num_weights = static_cast<int64_t>(c.rows.total_rows(heap.rank())) * p.num_topk;
    algo::for_each(algo::Grid{}, num_weights, [&](int64_t i) { p.lent_weights[i] = p.topk_weights[i]; });
    block.sync();
    const algo::Warp warp;
    if (prim::warp_idx() != 0 ||
        !algo::is_last_block<prim::Order::kAcqRel, prim::Scope::kGpu>(warp, &c.watch.words.local->num_weight_blocks))
        return;
    // Release: the weights. Pairs with: wait_for_weights at the peer.
    algo::publish<prim::Order::kRelease, prim::Scope::kSys>(
        warp, heap.num_ranks(), algo::AllRanks{}, [&](int peer) { return heap.weight_flag(peer, heap.rank()); },
        c.watch.call);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
