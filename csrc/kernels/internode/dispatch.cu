// dispatch across nodes: every token once to each node that needs it, and there to the final row of each rank that needs it.
//
//   at first        each block: positions of tokens, from the routing. Where rows stand is known: from the count exchange, which
//                   is a launch of its own, or from the call whose routing is used again
//   send warps      token t: read once; to the ranks of this node as inside a node, and into the staging slot of each other node;
//                   whoever completes a chunk posts it
//   forward warps   the chunks of the rail peers: each token on to the ranks of this node that need it
//   receive warps   (of a rank that does not lend) slots to final rows, one stream for each source of any node
//
// Messages, buffer map and orderings: docs/protocols/internode.md.
#include "kernels/internode/rail_roles.h"
#include "kernels/internode/stated_rows.h"
#include "kernels/intranode/call_session.h"
#include "kernels/intranode/dispatch_parts.h"
#include "kernels/params.h"

namespace deep_ep::kernels::internode::dispatch {
inline namespace EP_BACKEND {

// -- What the roles work with, and how a block begins ----------------------------------------------------------------

using kernels::dispatch::deliver_metadata;
using kernels::dispatch::put_metadata;
using prim::Vec16;

// Shared memory of a block.
struct RailDispatchState {
    CallState call;
    int bad_token;                    // with an expert id out of range, -1: none
    int num_sent[layout::kMaxNodes];  // tokens of ours for each node
    ScanTile tiles[2];
};
static_assert(sizeof(RailDispatchState) <= kMaxDispatchState);

struct RailDispatchContext {
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
EP_DEVICE void prepare(algo::Block block, const InternodeDispatchParams& p, const algo::Watch& watch,
                       RailDispatchState& state) {
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

// Where a lane's target gets the token: nowhere, straight to its final row, into a slot of a rank here, or into staging.
enum class Way { kNone, kDirect, kSlot, kRail };

struct Target {
    Way way = Way::kNone;
    uint8_t* row = nullptr;  // or the slot, which begins with it
    int64_t final_row = 0;
};

// The token at `position` of `source`'s at `rank` of this node; `node`: the source's. Waits for the slot. False: the wait failed,
// or nobody has stated the row.
EP_DEVICE bool find_target(const RailDispatchContext& c, int source, int node, int rank, int token, int position,
                           Target& target) {
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

// -- Sending ---------------------------------------------------------------------------------------------------------
// A token is read once, and written to each rank of this node and to the staging slot of each other node that needs it. Whoever
// fills the last slot of a chunk posts it.

constexpr int kUnroll = kernels::dispatch::kUnroll;

EP_DEVICE void stage_positions(algo::Warp warp, const RailDispatchContext& c, int token, int node, uint8_t* slot) {
    const layout::Field& positions = c.p.rail.slot.positions;
    algo::for_each(warp, static_cast<int>(positions.count), [&](int i) {
        *reinterpret_cast<int*>(slot + positions.at(i)) = c.position_at(token, node * c.num_ranks() + i);
    });
}

template <class Metadata>
EP_DEVICE void send_metadata(algo::Warp warp, const RailDispatchContext& c, const Metadata& metadata,
                             const Target& target, int place) {
    const InternodeDispatchParams& p = c.p;
    if (target.way == Way::kDirect) {
        deliver_metadata(warp, c, place, target.final_row, metadata);
    } else if (target.way == Way::kSlot) {
        put_metadata(warp, p, p.slot, target.row, metadata);
    } else {
        put_metadata(warp, p, p.rail.slot, target.row, metadata);
        stage_positions(warp, c, metadata.src_idx(), place - c.num_ranks(), target.row);
    }
}

// Lane `lane`'s target, on every lane.
EP_DEVICE Target broadcast_target(algo::Warp warp, const Target& target, int lane) {
    return {static_cast<Way>(__shfl_sync(kFullMask, static_cast<int>(target.way), lane)),
            algo::broadcast_pointer(warp, target.row, lane), __shfl_sync(kFullMask, target.final_row, lane)};
}

EP_DEVICE bool find_rail_target(const RailDispatchContext& c, int node, int position, Target& target) {
    if (position < 0) return true;
    if (!is_on_rail(c.link, node, position, c.num_sent[node])) return false;
    target.way = Way::kRail;
    target.row = c.link.staging(node, position);
    return c.link.wait_for_staging(node, position);
}

// The lanes' chunks that are whole now. A lane has acquired what other warps staged; the barrier in a put releases that too.
EP_DEVICE bool post_chunks(algo::Warp warp, const RailDispatchContext& c, int node, int position, bool is_whole) {
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

// Places of a token: the ranks of this node, then the nodes. Where it stands among those that go there, -1: it does not.
EP_DEVICE int position_of(const RailDispatchContext& c, int token, int place) {
    if (token >= c.p.num_tokens) return -1;
    if (place < c.num_ranks()) return c.position_at(token, c.watch.heap.first_rank() + place);
    const int node = place - c.num_ranks();
    return c.link.is_peer(node) ? c.p.send_rail_head[static_cast<int64_t>(token) * c.link.num_nodes() + node] : -1;
}

// One token to those of 32 places, from `first`, that need it. A lane speaks for each, and has its position.
EP_DEVICE bool send_token(algo::Warp warp, const RailDispatchContext& c, int token, int first, int position) {
    warp.expect();
    const InternodeDispatchParams& p = c.p;
    const kernels::dispatch::InputMetadata<RailDispatchContext> input{c, token};
    const kernels::dispatch::HeldMetadata metadata(input, kernels::dispatch::load_words(warp, p, input));
    const int place = first + warp.thread_rank();
    const bool is_rank = place < c.num_ranks();
    const int node = place - c.num_ranks();
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
        send_metadata(warp, c, metadata, broadcast_target(warp, target, lane), first + lane);
    }
    warp.sync();  // every lane's stores, one lane's release
    if (target.way == Way::kSlot) c.ring.to(place, c.link.node()).publish(position);
    const bool is_whole = target.way == Way::kRail && c.link.count_staged(node, position, c.num_sent[node]);
    return post_chunks(warp, c, node, position, is_whole);
}

// Tokens are dealt one by one, so that all warps move through the windows together.
EP_DEVICE bool send(algo::Warp warp, const RailDispatchContext& c, RoleWarp self) {
    int ahead = position_of(c, self.idx, warp.thread_rank());
    for (int token = self.idx; token < c.p.num_tokens; token += self.count) {
        const int position = ahead;
        ahead = position_of(c, token + self.count, warp.thread_rank());  // under way while this token is
        if (!send_token(warp, c, token, 0, position)) return false;
        for (int first = kWarpSize; first < c.num_ranks() + c.link.num_nodes(); first += kWarpSize)
            if (!send_token(warp, c, token, first, position_of(c, token, first + warp.thread_rank()))) return false;
    }
    return true;
}

// -- Forwarding ------------------------------------------------------------------------------------------------------
// What a rail peer has sent to this node, to each rank here that needs it.
//
// A token carries its positions, so tokens need no order and no state. A warp polls for the chunks of all its streams. It may wait
// for a slot of a rank here, because whoever frees that waits for nothing (receive).

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

// Places are worked out for each word: the pointers of a kernels::dispatch::SlotMetadata would be spilled here.
struct ForwardedMetadata {
    const RailToken& token;
    const layout::SlotLayout& at;

    EP_DEVICE int src_idx() const { return token.word<int>(at.src_idx, 0); }
    EP_DEVICE int id(int k) const { return token.word<int>(at.topk_idx, k); }
    EP_DEVICE int checked(int id) const { return id; }  // by its source
    EP_DEVICE float weight(int k) const { return token.word<float>(at.topk_weights, k); }
    EP_DEVICE uint32_t scale(int i) const { return token.word<uint32_t>(at.scales, i); }
};

EP_DEVICE int place_of(const RailDispatchContext& c, const RailToken& token, int rank) {
    const InternodeDispatchParams& p = c.p;
    int* known = p.rail_head + token.row * c.num_ranks() + rank;
    if (p.is_cached) return *known;
    const int position = token.word<int>(p.rail.slot.positions, rank);
    *known = position;
    return position;
}

// To those of 32 ranks, from `first`, that need it.
EP_DEVICE bool forward_to(algo::Warp warp, const RailDispatchContext& c, const RailToken& token, int first) {
    const InternodeDispatchParams& p = c.p;
    const ForwardedMetadata there{token, p.rail.slot};
    const kernels::dispatch::HeldMetadata metadata(there, kernels::dispatch::load_words(warp, p, there));
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
        const Target to = broadcast_target(warp, target, lane);
        if (to.way == Way::kDirect)
            deliver_metadata(warp, c, first + lane, to.final_row, metadata);
        else
            put_metadata(warp, p, p.slot, to.row, metadata);
    }
    warp.sync();  // every lane's stores, one lane's release
    if (target.way == Way::kSlot) c.ring.to(rank, token.node).publish(position);
    return true;
}

EP_DEVICE bool forward_token(algo::Warp warp, const RailDispatchContext& c, int node, int position, int count) {
    const RailToken token{c.rail_peer(node), node, position, static_cast<int64_t>(c.rail.first_token(node)) + position,
                          c.link.received(node, position)};
    for (int first = 0; first < c.num_ranks(); first += kWarpSize)
        if (!forward_to(warp, c, token, first)) return false;
    // Every lane's reads are in order before this: forward_to() has ended with a barrier.
    bool is_ok = true;
    if (warp.thread_rank() == 0) is_ok = c.link.give_back(node, position, count);
    return __all_sync(kFullMask, is_ok);
}

EP_DEVICE bool forward(algo::Warp warp, const RailDispatchContext& c, RoleWarp self) {
    const algo::RowStream stream = deal_nodes(warp, c.link, self, [&](int node) { return c.rail.num_tokens(node); });
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

// -- The operation ---------------------------------------------------------------------------------------------------

struct Kernel : RoleOperation<Kernel, InternodeDispatchParams, RailDispatchState> {
    static constexpr int kMaxThreads = kMaxInternodeDispatchThreads;
    static constexpr auto kOperation = layout::Operation::kDispatch;

    static EP_DEVICE bool is_first_launch(const Params& p) { return p.is_first_kernel; }

    static EP_DEVICE bool open(algo::Warp warp, const Params& p, const algo::Watch& watch, Look) {
        return open_rail(warp, p, watch, p.is_first_kernel);
    }

    static EP_DEVICE void prepare(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        dispatch::prepare(block, p, watch, shared);
    }

    static EP_DEVICE Begun learn(algo::Block block, const Params& p, const algo::Watch& watch, Shared&) {
        return dispatch::learn(block, p, watch);
    }

    static EP_DEVICE bool work(algo::Block, const Params& p, const algo::Watch& watch, Shared& shared) {
        const algo::Ring ring(watch, p.window);
        const RailLink link(p.rail, watch);
        const RailDispatchContext c{p,
                                    watch,
                                    ring,
                                    link,
                                    row_map(p.heap, p.rank_prefix_matrix),
                                    {p.rail_prefix, watch.heap.num_nodes()},
                                    shared.num_sent,
                                    &shared.bad_token};
        const algo::Warp warp;
        if (p.is_worst_case) kernels::dispatch::mark_unused_rows(algo::Grid{}, p, c.rows.total_rows(watch.heap.rank()));
        return run_role(
            p, p.geometry.num_send_warps, p.geometry.num_recv_warps, [&](RoleWarp self) { return send(warp, c, self); },
            [&](RoleWarp self) { return forward(warp, c, self); },
            [&](RoleWarp self) { return receive(warp, c, self); });
    }

    static EP_DEVICE bool check(algo::Warp warp, const Params& p, const Shared& shared) {
        const int token = prim::load<Order::kRelaxed, Scope::kCta>(&shared.bad_token);
        if (token < 0) return true;
        if (warp.thread_rank() == 0) refuse_expert(&p, shared.call.number, token);
        return false;
    }

    static EP_DEVICE void void_outputs(algo::Block block, const Params& p) {
        kernels::dispatch::void_dispatch(block, p);
    }

private:
    // Streams are those of all sources but the ranks that write into this rank's tensors themselves: this one, for its own tokens
    // and for those that it forwards.
    static EP_DEVICE bool receive(algo::Warp warp, const RailDispatchContext& c, RoleWarp self) {
        const algo::Heap& heap = c.watch.heap;
        const auto port = [&](int source) { return c.ring.from(source % heap.num_ranks(), source / heap.num_ranks()); };
        return serve_neighbours(
            warp, c.link, Stage::kRow, self, c.rows, c.p.loan.x != 0,
            [&](int source, int position) { return port(source).row_is_here(position); },
            [&](int source, int position, int count, int64_t row) {
                kernels::dispatch::receive_row(warp, c, port(source), position, count, row);
            });
    }

    static EP_DEVICE_COLD void refuse_expert(const Params* p, uint64_t call, int token) {
        kernels::dispatch::refuse_expert(*p, kernels::dispatch::make_watch(*p, call), token);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::dispatch

void deep_ep::kernels::launch(const InternodeDispatchParams& params, dev::Stream stream) {
    using namespace internode;
    using namespace internode::dispatch;
    launch_roles<Kernel>("dispatch", "deep_ep::dispatch_internode", params, params.geometry.num_recv_warps, stream);
}
