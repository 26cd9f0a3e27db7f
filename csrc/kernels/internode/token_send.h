// The sending role of dispatch across nodes: a token is read once, and written to each rank of this node and to the staging slot
// of each other node that needs it. Whoever fills the last slot of a chunk posts it.
#pragma once

#include "device/algo/group.h"
#include "kernels/internode/dispatch_context.h"

namespace deep_ep::kernels::internode::dispatch {
inline namespace EP_BACKEND {

constexpr int kUnroll = kernels::dispatch::kUnroll;

EP_DEVICE void stage_positions(algo::Warp warp, const Context& c, int token, int node, uint8_t* slot) {
    const layout::Field& positions = c.p.rail.slot.positions;
    algo::for_each(warp, static_cast<int>(positions.count), [&](int i) {
        *reinterpret_cast<int*>(slot + positions.at(i)) = c.position_at(token, node * c.num_ranks() + i);
    });
}

EP_DEVICE void send_metadata(algo::Warp warp, const Context& c, int token, const Target& target, int place) {
    const InternodeDispatchParams& p = c.p;
    const auto expert = [&](int k) { return global_expert(c, token, k); };
    const auto weight = [&](int k) { return p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k]; };
    const auto scale = [&](int i) { return kernels::dispatch::input_scale(p, token, i); };
    if (target.way == Way::kDirect) {
        kernels::dispatch::deliver_metadata(
            warp, p, kernels::dispatch::metadata_outputs(c, place), target.final_row, token,
            [&](int k) { return kernels::dispatch::local_expert(p, expert(k), place); }, weight, scale);
    } else if (target.way == Way::kSlot) {
        put_metadata(warp, p, p.slot, target.row, token, expert, weight, scale);
    } else {
        put_metadata(warp, p, p.rail.slot, target.row, token, expert, weight, scale);
        stage_positions(warp, c, token, place - c.num_ranks(), target.row);
    }
}

// Lane `lane`'s target, on every lane.
EP_DEVICE Target broadcast_target(algo::Warp warp, const Target& target, int lane) {
    return {static_cast<Way>(__shfl_sync(kFullMask, static_cast<int>(target.way), lane)),
            algo::broadcast_pointer(warp, target.row, lane), __shfl_sync(kFullMask, target.final_row, lane)};
}

EP_DEVICE bool find_rail_target(const Context& c, int node, int position, Target& target) {
    if (position < 0) return true;
    if (!is_on_rail(c.link, node, position, c.num_sent[node])) return false;
    target.way = Way::kRail;
    target.row = c.link.staging(node, position);
    return c.link.wait_for_staging(node, position);
}

// The lanes' chunks that are whole now. A lane has acquired what other warps staged; the barrier in a put releases that too.
EP_DEVICE bool post_chunks(algo::Warp warp, const Context& c, int node, int position, bool is_whole) {
    bool is_ok = true;
    const int chunk = is_whole ? c.link.chunk_of(position) : 0;
    const uint32_t lanes = __ballot_sync(kFullMask, is_whole);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int lane = __ffs(static_cast<int>(rest)) - 1;
        const int to = __shfl_sync(kFullMask, node, lane);
        is_ok &= c.link.post_chunk(warp, to, __shfl_sync(kFullMask, chunk, lane), c.num_sent[to]);
    }
    return is_ok;
}

// One token to those of 32 places, from `first`, that need it: the ranks of this node, then the nodes. A lane speaks for each.
EP_DEVICE bool send_token(algo::Warp warp, const Context& c, int token, int first) {
    warp.expect();
    const InternodeDispatchParams& p = c.p;
    const int place = first + warp.thread_rank();
    const bool is_rank = place < c.num_ranks();
    const int node = place - c.num_ranks();
    int position = -1;
    if (is_rank)
        position = c.position_at(token, c.watch.heap.first_rank() + place);
    else if (c.link.is_peer(node))
        position = p.send_rail_head[static_cast<int64_t>(token) * c.link.num_nodes() + node];
    Target target;
    const bool is_ok = is_rank ? find_target(c, c.self(), c.link.node(), place, token, position, target)
                               : find_rail_target(c, node, position, target);
    if (!algo::all(warp, is_ok)) return false;

    const uint32_t lanes = __ballot_sync(kFullMask, target.way != Way::kNone);
    algo::multicast_row<kUnroll>(warp, reinterpret_cast<const Vec16*>(p.x + static_cast<int64_t>(token) * p.row_bytes),
                                 static_cast<int>(p.row_bytes / sizeof(Vec16)), lanes,
                                 reinterpret_cast<Vec16*>(target.row));
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int lane = __ffs(static_cast<int>(rest)) - 1;
        send_metadata(warp, c, token, broadcast_target(warp, target, lane), first + lane);
    }
    warp.sync();  // every lane's stores, one lane's release
    if (target.way == Way::kSlot) c.ring.to(place, c.link.node()).publish(position);
    const bool is_whole = target.way == Way::kRail && c.link.count_staged(node, position, c.num_sent[node]);
    return post_chunks(warp, c, node, position, is_whole);
}

// Tokens are dealt one by one, so that all warps move through the windows together.
EP_DEVICE bool send(algo::Warp warp, const Context& c, int warp_idx, int num_warps) {
    for (int token = warp_idx; token < c.p.num_tokens; token += num_warps)
        for (int first = 0; first < c.num_ranks() + c.link.num_nodes(); first += kWarpSize)
            if (!send_token(warp, c, token, first)) return false;
    return true;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::dispatch
