// The forwarding role of combine across nodes: for each token of a rail peer, the sum of the rows that this node has of it, in
// FP32 and in rank order, rounded once into the peer's staging slot. Whoever fills the last slot of a chunk posts it.
//
// A warp that waited for one owner's rows could hold up another owner, on whom the first one waits. So it polls.
#pragma once

#include "kernels/internode/combine_context.h"

namespace deep_ep::kernels::internode::combine {
inline namespace EP_BACKEND {

class SumForward {
public:
    EP_DEVICE explicit SumForward(const Context& c) : c_(c) {}

    EP_DEVICE bool run(algo::Warp warp, int warp_idx, int num_warps) {
        const algo::RowStream stream =
            deal_nodes(warp, c_.link, warp_idx, num_warps, [&](int node) { return c_.rail.num_tokens(node); });
        return serve_tokens(
            warp, c_.link, stream, [&](int node, int position) { return look(warp, node, position); },
            [&](int node, int position, int count) { return forward(warp, node, position, count); });
    }

private:
    EP_DEVICE RowSource source(int node, int rank) const { return {c_.link.peer(node), node, rank}; }
    // Of the token's row at a rank here, -1: none.
    EP_DEVICE int place_of(int node, int position, int rank) const {
        const int64_t token = static_cast<int64_t>(c_.rail.first_token(node)) + position;
        return rank < c_.num_ranks() ? c_.p.rail_head[token * c_.num_ranks() + rank] : -1;
    }

    // All rows have come, and the slot may be filled.
    EP_DEVICE Lack look(algo::Warp warp, int node, int position) const {
        Lack lack;
        for (int rank = warp.thread_rank(); rank < c_.num_ranks() && !lack.is_set; rank += warp.size()) {
            const int place = place_of(node, position, rank);
            if (place < 0) continue;
            if (!is_stated(c_, source(node, rank), position, place)) return failed_look();
            const algo::FlagTest test = row_is_here(c_, source(node, rank), place);
            if (c_.local.ring.is_set(test)) continue;
            lack = {true, false, {Stage::kRow, rank}, test.expected, 0};
        }
        if (warp.thread_rank() != 0 || lack.is_set || !c_.link.is_reused(position)) return lack;
        const RailWord taken = c_.link.taken_before(node, position);
        lack.is_set = !c_.link.is_here(taken, lack.seen);
        lack.site = c_.link.site(Stage::kRailTaken, node);
        lack.expected = taken.expected;
        return lack;
    }

    EP_DEVICE bool forward(algo::Warp warp, int node, int position, int count) {
        if (!has_weights_ && !kernels::combine::wait_for_weights(warp, c_.local)) return false;
        has_weights_ = true;
        uint8_t* slot = c_.link.staging(node, position);
        sum_rows(
            warp, c_.num_ranks(), c_.p.row_bytes,
            [&](int rank) {
                const int place = place_of(node, position, rank);
                return place < 0 ? nullptr : row_at(c_, source(node, rank), place);
            },
            slot);
        sum_weights(
            warp, c_.num_ranks(), c_.p.num_topk,
            [&](int rank) {
                const int place = place_of(node, position, rank);
                return place < 0 ? nullptr : weights_at(c_, source(node, rank), place);
            },
            reinterpret_cast<float*>(slot + c_.p.rail.slot.topk_weights.offset));
        warp.sync();  // every lane's reads and stores, each lane's release
        algo::for_each(warp, c_.num_ranks(), [&](int rank) {
            if (const int place = place_of(node, position, rank); place >= 0)
                give_slot_back(c_, source(node, rank), place);
        });
        bool is_whole = false;
        if (warp.thread_rank() == 0) is_whole = c_.link.count_staged(node, position, count);
        // What other warps staged is acquired by one lane, which posts it after the barrier in this.
        if (!algo::broadcast(warp, is_whole)) return true;
        return c_.link.post_chunk(warp, node, c_.link.chunk_of(position), count);
    }

    const Context& c_;
    bool has_weights_ = false;
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::combine
