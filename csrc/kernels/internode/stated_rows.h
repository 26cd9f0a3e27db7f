// What a call across nodes is told about rows and tokens on the rail, by its caller or by the count exchange before it: looked
// at before it becomes addresses.
#pragma once

#include "device/algo/group.h"
#include "kernels/internode/rail_link.h"
#include "kernels/intranode/exchange.h"

namespace deep_ep::kernels::internode {
inline namespace EP_BACKEND {

// rail_prefix[node]: tokens that the rail peers in nodes 0..node send here to be forwarded; the own node adds none.
struct RailMap {
    const int* prefix;
    int num_nodes;

    EP_DEVICE int first_token(int node) const { return node == 0 ? 0 : prefix[node - 1]; }
    EP_DEVICE int num_tokens(int node) const { return prefix[node] - first_token(node); }
    EP_DEVICE int total() const { return prefix[num_nodes - 1]; }
};

EP_DEVICE RowMap row_map(const HeapParams& heap, const int* rank_prefix_matrix) {
    return {rank_prefix_matrix, heap.num_ranks, heap.num_ranks * heap.num_nodes};
}

EP_DEVICE bool refuse_rail(const algo::Watch& watch, Stage stage, int peer, int num_stated, int seen) {
    algo::fail(watch, layout::FailureKind::kBadInput, {stage, peer, num_stated}, static_cast<uint64_t>(num_stated),
               static_cast<uint64_t>(static_cast<uint32_t>(seen)), 0);
    return false;
}

// Each thread for its part: every source's rows at every rank here can be, and ours fit into `num_rows_held`.
EP_DEVICE bool rows_can_be(algo::Block block, const algo::Watch& watch, const RowMap& rows, int num_rows_held) {
    const int self = watch.heap.rank();
    bool is_ok = true;
    algo::for_each(block, rows.num_sources * rows.num_ranks, [&](int i) {
        const int source = i / rows.num_ranks;
        const int rank = i % rows.num_ranks;
        const RowSpan span = rows.span(source, rank);
        if (!span.can_be())
            is_ok = refuse_rows(watch, source, watch.heap.first_rank() + rank, span.first, span.end, span.total);
        else if (source == 0 && rank == self)
            is_ok &= has_room(watch, num_rows_held, span.total);
    });
    return is_ok;
}

// Likewise the tokens to forward, of which the caller's table holds `num_held`.
EP_DEVICE bool rail_tokens_can_be(algo::Block block, const RailLink& link, const RailMap& map, int num_held) {
    bool is_ok = true;
    algo::for_each(block, map.num_nodes, [&](int node) {
        const int num_tokens = map.num_tokens(node);
        const bool can_be = node == link.node() ? num_tokens == 0 : num_tokens >= 0 && num_tokens < layout::kMaxTokens;
        if (!can_be) is_ok = refuse_rail(link.watch(), Stage::kRailRows, link.peer(node), 0, num_tokens);
    });
    if (block.thread_rank() == 0 && map.total() > num_held)
        is_ok = refuse_rail(link.watch(), Stage::kRailCapacity, link.peer(link.node()), num_held, map.total());
    return is_ok;
}

// False: the token at `position` of our stream to `node` is none of the `num_stated` there.
EP_DEVICE bool is_on_rail(const RailLink& link, int node, int position, int num_stated) {
    return position < num_stated || refuse_rail(link.watch(), Stage::kRailRows, link.peer(node), num_stated, position);
}

// Tokens of ours for each node, from their places in the streams: those of the last token that has one, and one more. A warp for
// each node; a barrier must follow.
EP_DEVICE void count_sent_tokens(algo::Block block, const int* send_rail_head, int num_tokens, int num_nodes,
                                 int* num_sent) {
    const algo::Warp warp;
    for (int node = prim::warp_idx(); node < num_nodes; node += block.num_warps()) {
        int count = 0;
        for (int end = num_tokens; end > 0 && count == 0; end -= kWarpSize) {
            const int token = end - 1 - warp.thread_rank();
            const int place = token >= 0 ? send_rail_head[static_cast<int64_t>(token) * num_nodes + node] : -1;
            const uint32_t lanes = __ballot_sync(kFullMask, place >= 0);
            const int last = __shfl_sync(kFullMask, place, lanes == 0 ? 0 : __ffs(static_cast<int>(lanes)) - 1);
            if (lanes != 0) count = last + 1;
        }
        if (warp.thread_rank() == 0) num_sent[node] = count;
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode
