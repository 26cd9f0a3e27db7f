// combine across nodes: rows go back to their owners, those for owners in other nodes as one sum of each node.
//
//   reduce warps    token t of this rank: its rows in this node, in rank order, the sums of other nodes, in node order, biases
//   forward warps   token q of a rail peer: the sum of its rows in this node into staging; whoever completes a chunk posts it
//   send warps      (of a rank that does not lend its input) rows to the rank of this node that needs them: the owner, or the
//                   forwarder on the owner's rail
//
// Messages, buffer map and orderings: docs/protocols/internode.md.
#include "device/algo/formats.h"
#include "device/algo/group.h"
#include "kernels/internode/rail_roles.h"
#include "kernels/internode/stated_rows.h"
#include "kernels/intranode/call_session.h"
#include "kernels/intranode/combine_reduce.h"
#include "kernels/intranode/row_return.h"
#include "kernels/params.h"

namespace deep_ep::kernels::internode::combine {
inline namespace EP_BACKEND {

// -- What the roles work with, and sums of rows wherever they stand --------------------------------------------------

using kernels::combine::CombineContext;
using prim::Vec16;

// Shared memory of a block.
struct RailCombineState {
    CallState call;
    int num_sent[layout::kMaxNodes];  // tokens of ours for each node, each of which one sum comes back
};

struct RailCombineContext {
    const InternodeCombineParams& p;
    const CombineContext& local;  // of this node
    const RailLink& link;
    RailMap rail;
    const int* num_sent;

    EP_DEVICE int num_ranks() const { return local.watch.heap.num_ranks(); }
    EP_DEVICE int self() const { return local.watch.heap.first_rank() + local.watch.heap.rank(); }  // among all
};

// Rows of one owner at a rank of this node, as this rank, the owner or its forwarder, gets them.
struct OwnerRows {
    int owner;  // of all ranks
    int node;   // its
    int rank;   // of this node
};

// Has the row come? A rank that lends its rows, or this one's own, never makes anybody wait.
EP_DEVICE algo::FlagTest row_is_here(const RailCombineContext& c, const OwnerRows& source, int position) {
    if (kernels::combine::direct_rows(c.local, source.owner, source.rank) != nullptr) return {nullptr, 0};
    return c.local.ring.from(source.rank, source.node).row_is_here(position);
}

EP_DEVICE const uint8_t* row_at(const RailCombineContext& c, const OwnerRows& source, int position) {
    const uint8_t* rows = kernels::combine::direct_rows(c.local, source.owner, source.rank);
    return rows != nullptr ? rows + static_cast<int64_t>(position) * c.p.row_bytes
                           : c.local.ring.from(source.rank, source.node).slot(position);
}

EP_DEVICE const float* weights_at(const RailCombineContext& c, const OwnerRows& source, int position) {
    if (kernels::combine::direct_rows(c.local, source.owner, source.rank) != nullptr)
        return kernels::combine::direct_weights(c.local, source.owner, source.rank) +
               static_cast<int64_t>(position) * c.p.num_topk;
    return reinterpret_cast<const float*>(c.local.ring.from(source.rank, source.node).slot(position) +
                                          c.p.slot.topk_weights.offset);
}

// After every lane's reads, and a sync().
EP_DEVICE void give_slot_back(const RailCombineContext& c, const OwnerRows& source, int position) {
    if (kernels::combine::direct_rows(c.local, source.owner, source.rank) == nullptr)
        c.local.ring.from(source.rank, source.node)
            .give_back(position, c.local.rows.num_rows(source.owner, source.rank));
}

// False: the row at `position` is none of those that the owner has there.
EP_DEVICE bool is_stated(const RailCombineContext& c, const OwnerRows& source, int token, int position) {
    const int num_rows = c.local.rows.num_rows(source.owner, source.rank);
    return position < num_rows ||
           refuse_position(c.local.watch, c.local.watch.heap.first_rank() + source.rank, token, position, num_rows);
}

// Those of `num_sources` whose `pointer_of(i)` is not null. Each lane finds one of 32 at a time, and remembers the first.
template <class T, class PointerOf> class Sources {
public:
    EP_DEVICE Sources(algo::Warp warp, int count, const PointerOf& pointer_of)
        : warp_(warp),
          count_(count),
          pointer_of_(pointer_of),
          mine_(warp.thread_rank() < count ? pointer_of(warp.thread_rank()) : nullptr),
          lanes_(__ballot_sync(kFullMask, mine_ != nullptr)) {}

    EP_DEVICE bool are_at_most_two() const { return count_ <= kWarpSize && __popc(lanes_) <= 2; }

    // Calls use(pointer, next) with the first two, the next two, ... in ascending order; `next` is null where there is none.
    template <class Use> EP_DEVICE void for_each_pair(const Use& use) const {
        use_lanes(mine_, lanes_, use);
        for (int first = kWarpSize; first < count_; first += kWarpSize) {
            const int i = first + warp_.thread_rank();
            const T* pointer = i < count_ ? pointer_of_(i) : nullptr;
            use_lanes(pointer, __ballot_sync(kFullMask, pointer != nullptr), use);
        }
    }

private:
    template <class Use> EP_DEVICE void use_lanes(const T* pointer, uint32_t rest, const Use& use) const {
        const auto take = [&]() -> const T* {
            if (rest == 0) return nullptr;
            const T* taken = algo::broadcast_pointer(warp_, pointer, __ffs(static_cast<int>(rest)) - 1);
            rest &= rest - 1;
            return taken;
        };
        while (rest != 0) {
            const T* first = take();
            use(first, take());
        }
    }

    algo::Warp warp_;
    int count_;
    const PointerOf& pointer_of_;
    const T* mine_;
    uint32_t lanes_;
};

// One chunk of two rows, whose loads are under way at the same time: that decides how fast a warp is. `row`: may be null.
constexpr auto kPieces = algo::Pieces::kInterleaved;

template <int kVecs> struct TwoPieces {
    algo::Piece<kVecs> first = {}, second = {};

    EP_DEVICE TwoPieces(algo::Warp warp, const uint8_t* first_row, const uint8_t* second_row, int base, int end) {
        load(warp, first, first_row, base, end);
        load(warp, second, second_row, base, end);
        algo::issue_loads(warp);
    }

private:
    static EP_DEVICE void load(algo::Warp warp, algo::Piece<kVecs>& piece, const uint8_t* row, int base, int end) {
        if (row == nullptr) return;
        const auto* vecs = reinterpret_cast<const Vec16*>(row) + base;
        algo::load_piece(warp, kPieces, piece, end, [&](int i) { return prim::load_shared_with_peers(vecs + i); });
    }
};

// Of at most two rows: nothing but what was loaded stands in registers.
EP_DEVICE void sum_two_rows(algo::Warp warp, const uint8_t* first, const uint8_t* second, int num_vecs, Vec16* target) {
    constexpr int kVecs = 7;
#pragma unroll 1
    for (int base = 0; base < num_vecs; base += algo::kChunkVecs<kVecs>) {
        const int end = num_vecs - base;
        const TwoPieces<kVecs> pieces(warp, first, second, base, end);
        algo::for_piece<kVecs>(warp, kPieces, end, [&](int i, int vec) {
            algo::Bf16Sums sums = {};
            sums.add(pieces.first.vec[i]);
            if (second != nullptr) sums.add(pieces.second.vec[i]);
            prim::store_streaming(target + base + vec, sums.rounded());
        });
    }
}

template <class RowSources>
EP_DEVICE void sum_many_rows(algo::Warp warp, const RowSources& sources, int num_vecs, Vec16* target) {
    constexpr int kVecs = 4;
#pragma unroll 1
    for (int base = 0; base < num_vecs; base += algo::kChunkVecs<kVecs>) {
        const int end = num_vecs - base;
        algo::Bf16Sums sums[kVecs] = {};
        sources.for_each_pair([&](const uint8_t* first, const uint8_t* second) {
            const TwoPieces<kVecs> pieces(warp, first, second, base, end);
#pragma unroll
            for (int i = 0; i < kVecs; ++i) sums[i].add(pieces.first.vec[i]);
            if (second == nullptr) return;
#pragma unroll
            for (int i = 0; i < kVecs; ++i) sums[i].add(pieces.second.vec[i]);
        });
        algo::for_piece<kVecs>(warp, kPieces, end,
                               [&](int i, int vec) { prim::store_streaming(target + base + vec, sums[i].rounded()); });
    }
}

// The FP32 sum of the sources' rows, in their order, rounded once.
template <class PointerOf>
EP_DEVICE void sum_rows(algo::Warp warp, int num_sources, uint32_t row_bytes, const PointerOf& pointer_of,
                        uint8_t* target) {
    const Sources<uint8_t, PointerOf> sources(warp, num_sources, pointer_of);
    const int num_vecs = static_cast<int>(row_bytes / sizeof(Vec16));
    auto* vecs = reinterpret_cast<Vec16*>(target);
    if (!sources.are_at_most_two()) return sum_many_rows(warp, sources, num_vecs, vecs);
    const uint8_t *first = nullptr, *second = nullptr;
    sources.for_each_pair([&](const uint8_t* one, const uint8_t* other) {
        first = one;
        second = other;
    });
    sum_two_rows(warp, first, second, num_vecs, vecs);
}

template <class PointerOf>
EP_DEVICE void sum_weights(algo::Warp warp, int num_sources, int num_topk, const PointerOf& pointer_of, float* target) {
    if (num_topk == 0) return;
    const Sources<float, PointerOf> sources(warp, num_sources, pointer_of);
    for (int first = 0; first < num_topk; first += kWarpSize) {
        const int k = first + warp.thread_rank();
        float sum = 0.0f;
        sources.for_each_pair([&](const float* weights, const float* next) {
            if (k >= num_topk) return;
            const float later = next == nullptr ? 0.0f : next[k];
            sum += weights[k];
            if (next != nullptr) sum += later;
        });
        if (k < num_topk) target[k] = sum;
    }
}

// -- Forwarding ------------------------------------------------------------------------------------------------------
// For each token of a rail peer, the sum of the rows that this node has of it, in FP32 and in rank order, rounded once into the
// peer's staging slot. Whoever fills the last slot of a chunk posts it.
//
// A warp that waited for one owner's rows could hold up another owner, on whom the first one waits. So it polls.

class SumForward {
public:
    EP_DEVICE explicit SumForward(const RailCombineContext& c) : c_(c) {}

    EP_DEVICE bool run(algo::Warp warp, RoleWarp self) {
        const algo::RowStream stream =
            deal_nodes(warp, c_.link, self, [&](int node) { return c_.rail.num_tokens(node); });
        return serve_tokens(
            warp, c_.link, stream, [&](int node, int position) { return look(warp, node, position); },
            [&](int node, int position, int count) { return forward(warp, node, position, count); });
    }

private:
    EP_DEVICE OwnerRows source(int node, int rank) const { return {c_.link.peer(node), node, rank}; }
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

    const RailCombineContext& c_;
    bool has_weights_ = false;
};

// -- Reducing --------------------------------------------------------------------------------------------------------
// The sum of a token's rows in this node, in rank order, and of the sums that come from other nodes, in node order, and of the
// biases; one rounding.

class TokenReduce {
public:
    EP_DEVICE explicit TokenReduce(const RailCombineContext& c) : c_(c) {}

    EP_DEVICE bool run(algo::Warp warp, RoleWarp self) const {
        bool has_weights = false;
        for (int token = self.idx; token < c_.p.num_tokens; token += self.count) {
            if (!wait_for_rows(warp, token)) return false;
            if (!has_weights && !kernels::combine::wait_for_weights(warp, c_.local)) return false;
            has_weights = true;
            reduce(warp, token);
            warp.sync();  // every lane's reads, each lane's release
            if (!give_back(warp, token)) return false;
        }
        return true;
    }

private:
    // What a token's sum is made of: rows at the ranks of this node, sums of the nodes, biases.
    EP_DEVICE int num_rows() const { return c_.num_ranks() + c_.link.num_nodes(); }
    EP_DEVICE bool is_rank(int i) const { return i < c_.num_ranks(); }
    EP_DEVICE int node_of(int i) const { return i - c_.num_ranks(); }
    EP_DEVICE OwnerRows source(int rank) const { return {c_.self(), c_.link.node(), rank}; }

    // Where row i of the token stands in its stream, -1: there is none.
    EP_DEVICE int place_of(int token, int i) const {
        if (is_rank(i))
            return c_.p.send_head[static_cast<int64_t>(token) * c_.local.rows.num_sources +
                                  c_.local.watch.heap.first_rank() + i];
        if (!c_.link.is_peer(node_of(i))) return -1;
        return c_.p.send_rail_head[static_cast<int64_t>(token) * c_.link.num_nodes() + node_of(i)];
    }

    EP_DEVICE bool wait_for_row(int token, int i, int place) const {
        if (is_rank(i))
            return is_stated(c_, source(i), token, place) &&
                   c_.local.ring.wait(Stage::kRow, i, row_is_here(c_, source(i), place));
        const int node = node_of(i);
        return is_on_rail(c_.link, node, place, c_.num_sent[node]) &&
               c_.link.wait(Stage::kRailChunk, node, c_.link.arrived(node, c_.link.chunk_of(place)));
    }

    EP_DEVICE bool wait_for_rows(algo::Warp warp, int token) const {
        bool is_here = true;
        algo::for_each(warp, num_rows(), [&](int i) {
            if (const int place = place_of(token, i); place >= 0) is_here &= wait_for_row(token, i, place);
        });
        return algo::all(warp, is_here);
    }

    EP_DEVICE void reduce(algo::Warp warp, int token) const {
        const auto row = [&](int i) -> const uint8_t* {
            if (i >= num_rows()) {
                const uint8_t* bias = c_.p.bias[i - num_rows()];
                return bias == nullptr ? nullptr : bias + static_cast<int64_t>(token) * c_.p.row_bytes;
            }
            const int place = place_of(token, i);
            if (place < 0) return nullptr;
            return is_rank(i) ? row_at(c_, source(i), place) : c_.link.received(node_of(i), place);
        };
        const auto weights = [&](int i) -> const float* {
            const int place = place_of(token, i);
            if (place < 0) return nullptr;
            if (is_rank(i)) return weights_at(c_, source(i), place);
            return reinterpret_cast<const float*>(c_.link.received(node_of(i), place) +
                                                  c_.p.rail.slot.topk_weights.offset);
        };
        sum_rows(warp, num_rows() + kMaxBiases, c_.p.row_bytes, row,
                 c_.p.combined_x + static_cast<int64_t>(token) * c_.p.row_bytes);
        sum_weights(warp, num_rows(), c_.p.num_topk, weights,
                    c_.p.combined_topk_weights + static_cast<int64_t>(token) * c_.p.num_topk);
    }

    EP_DEVICE bool give_back(algo::Warp warp, int token) const {
        bool is_ok = true;
        algo::for_each(warp, num_rows(), [&](int i) {
            const int place = place_of(token, i);
            if (place < 0) return;
            if (is_rank(i))
                give_slot_back(c_, source(i), place);
            else
                is_ok &= c_.link.give_back(node_of(i), place, c_.num_sent[node_of(i)]);
        });
        return __all_sync(kFullMask, is_ok);
    }

    const RailCombineContext& c_;
};

// -- The operation ---------------------------------------------------------------------------------------------------

struct Kernel : RoleOperation<Kernel, InternodeCombineParams, RailCombineState> {
    static constexpr int kMaxThreads = kMaxInternodeCombineThreads;
    static constexpr auto kOperation = layout::Operation::kCombine;

    static EP_DEVICE bool open(algo::Warp warp, const Params& p, const algo::Watch& watch, Look) {
        return open_rail(warp, p, watch, true) && (!p.may_lend || algo::wait_for_loans(warp, watch));
    }

    static EP_DEVICE void prepare(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        count_sent_tokens(block, p.send_rail_head, p.num_tokens, watch.heap.num_nodes(), shared.num_sent);
    }

    static EP_DEVICE Begun learn(algo::Block block, const Params& p, const algo::Watch& watch, Shared&) {
        const RailLink link(p.rail, watch);
        const RowMap rows = row_map(p.heap, p.rank_prefix_matrix);
        bool is_ok = rows_can_be(block, watch, rows, p.num_rows);
        is_ok &= rail_tokens_can_be(block, link, {p.rail_prefix, watch.heap.num_nodes()}, p.num_rail_tokens);
        if (p.may_lend)
            algo::for_each(block, rows.num_ranks,
                           [&](int rank) { is_ok &= are_among_lent(watch, rank, rows.total_rows(rank)); });
        return algo::any(block, !is_ok) ? Begun::kFailed : Begun::kReady;
    }

    static EP_DEVICE bool work(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        const algo::Ring ring(watch, p.window);
        const RailLink link(p.rail, watch);
        const CombineContext local{p, watch, ring, row_map(p.heap, p.rank_prefix_matrix)};
        const RailCombineContext c{p, local, link, {p.rail_prefix, watch.heap.num_nodes()}, shared.num_sent};
        if (p.loan.topk_weights != 0) kernels::combine::lend_weights(block, local);
        const algo::Warp warp;
        return run_role(
            p, p.geometry.num_recv_warps, p.geometry.num_send_warps,
            [&](RoleWarp self) { return TokenReduce(c).run(warp, self); },
            [&](RoleWarp self) { return SumForward(c).run(warp, self); },
            [&](RoleWarp self) { return send(warp, c, self); });
    }

    static EP_DEVICE void void_outputs(algo::Block block, const Params& p) { kernels::combine::void_combine(block, p); }

private:
    // After wait_for_loans: what stands at the rank is among what it lends.
    static EP_DEVICE bool are_among_lent(const algo::Watch& watch, int rank, int num_rows) {
        const layout::Loan& loan = algo::loan_of(watch, rank);
        return loan.x == 0 || static_cast<uint64_t>(num_rows) <= loan.num_rows ||
               refuse_rows(watch, watch.heap.first_rank() + watch.heap.rank(), watch.heap.first_rank() + rank, 0,
                           num_rows, static_cast<int>(loan.num_rows));
    }

    // One stream for each owner whose rows another rank of this node needs.
    static EP_DEVICE bool send(algo::Warp warp, const RailCombineContext& c, RoleWarp self) {
        const algo::Heap& heap = c.local.watch.heap;
        const auto port = [&](int owner) {
            return c.local.ring.to(owner % heap.num_ranks(), owner / heap.num_ranks());
        };
        return serve_neighbours(
            warp, c.link, Stage::kSlot, self, c.local.rows, c.p.loan.x != 0,
            [&](int owner, int position) { return port(owner).slot_is_free(position); },
            [&](int owner, int position, int, int64_t row) {
                kernels::combine::put_row(warp, c.local, row,
                                          kernels::combine::place_in_slot(c.local, port(owner).slot(position)));
                if (warp.thread_rank() == 0) port(owner).publish(position);
            });
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::combine

void deep_ep::kernels::launch(const InternodeCombineParams& params, dev::Stream stream) {
    using namespace internode;
    using namespace internode::combine;
    launch_roles<Kernel>("combine", "deep_ep::combine_internode", params, params.geometry.num_send_warps, stream);
}
