// The adding role of combine, of one of two ranks, that lends its sums: the peer writes each of its rows where it is summed, and
// this rank adds its own row there. The L2 adds: nothing of what has come is loaded. Of two rows of bfloat16 the sum has the same
// bits as one in FP32 that is rounded, but for the sign of a zero and the bits of a NaN.
#pragma once

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

// Waits for the peer's row of a token. Out of line: what calls it holds nothing of a row meanwhile.
EP_DEVICE_COLD bool wait_for_far_row(const CombineParams* p, uint64_t call, int position) {
    const algo::Watch watch = make_watch(*p, call);
    const algo::Ring ring(watch, p->window);
    const int peer = 1 - watch.heap.rank();
    return position < 0 || ring.wait(Stage::kRow, peer, ring.from(peer).row_is_in_place(position));
}

// Looks for it a while, without a deadline, and so without a call for whose sake a chunk that is on its way would be put into
// local memory.
EP_DEVICE bool has_far_row_come(algo::Warp warp, const CombineContext& c, const AddSources& from, int position) {
    // The executor, which looks at everything in each poll, gives up soon: its tests then wait out of line as well, and its
    // clock, which leaps while all only look, ends no failed peer's patience (wait_for_quiet) before this is told.
    constexpr int kLooks = prim::polls_per_check() == 1 ? 2 : 256;
    bool is_here = warp.thread_rank() != 0;
    for (int looks = 0; !is_here && looks < kLooks; ++looks) {
        if (looks > 0) prim::pause();
        is_here = c.ring.is_set(from.port.row_is_in_place(position));
    }
    return algo::all(warp, is_here);
}

// A chunk of the own row to that of the sum, which holds the peer's.
template <int kVecs>
EP_DEVICE void add_chunk(algo::Warp, const algo::Piece<kVecs>& own, uint8_t* sum, const Chunk<kVecs>& chunk) {
    Vec16* target = reinterpret_cast<Vec16*>(sum) + chunk.first;
    if (prim::has_bf16_add()) {
#pragma unroll
        for (int i = 0; i < kVecs; ++i)
            if (kVecs > 1 || chunk.is_inside) prim::add_bf16(target + i * kWarpSize, own.vec[i]);
        return;
    }
    const algo::Piece<kVecs> far = load_chunk(sum, chunk);
    algo::Bf16Sums sums[kVecs] = {};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        sums[i].add(far.vec[i]);
        sums[i].add(own.vec[i]);
    }
    store_sums(sums, reinterpret_cast<Vec16*>(sum), chunk);
}

// The own row is added to the peer's, or stands alone. Its first chunk is loaded before the peer's row is waited for, and again
// where that takes long.
EP_DEVICE bool add_row(algo::Warp warp, const CombineContext& c, const AddSources& from, int token,
                       const AddPositions& at) {
    const int num_vecs = static_cast<int>(c.p.row_bytes / sizeof(Vec16));
    const uint8_t* own = from.own_rows + static_cast<int64_t>(at.own) * c.p.row_bytes;
    uint8_t* sum = c.p.combined_x + static_cast<int64_t>(token) * c.p.row_bytes;
    bool is_here = at.far < 0, is_ok = true;
    for_chunks<kPairVecs>(warp, num_vecs, [&](const auto& chunk) {
        auto held = load_chunk(own, chunk);
        algo::issue_loads(warp);
        if (!is_here && is_ok && !has_far_row_come(warp, c, from, at.far)) {
            is_ok = algo::all(warp, warp.thread_rank() != 0 || wait_for_far_row(&c.p, c.watch.call, at.far));
            held = load_chunk(own, chunk);
        }
        is_here = true;
        if (!is_ok) return;
        if (at.far >= 0)
            add_chunk(warp, held, sum, chunk);
        else
            store_chunk(held, sum, chunk);
    });
    return is_ok;
}

// Neither rank has a row of the token: the sum is zero.
EP_DEVICE void put_zeros(algo::Warp warp, const CombineContext& c, int token) {
    auto* sum = reinterpret_cast<Vec16*>(c.p.combined_x + static_cast<int64_t>(token) * c.p.row_bytes);
    algo::for_each(warp, static_cast<int>(c.p.row_bytes / sizeof(Vec16)),
                   [&](int i) { prim::store_streaming(sum + i, Vec16{}); });
}

EP_DEVICE bool add_rows(algo::Warp warp, const CombineContext& c, int warp_idx, int num_warps) {
    const AddSources from = add_sources(c);
    AddPositions next = add_positions(c, from, warp_idx);
    for (int token = warp_idx; token < c.p.num_tokens; token += num_warps) {
        const AddPositions at = next;
        next = add_positions(c, from, token + num_warps);  // under way with this token's row
        if (!are_stated(c, from, token, at)) return false;
        if (at.own >= 0) {
            if (!add_row(warp, c, from, token, at)) return false;
        } else if (at.far < 0) {
            put_zeros(warp, c, token);
        }
    }
    return true;
}

// The peer lends its input, and this rank sums as it would without lending its own sums: rare, and not to have its registers.
EP_DEVICE_COLD bool reduce_lent_rows(const CombineParams* p, uint64_t call, FlagRequester* flags, int warp_idx,
                                     int num_warps) {
    const algo::Watch watch = make_watch(*p, call);
    const algo::Ring ring(watch, p->window);
    const CombineContext c{*p, watch, ring, RowMap{p->rank_prefix_matrix, p->heap.num_ranks}};
    return reduce<SlotCode::kApart>(algo::Warp{}, c, *flags, warp_idx, num_warps);
}

// Sums of the weights, in rank order: a lane for each token of 32. The peer has put its own where it can write.
EP_DEVICE bool add_weights(algo::Warp warp, const CombineContext& c, int idx, int count) {
    if (c.p.num_topk == 0) return true;
    const CombineParams& p = c.p;
    const AddSources from = add_sources(c);
    for (int first = idx * kWarpSize; first < p.num_tokens; first += count * kWarpSize) {
        const int token = first + warp.thread_rank();
        const AddPositions at = add_positions(c, from, token);
        if (!algo::all(warp, are_stated(c, from, token, at) && wait_for_far_row(&c.p, c.watch.call, at.far)))
            return false;
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
