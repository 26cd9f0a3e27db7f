// The forwarding role of dispatch across nodes: what a rail peer has sent to this node, to each rank here that needs it.
//
// A token carries its positions, so tokens need no order and no state. A warp polls for the chunks of all its streams. It may wait
// for a slot of a rank here, because whoever frees that waits for nothing (receive).
#pragma once

#include "device/algo/group.h"
#include "kernels/internode/token_send.h"

namespace deep_ep::kernels::internode::dispatch {
inline namespace EP_BACKEND {

// One token on its way: where it stands here, and where it belongs.
struct RailToken {
    int source;  // rank
    int node;
    int position;  // in the stream
    int64_t row;   // of rail_head
    const uint8_t* slot;

    template <class T> EP_DEVICE T word(const layout::Field& field, int i) const {
        return *reinterpret_cast<const T*>(slot + field.at(static_cast<uint64_t>(i)));
    }
};

EP_DEVICE int place_of(const Context& c, const RailToken& token, int rank) {
    const InternodeDispatchParams& p = c.p;
    int* known = p.rail_head + token.row * c.num_ranks() + rank;
    if (p.is_cached) return *known;
    const int position = token.word<int>(p.rail.slot.positions, rank);
    *known = position;
    return position;
}

EP_DEVICE void forward_metadata(algo::Warp warp, const Context& c, const RailToken& token, const Target& target,
                                int rank) {
    const InternodeDispatchParams& p = c.p;
    const layout::RailSlot& at = p.rail.slot;
    const auto expert = [&](int k) { return token.word<int>(at.topk_idx, k); };
    const auto weight = [&](int k) { return token.word<float>(at.topk_weights, k); };
    const auto scale = [&](int i) { return token.word<uint32_t>(at.scales, i); };
    const int src_idx = token.word<int>(at.src_idx, 0);
    if (target.way == Way::kDirect)
        kernels::dispatch::deliver_metadata(
            warp, p, kernels::dispatch::metadata_outputs(c, rank), target.final_row, src_idx,
            [&](int k) { return kernels::dispatch::local_expert(p, expert(k), rank); }, weight, scale);
    else
        put_metadata(warp, p, p.slot, target.row, src_idx, expert, weight, scale);
}

// To those of 32 ranks, from `first`, that need it.
EP_DEVICE bool forward_to(algo::Warp warp, const Context& c, const RailToken& token, int first) {
    const InternodeDispatchParams& p = c.p;
    const int rank = first + warp.thread_rank();
    const int position = rank < c.num_ranks() ? place_of(c, token, rank) : -1;
    Target target;
    const bool is_ok = find_target(c, token.source, token.node, rank, token.position, position, target);
    if (!algo::all(warp, is_ok)) return false;
    const uint32_t lanes = __ballot_sync(kFullMask, target.way != Way::kNone);
    algo::multicast_row<kUnroll, algo::SourceKind::kFromPeer>(warp, reinterpret_cast<const Vec16*>(token.slot),
                                                              static_cast<int>(p.row_bytes / sizeof(Vec16)), lanes,
                                                              reinterpret_cast<Vec16*>(target.row));
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int lane = __ffs(static_cast<int>(rest)) - 1;
        forward_metadata(warp, c, token, broadcast_target(warp, target, lane), first + lane);
    }
    warp.sync();  // every lane's stores, one lane's release
    if (target.way == Way::kSlot) c.ring.to(rank, token.node).publish(position);
    return true;
}

EP_DEVICE bool forward_token(algo::Warp warp, const Context& c, int node, int position, int count) {
    const RailToken token{c.rail_peer(node), node, position, static_cast<int64_t>(c.rail.first_token(node)) + position,
                          c.link.received(node, position)};
    for (int first = 0; first < c.num_ranks(); first += kWarpSize)
        if (!forward_to(warp, c, token, first)) return false;
    // Every lane's reads are in order before this: forward_to() has ended with a barrier.
    bool is_ok = true;
    if (warp.thread_rank() == 0) is_ok = c.link.give_back(node, position, count);
    return __all_sync(kFullMask, is_ok);
}

EP_DEVICE bool forward(algo::Warp warp, const Context& c, int warp_idx, int num_warps) {
    const algo::RowStream stream =
        deal_nodes(warp, c.link, warp_idx, num_warps, [&](int node) { return c.rail.num_tokens(node); });
    const auto look = [&](int node, int position) {
        Lack lack;
        if (warp.thread_rank() != 0) return lack;
        const RailWord word = c.link.arrived(node, c.link.chunk_of(position));
        lack.is_set = !c.link.is_here(word, lack.seen);
        lack.site = c.link.site(Stage::kRailChunk, node);
        lack.expected = word.expected;
        return lack;
    };
    return serve_tokens(warp, c.link, stream, look, [&](int node, int position, int count) {
        return forward_token(warp, c, node, position, count);
    });
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::dispatch
