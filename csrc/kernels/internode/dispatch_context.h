// What the roles of dispatch across nodes work with, and how a block begins.
#pragma once

#include "kernels/internode/stated_rows.h"
#include "kernels/internode/token_streams.h"
#include "kernels/intranode/call_session.h"
#include "kernels/intranode/dispatch_begin.h"
#include "kernels/intranode/dispatch_context.h"

namespace deep_ep::kernels::internode::dispatch {
inline namespace EP_BACKEND {

using prim::Vec16;

// Shared memory of a block.
struct State {
    CallState call;
    int bad_token;                    // with an expert id out of range, -1: none
    int num_sent[layout::kMaxNodes];  // tokens of ours for each node
    ScanTile tiles[2];
};
static_assert(sizeof(State) <= kMaxDispatchState);

struct Context {
    const InternodeDispatchParams& p;
    const algo::Watch& watch;
    const algo::Ring& ring;
    const RailLink& link;
    RowMap rows;
    RailMap rail;
    const int* num_sent;
    int* bad_token;

    EP_DEVICE int num_ranks() const { return watch.heap.num_ranks(); }
    EP_DEVICE int self() const { return watch.heap.first_rank() + watch.heap.rank(); }  // among all
    EP_DEVICE int rail_peer(int node) const { return link.peer(node); }
    // Of the token among ours at a rank of any node, -1: it has no row there.
    EP_DEVICE int position_at(int token, int rank) const {
        return p.send_head[static_cast<int64_t>(token) * rows.num_sources + rank];
    }
};

// Columns of the scan are nodes: is one of a node's ranks among the token's?
struct NodeScan {
    const uint8_t* is_token_in_rank;  // [num_tokens, num_columns * ranks_per_node]
    int* head;                        // [num_tokens, num_columns]
    int num_tokens, num_columns;
    int ranks_per_node;
    int own_node;
    int* num_sent;

    EP_DEVICE bool is_sent(int token, int node) const {
        if (node == own_node) return false;
        const uint8_t* ranks = is_token_in_rank + (static_cast<int64_t>(token) * num_columns + node) * ranks_per_node;
        bool is_any = false;
        for (int i = 0; i < ranks_per_node; ++i) is_any |= ranks[i] != 0;
        return is_any;
    }
    EP_DEVICE void end_column(int node, int count) const {
        if (threadIdx.x == 0) num_sent[node] = count;
    }
};

// What needs no answer of anybody.
EP_DEVICE void prepare(algo::Block block, const InternodeDispatchParams& p, const algo::Watch& watch, State& state) {
    if (block.thread_rank() == 0) {
        state.bad_token = -1;
    }
    const int num_nodes = watch.heap.num_nodes();
    if (p.is_cached) return count_sent_tokens(block, p.send_rail_head, p.num_tokens, num_nodes, state.num_sent);
    scan_columns(block, TokenScan{p.is_token_in_rank, p.send_head, p.num_tokens, watch.heap.num_sources()},
                 state.tiles);
    block.sync();  // both scans use the tiles
    const NodeScan nodes{p.is_token_in_rank,     p.send_rail_head,       p.num_tokens,  num_nodes,
                         watch.heap.num_ranks(), p.rail.topology.node(), state.num_sent};
    scan_columns(block, nodes, state.tiles);
}

// `rank` lends what this call needs; others find out by themselves that they lend too little, and say so.
EP_DEVICE bool learn_loan(const InternodeDispatchParams& p, const algo::Watch& watch, int rank) {
    if (!algo::wait_for_loan(watch, rank)) return false;
    const layout::Loan& loan = algo::loan_of(watch, rank);
    const int num_rows = row_map(p.heap, p.rank_prefix_matrix).total_rows(rank);
    if (rank == watch.heap.rank() || loan.x == 0 || static_cast<uint64_t>(num_rows) <= loan.num_rows) return true;
    return algo::wait_until(watch, {Stage::kCapacity, rank}, loan.num_rows, [](uint64_t&) { return false; });
}

EP_DEVICE Begun learn(algo::Block block, const InternodeDispatchParams& p, const algo::Watch& watch) {
    const RailLink link(p.rail, watch);
    bool is_ok = rows_can_be(block, watch, row_map(p.heap, p.rank_prefix_matrix), p.num_recv_rows);
    is_ok &= rail_tokens_can_be(block, link, {p.rail_prefix, watch.heap.num_nodes()}, p.num_rail_rows);
    if (is_ok && p.may_lend)
        algo::for_each(block, watch.heap.num_ranks(), [&](int rank) { is_ok &= learn_loan(p, watch, rank); });
    return algo::any(block, !is_ok) ? Begun::kFailed : Begun::kReady;
}

// Ids were looked at when the routing was made; one that is found here has changed since.
EP_DEVICE int global_expert(const Context& c, int token, int k) {
    const InternodeDispatchParams& p = c.p;
    const int64_t id = algo::load_expert_id(p.topk_idx, p.idx_bytes, static_cast<int64_t>(token) * p.num_topk + k);
    if (kernels::dispatch::is_expert(p, id)) return static_cast<int>(id);
    prim::store<Order::kRelaxed, Scope::kCta>(c.bad_token, token);
    return -1;
}

// Everything of a slot but its row: of the heap's windows, or of the rail's.
template <class Slot, class Expert, class Weight, class Scale>
EP_DEVICE void put_metadata(algo::Warp warp, const DispatchParams& p, const Slot& at, uint8_t* slot, int src_idx,
                            const Expert& expert, const Weight& weight, const Scale& scale) {
    if (warp.thread_rank() == 0) *reinterpret_cast<int*>(slot + at.src_idx.offset) = src_idx;
    algo::for_each(warp, p.num_topk, [&](int k) {
        *reinterpret_cast<int*>(slot + at.topk_idx.at(k)) = expert(k);
        *reinterpret_cast<float*>(slot + at.topk_weights.at(k)) = weight(k);
    });
    algo::for_each(warp, p.num_scales, [&](int i) { *reinterpret_cast<uint32_t*>(slot + at.scales.at(i)) = scale(i); });
}

// Where a lane's target gets the token: nowhere, straight to its final row, into a slot of a rank here, or into staging.
enum class Way { kNone, kDirect, kSlot, kRail };

struct Target {
    Way way = Way::kNone;
    uint8_t* row = nullptr;  // or the slot, which begins with it
    int64_t final_row = 0;
};

// The token at `position` of `source`'s at `rank` of this node; `node`: the source's. Waits for the slot. False: the wait failed,
// or nobody has stated the row.
EP_DEVICE bool find_target(const Context& c, int source, int node, int rank, int token, int position, Target& target) {
    if (position < 0) return true;
    const int num_stated = c.rows.num_rows(source, rank);
    if (position >= num_stated)
        return refuse_position(c.watch, c.watch.heap.first_rank() + rank, token, position, num_stated);
    uint8_t* direct = kernels::dispatch::direct_rows(c, rank);
    target.final_row = static_cast<int64_t>(c.rows.first_row(source, rank)) + position;
    if (direct != nullptr) {
        target.way = Way::kDirect;
        target.row = direct + target.final_row * c.p.row_bytes;
        return true;
    }
    const algo::Port port = c.ring.to(rank, node);
    target.way = Way::kSlot;
    target.row = port.slot(position);
    return c.ring.wait(Stage::kSlot, rank, port.slot_is_free(position));
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::dispatch
