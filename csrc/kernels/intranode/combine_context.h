// What both halves of combine work with: the flag warp, where rows are read, and the loan of weights.
#pragma once

#include "device/algo/group.h"
#include "device/algo/ring.h"
#include "device/algo/watch.h"
#include "kernels/intranode/exchange.h"
#include "kernels/params.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

// -- The flag warp of a block: it sets the flags of rows that the other warps have put into slots or taken out -------
// A release at system scope takes microseconds where the SM has stores under way to a peer. Here one warp waits for it, while
// the others go on with the next row, and all flags that are due meanwhile share the next release.

// What a warp asks for. A word, so that it needs no other to be complete; zero: none.
enum class FlagKind : uint64_t { kRowIsHere = 1, kSlotIsFree = 2, kNoMore = 3 };

constexpr uint64_t make_request(FlagKind kind, int rank, int position) {
    return static_cast<uint64_t>(kind) << 60 | static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(position);
}
constexpr FlagKind kind_of_request(uint64_t request) { return static_cast<FlagKind>(request >> 60); }
constexpr int rank_of_request(uint64_t request) { return static_cast<int>(request >> 32 & 0xfffffffu); }
constexpr int position_of_request(uint64_t request) { return static_cast<int>(static_cast<uint32_t>(request)); }

constexpr int kRequests = 2;  // of a warp, at once

// Of one warp of a block; shared memory. A request is zero until the warp writes it, and again when the flag warp has taken it.
struct FlagRequests {
    uint64_t word[kRequests];
};

// One warp's side.
class FlagRequester {
public:
    EP_DEVICE explicit FlagRequester(FlagRequests* requests) : requests_(requests) {}

    // By the whole warp, which has met in a sync() after what the flag guards.
    EP_DEVICE void row_is_here(algo::Warp warp, int rank, int position) {
        request(warp, make_request(FlagKind::kRowIsHere, rank, position));
    }
    EP_DEVICE void slot_is_free(algo::Warp warp, int rank, int position) {
        request(warp, make_request(FlagKind::kSlotIsFree, rank, position));
    }
    EP_DEVICE void no_more(algo::Warp warp) { request(warp, make_request(FlagKind::kNoMore, 0, 0)); }

private:
    // Waits for nobody but the flag warp, which waits for nobody.
    EP_DEVICE void request(algo::Warp warp, uint64_t value) {
        using prim::Order;
        using prim::Scope;
        if (warp.thread_rank() == 0) {
            uint64_t* word = requests_->word + next_;
            while (prim::load<Order::kRelaxed, Scope::kCta>(word) != 0) prim::pause();
            // Release: the row, or the reads of it. Pairs with: serve_flags.
            prim::store<Order::kRelease, Scope::kCta>(word, value);
        }
        next_ = (next_ + 1) % kRequests;
    }

    FlagRequests* requests_;
    int next_ = 0;
};

// The flag warp's side: lane i serves warp i of the block.
EP_DEVICE void serve_flags(algo::Warp warp, const algo::Ring& ring, FlagRequests* requests, int num_warps) {
    using prim::Order;
    using prim::Scope;
    const int lane = warp.thread_rank();
    bool has_more = lane < num_warps;
    for (int next = 0; __any_sync(prim::kFullMask, has_more);) {
        uint64_t request = 0;
        if (has_more) {
            uint64_t* word = requests[lane].word + next;
            request = prim::load<Order::kAcquire, Scope::kCta>(word);
            if (request != 0) {
                prim::store<Order::kRelaxed, Scope::kCta>(word, uint64_t{0});
                next = (next + 1) % kRequests;
            }
        }
        const FlagKind kind = kind_of_request(request);
        if (kind == FlagKind::kNoMore) has_more = false;
        const bool is_due = request != 0 && kind != FlagKind::kNoMore;
        if (!__any_sync(prim::kFullMask, is_due)) {
            prim::pause();
            continue;
        }
        if (!is_due) continue;
        const int rank = rank_of_request(request);
        const int position = position_of_request(request);
        const algo::FlagMark mark =
            kind == FlagKind::kRowIsHere ? ring.to(rank).mark_here(position) : ring.from(rank).mark_free(position);
        // Release: what the warp has asked for this after. Pairs with: row_is_here, slot_is_free at the peer. All lanes at once.
        prim::store<Order::kRelease, Scope::kSys>(mark.flag, mark.value);
    }
}

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Vec16;

struct CombineContext {
    const CombineParams& p;
    const algo::Watch& watch;
    const algo::Ring& ring;
    RowMap rows;
};

EP_DEVICE algo::Watch make_watch(const CombineParams& p, uint64_t call) {
    return {p.watch, p.heap, layout::Operation::kCombine, call};
}

// Where `rank` has its rows of `owner` for us to read, the first one foremost: in our own input, or in the one that it lends.
// Null: it sends them into slots.
EP_DEVICE const uint8_t* direct_rows(const CombineContext& c, int owner, int rank) {
    const CombineParams& p = c.p;
    const int64_t offset = static_cast<int64_t>(c.rows.first_row(owner, rank)) * p.row_bytes;
    if (rank == c.watch.heap.rank()) return p.x + offset;
    const uint64_t lent = p.may_lend ? algo::loan_of(c.watch, rank).x : 0;
    return lent == 0 ? nullptr : c.watch.heap.at(rank, lent) + offset;
}

// The same for the weights of a rank with direct rows.
EP_DEVICE const float* direct_weights(const CombineContext& c, int owner, int rank) {
    const CombineParams& p = c.p;
    const int64_t offset = static_cast<int64_t>(c.rows.first_row(owner, rank)) * p.num_topk;
    if (rank == c.watch.heap.rank()) return p.topk_weights + offset;
    return reinterpret_cast<const float*>(c.watch.heap.at(rank, algo::loan_of(c.watch, rank).topk_weights)) + offset;
}

// Of our own rows, inside a node.
EP_DEVICE const uint8_t* direct_rows(const CombineContext& c, int rank) {
    return direct_rows(c, c.watch.heap.rank(), rank);
}
EP_DEVICE const float* direct_weights(const CombineContext& c, int rank) {
    return direct_weights(c, c.watch.heap.rank(), rank);
}

// Where `owner` has its rows, and then their weights, summed for this rank to write to; null: it takes them another way.
struct LentSums {
    uint8_t* rows;
    float* weights;
    int num_tokens;  // that both have room for

    EP_DEVICE bool are_lent() const { return rows != nullptr; }
};
EP_DEVICE LentSums lent_sums(const CombineContext& c, int owner) {
    if (!c.p.may_lend || owner == c.watch.heap.rank()) return {};
    const layout::Loan& loan = algo::loan_of(c.watch, owner);
    if (loan.sums == 0) return {};
    return {c.watch.heap.at(owner, loan.sums), reinterpret_cast<float*>(c.watch.heap.at(owner, loan.topk_weights)),
            static_cast<int>(loan.num_rows)};
}

// Only between two ranks.
EP_DEVICE bool peer_lends_sums(const CombineContext& c) {
    return c.watch.heap.num_ranks() == 2 && lent_sums(c, 1 - c.watch.heap.rank()).are_lent();
}

// The token has a row at `rank`: then it is one of those that stand there for us.
EP_DEVICE bool is_stated(const CombineContext& c, int rank, int token, int position) {
    if (position < 0) return true;
    const int num_rows = c.rows.num_rows(c.watch.heap.rank(), rank);
    return position < num_rows || refuse_position(c.watch, rank, token, position, num_rows);
}

// -- Of a rank that lends its input: a copy of its top-k weights that peers can read ---------------------------------

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

// The outputs of a call that has failed.
EP_DEVICE void void_combine(algo::Block block, const CombineParams& p) {
    algo::void_output(block, p.combined_x, static_cast<int64_t>(p.num_tokens) * p.row_bytes);
    algo::void_output(block, p.combined_topk_weights, static_cast<int64_t>(p.num_tokens) * p.num_topk * 4);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
