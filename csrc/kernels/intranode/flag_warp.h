// The flag warp of a block of combine: it sets the flags of rows that the other warps have put into slots or taken out.
//
// A release at system scope takes microseconds where the SM has stores under way to a peer. Here one warp waits for it, while
// the others go on with the next row, and all flags that are due meanwhile share the next release.
#pragma once

#include "device/algo/ring.h"
#include "kernels/params.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

// What a warp asks for. A word, so that it needs no other to be complete; zero: none.
enum class FlagKind : uint64_t { kRowIsHere = 1, kSlotIsFree = 2, kNoMore = 3 };

constexpr uint64_t make_request(FlagKind kind, int rank, int position) {
    return static_cast<uint64_t>(kind) << 60 | static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(position);
}
constexpr FlagKind kind_of_request(uint64_t request) { return static_cast<FlagKind>(request >> 60); }
constexpr int rank_of_request(uint64_t request) { return static_cast<int>(request >> 32 & 0xfffffffu); }
constexpr int position_of_request(uint64_t request) { return static_cast<int>(static_cast<uint32_t>(request)); }

constexpr int kRequests = 2;  // of a warp, at once

// Of one block; shared memory. A request is zero until its warp writes it, and again when the flag warp has taken it.
struct FlagRequests {
    uint64_t of_warp[kMaxCombineWarps][kRequests];
};

// One warp's side.
class FlagRequester {
public:
    EP_DEVICE FlagRequester(FlagRequests& requests, int warp_idx) : requests_(requests.of_warp[warp_idx]) {}

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
            uint64_t* word = requests_ + next_;
            while (prim::load<Order::kRelaxed, Scope::kCta>(word) != 0) prim::pause();
            // Release: the row, or the reads of it. Pairs with: serve_flags.
            prim::store<Order::kRelease, Scope::kCta>(word, value);
        }
        next_ = (next_ + 1) % kRequests;
    }

    uint64_t* requests_;
    int next_ = 0;
};

// The flag warp's side: lane i serves warp i of the block.
EP_DEVICE void serve_flags(algo::Warp warp, const algo::Ring& ring, FlagRequests& requests, int num_warps) {
    using prim::Order;
    using prim::Scope;
    const int lane = warp.thread_rank();
    bool has_more = lane < num_warps;
    for (int next = 0; __any_sync(prim::kFullMask, has_more);) {
        uint64_t request = 0;
        if (has_more) {
            uint64_t* word = requests.of_warp[lane] + next;
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

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
