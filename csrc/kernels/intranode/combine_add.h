// The adding role of combine, of one of two ranks, that lends its sums: the peer writes each of its rows where it is summed, and
// this rank adds its own row there. The L2 adds: nothing of what has come is loaded. Of two rows of bfloat16 the sum has the same
// bits as one in FP32 that is rounded, but for the sign of a zero and the bits of a NaN.
#pragma once

#include "device/algo/ring.h"
#include "kernels/intranode/combine_reduce.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

// What comes to this rank, and what it has of its own.
struct AddSources {
    int self, peer;
    algo::Port port;  // of the peer's rows
    int num_own, num_far;
    const uint8_t* own_rows;
    const float* own_weights;
};

EP_DEVICE AddSources add_sources(const CombineContext& c) {
    const int self = c.watch.heap.rank();
    const int peer = 1 - self;
    const bool has_weights = c.p.num_topk > 0;
    return {self,
            peer,
            c.ring.from(peer),
            c.rows.num_rows(self, self),
            c.rows.num_rows(self, peer),
            direct_rows(c, self),
            has_weights ? direct_weights(c, self) : nullptr};
}

// The peer does not lend its input, so it writes its rows here.
EP_DEVICE bool peer_writes_rows(const CombineContext& c) {
    return algo::loan_of(c.watch, 1 - c.watch.heap.rank()).x == 0;
}

// Of a token's two rows; -1: none.
struct AddPositions {
    int own = -1, far = -1;

    EP_DEVICE bool can_be(const AddSources& from) const { return own < from.num_own && far < from.num_far; }
};

EP_DEVICE AddPositions add_positions(const CombineContext& c, const AddSources& from, int token) {
    if (token >= c.p.num_tokens) return {};
    const int* of_token = c.p.send_head + static_cast<int64_t>(token) * 2;
    return {of_token[from.self], of_token[from.peer]};
}

// False, and the call fails: a position is beyond the rows that are stated.
EP_DEVICE bool are_stated(const CombineContext& c, const AddSources& from, int token, const AddPositions& at) {
    if (at.own >= from.num_own) return refuse_position(c.watch, from.self, token, at.own, from.num_own);
    return at.far < from.num_far || refuse_position(c.watch, from.peer, token, at.far, from.num_far);
}

// Waits for the peer's row of the token.
EP_DEVICE bool wait_for_far_row(const CombineContext& c, const AddSources& from, int position) {
    return position < 0 || c.ring.wait(Stage::kRow, from.peer, from.port.row_is_in_place(position));
}

// One warp's tokens, item by item. Lane i knows the positions of item i of each 32: of those that are worked on, and of the next.
class AddItems {
public:
    EP_DEVICE AddItems(algo::Warp warp, const CombineContext& c, const AddSources& from, int first, int step)
        : c_(c),
          from_(from),
          first_(first),
          step_(step),
          count_(first < c.p.num_tokens ? (c.p.num_tokens - first + step - 1) / step : 0) {
        now_ = positions_of(warp.thread_rank());
        next_ = positions_of(warp.thread_rank() + kWarpSize);
    }

    EP_DEVICE int count() const { return count_; }
    EP_DEVICE int token(int item) const { return first_ + item * step_; }

    // Before item `item`, of which each is worked on in turn.
    EP_DEVICE void begin(algo::Warp warp, int item) {
        if (item == 0 || item % kWarpSize != 0) return;
        now_ = next_;
        next_ = positions_of(item + kWarpSize + warp.thread_rank());
    }
    // `item`: this one, or one that is up to 31 items later.
    EP_DEVICE AddPositions at(int item, int current) const {
        if (item / kWarpSize == current / kWarpSize) return of_lane(now_, item % kWarpSize);
        return of_lane(next_, item % kWarpSize);
    }

private:
    EP_DEVICE AddPositions positions_of(int item) const { return add_positions(c_, from_, token(item)); }
    static EP_DEVICE AddPositions of_lane(const AddPositions& at, int lane) {
        return {__shfl_sync(kFullMask, at.own, lane), __shfl_sync(kFullMask, at.far, lane)};
    }

    const CombineContext& c_;
    const AddSources& from_;
    int first_, step_, count_;
    AddPositions now_, next_;
};

// Own rows on their way into stages.
struct OwnRows {
    algo::StageCursor loads, takes;
    int num_under_way = 0;
    int next_item = 0;  // to be looked at
};

// Loads own rows of this and later tokens, as far as there are stages.
EP_DEVICE void load_own_rows(algo::Warp warp, const CombineContext& c, const AddSources& from,
                             const algo::Stages& stages, const AddItems& items, int current, OwnRows& rows) {
    const int end = current + kWarpSize < items.count() ? current + kWarpSize : items.count();
    for (; rows.num_under_way <= stages.num_ahead() && rows.next_item < end; ++rows.next_item) {
        const AddPositions at = items.at(rows.next_item, current);
        if (at.own < 0 || !at.can_be(from)) continue;
        if (warp.thread_rank() == 0) {
            stages.wait_reusable();
            stages.load(rows.loads, from.own_rows + static_cast<int64_t>(at.own) * c.p.row_bytes, c.p.row_bytes);
        }
        rows.loads.advance(c.p.geometry.recv.num_stages);
        ++rows.num_under_way;
    }
}

// The own row is added to the peer's, or stands alone; where neither has one, the sum is zero.
EP_DEVICE void put_sum(algo::Warp warp, const CombineContext& c, const algo::Stages& stages, int token,
                       const AddPositions& at, OwnRows& rows) {
    uint8_t* sum = c.p.combined_x + static_cast<int64_t>(token) * c.p.row_bytes;
    if (at.own < 0) {
        if (at.far < 0)
            algo::for_each(warp, static_cast<int>(c.p.row_bytes / sizeof(Vec16)), [&](int i) {
                prim::store_streaming(reinterpret_cast<Vec16*>(sum) + i, Vec16{});
            });
        return;
    }
    stages.wait(rows.takes);
    if (warp.thread_rank() == 0) {
        prim::fence_async_global();  // the peer's row, whose flag this lane has seen
        if (at.far >= 0)
            prim::bulk_add_bf16(sum, stages.at(rows.takes), c.p.row_bytes);
        else
            prim::bulk_store(sum, stages.at(rows.takes), c.p.row_bytes);
        prim::bulk_commit();
    }
    rows.takes.advance(c.p.geometry.recv.num_stages);
    --rows.num_under_way;
}

EP_DEVICE bool add_rows(algo::Warp warp, const CombineContext& c, int warp_idx, int num_warps, uint8_t* memory) {
    const AddSources from = add_sources(c);
    const algo::Stages stages(memory, c.p.geometry.recv);
    stages.init(warp);
    AddItems items(warp, c, from, warp_idx, num_warps);
    OwnRows rows;
    bool is_ok = true;
    for (int item = 0; is_ok && item < items.count(); ++item) {
        items.begin(warp, item);
        load_own_rows(warp, c, from, stages, items, item, rows);
        const AddPositions at = items.at(item, item);
        is_ok = warp.thread_rank() != 0 ||
                (are_stated(c, from, items.token(item), at) && wait_for_far_row(c, from, at.far));
        is_ok = __all_sync(kFullMask, is_ok);
        if (is_ok) put_sum(warp, c, stages, items.token(item), at, rows);
    }
    for (; rows.num_under_way > 0; --rows.num_under_way) {  // given up: nothing may land after the end
        stages.wait(rows.takes);
        rows.takes.advance(c.p.geometry.recv.num_stages);
    }
    if (warp.thread_rank() == 0) prim::bulk_wait<0>();
    return is_ok;
}

// Sums of the weights, in rank order: a lane for each token of 32. The peer has put its own where it can write.
EP_DEVICE bool add_weights(algo::Warp warp, const CombineContext& c, int idx, int count) {
    if (c.p.num_topk == 0) return true;
    const CombineParams& p = c.p;
    const AddSources from = add_sources(c);
    for (int first = idx * kWarpSize; first < p.num_tokens; first += count * kWarpSize) {
        const int token = first + warp.thread_rank();
        const AddPositions at = add_positions(c, from, token);
        if (!algo::all(warp, are_stated(c, from, token, at) && wait_for_far_row(c, from, at.far))) return false;
        if (token >= p.num_tokens) continue;
        const int64_t row = static_cast<int64_t>(token) * p.num_topk;
        const float* own = at.own < 0 ? nullptr : from.own_weights + static_cast<int64_t>(at.own) * p.num_topk;
        const float* far = at.far < 0 ? nullptr : p.lent_weights + row;
        const float* weights[2] = {from.self == 0 ? own : far, from.self == 0 ? far : own};
#pragma unroll 4
        for (int k = 0; k < p.num_topk; ++k) {
            const float of_first = weights[0] != nullptr ? weights[0][k] : 0.0f;
            const float of_second = weights[1] != nullptr ? weights[1][k] : 0.0f;
            p.combined_topk_weights[row + k] = 0.0f + of_first + of_second;
        }
    }
    return true;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
