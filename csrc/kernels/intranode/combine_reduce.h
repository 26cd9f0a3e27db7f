// The reducing role of combine: the sum of a token's rows, in FP32 and in rank order, straight from where they stand.
//
// A row stands in our own input, in a slot that its rank has filled, or in the input that its rank lends. A bias is one more
// source of a token, behind the ranks. Here rows come by ordinary loads, two at a time, and no sums are kept while a piece
// of two rows is on its way, so that more of it can be; combine_reduce_staged.h loads ahead through shared memory.
#pragma once

#include <type_traits>

#include "device/algo/formats.h"
#include "device/algo/group.h"
#include "device/algo/watch.h"
#include "kernels/intranode/combine_context.h"
#include "kernels/params.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

constexpr int kPairVecs = 7;  // that a lane holds of each of two rows
constexpr int kSumVecs = 4;   // the same beside sums of so many

// Where the source's rows for us stand.
struct RowSource {
    int index;             // ranks in ascending order, then the biases
    const uint8_t* rows;   // for us to read where they stand; null: they come into slots, or there are none
    const float* weights;  // of those
    int num_rows;          // that it has for us

    EP_DEVICE bool is_rank(const CombineContext& c) const { return index < c.watch.heap.num_ranks(); }
    EP_DEVICE bool uses_slots(const CombineContext& c) const { return rows == nullptr && is_rank(c); }
};

EP_DEVICE int num_sources(const CombineContext& c) { return c.watch.heap.num_ranks() + kMaxBiases; }

EP_DEVICE RowSource source_at(const CombineContext& c, int index) {
    const int num_ranks = c.watch.heap.num_ranks();
    if (index >= num_ranks) {
        const int bias = index - num_ranks;
        return {index, bias < kMaxBiases ? c.p.bias[bias] : nullptr, nullptr, c.p.num_tokens};
    }
    const uint8_t* rows = direct_rows(c, index);
    const bool has_weights = rows != nullptr && c.p.num_topk > 0;
    return {index, rows, has_weights ? direct_weights(c, index) : nullptr, c.rows.num_rows(c.watch.heap.rank(), index)};
}

// Of the source's row of the token, -1: it has none. A bias's row stands at the token's own position.
EP_DEVICE int position_of(const CombineContext& c, const RowSource& source, int token) {
    if (token >= c.p.num_tokens) return -1;
    if (source.is_rank(c)) return c.p.send_head[static_cast<int64_t>(token) * c.watch.heap.num_ranks() + source.index];
    return source.rows != nullptr ? token : -1;
}

// Rows that come into slots, out of line: what the two take would be kept in registers beside rows that are read in place.
// Where the row is, once it has come; null: the wait failed.
EP_DEVICE_COLD const uint8_t* filled_slot(const CombineParams* p, uint64_t call, int rank, int position) {
    const algo::Watch watch = make_watch(*p, call);
    const algo::Ring ring(watch, p->window);
    const algo::Port port = ring.from(rank);
    return ring.wait(Stage::kRow, rank, port.row_is_here(position)) ? port.slot(position) : nullptr;
}

// A token, and what a lane knows of its row at one source.
struct TokenRow {
    int token;
    int position;        // of the source's row, -1: none
    const uint8_t* row;  // null: none

    EP_DEVICE bool is_lost() const { return position >= 0 && row == nullptr; }  // the wait for it failed
};

// Where rows that come into slots are waited for: a warp that reads its peers' rows in place leaves that to filled_slot().
enum class SlotCode { kInline, kApart };

// Waits for the row. Other lanes may read it after a sync().
template <SlotCode kSlots = SlotCode::kApart>
EP_DEVICE TokenRow find_row(const CombineContext& c, const RowSource& source, int token, int position) {
    if (position < 0) return {token, position, nullptr};
    if (position >= source.num_rows) {
        refuse_position(c.watch, source.index, token, position, source.num_rows);
        return {token, position, nullptr};
    }
    if (source.rows != nullptr) return {token, position, source.rows + static_cast<int64_t>(position) * c.p.row_bytes};
    if constexpr (kSlots == SlotCode::kApart)
        return {token, position, filled_slot(&c.p, c.watch.call, source.index, position)};
    const algo::Port port = c.ring.from(source.index);
    const bool is_here = c.ring.wait(Stage::kRow, source.index, port.row_is_here(position));
    return {token, position, is_here ? port.slot(position) : nullptr};
}

// Calls use(source, row) for this lane's sources beyond the first 32. By all lanes alike.
template <class Use>
EP_DEVICE void for_further_sources(algo::Warp warp, const CombineContext& c, int token, const Use& use) {
    for (int first = kWarpSize; first < num_sources(c); first += kWarpSize) {
        const RowSource source = source_at(c, first + warp.thread_rank());
        use(source, find_row(c, source, token, position_of(c, source, token)));
    }
}

// `row`: of this lane's source among the first 32.
EP_DEVICE bool have_rows_come(algo::Warp warp, const CombineContext& c, const TokenRow& row) {
    bool is_here = !row.is_lost();
    for_further_sources(warp, c, row.token,
                        [&](const RowSource&, const TokenRow& further) { is_here &= !further.is_lost(); });
    return algo::all(warp, is_here);
}

// Calls use(first, second) with the lanes' pointers that are not null, two at a time in the order of lanes; second: null where
// there is none.
template <class T, class Use> EP_DEVICE void for_each_pair(algo::Warp warp, const T* pointer, const Use& use) {
    for (uint32_t rest = __ballot_sync(kFullMask, pointer != nullptr); rest != 0;) {
        const T* first = algo::broadcast_pointer(warp, pointer, __ffs(static_cast<int>(rest)) - 1);
        rest &= rest - 1;
        const bool has_second = rest != 0;
        const T* second = algo::broadcast_pointer(warp, pointer, has_second ? __ffs(static_cast<int>(rest)) - 1 : 0);
        rest &= rest - 1;
        use(first, has_second ? second : nullptr);
    }
}

// Part of a row: kVecs vectors of each lane, every 32nd from `first` on.
template <int kVecs> struct Chunk {
    static constexpr int kNumVecs = kVecs;

    int first;
    bool is_inside;  // of the row; where lanes have more than one vector, all of them are
};

// Calls work(chunk) for whole chunks, then for what is left, a vector of each lane at a time. Whole ones need no look at the
// row's end, and one address for all their vectors.
template <int kVecs, class Work> EP_DEVICE void for_chunks(algo::Warp warp, int num_vecs, const Work& work) {
    int base = 0;
#pragma unroll 1
    for (; base + algo::kChunkVecs<kVecs> <= num_vecs; base += algo::kChunkVecs<kVecs>)
        work(Chunk<kVecs>{base + warp.thread_rank(), true});
#pragma unroll 1
    for (; base < num_vecs; base += kWarpSize)
        work(Chunk<1>{base + warp.thread_rank(), base + warp.thread_rank() < num_vecs});
}

template <int kVecs> EP_DEVICE algo::Piece<kVecs> load_chunk(const uint8_t* row, const Chunk<kVecs>& chunk) {
    const Vec16* source = reinterpret_cast<const Vec16*>(row) + chunk.first;
    algo::Piece<kVecs> held;
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
        held.vec[i] = kVecs > 1 || chunk.is_inside ? prim::load_shared_with_peers(source + i * kWarpSize) : Vec16{};
    return held;
}

template <int kVecs>
EP_DEVICE void store_sums(const algo::Bf16Sums (&sums)[kVecs], Vec16* target, const Chunk<kVecs>& chunk) {
    target += chunk.first;
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
        if (kVecs > 1 || chunk.is_inside) prim::store_streaming(target + i * kWarpSize, sums[i].rounded());
}

template <int kVecs>
EP_DEVICE void store_chunk(const algo::Piece<kVecs>& held, uint8_t* row, const Chunk<kVecs>& chunk) {
    Vec16* target = reinterpret_cast<Vec16*>(row) + chunk.first;
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
        if (kVecs > 1 || chunk.is_inside) prim::store_streaming(target + i * kWarpSize, held.vec[i]);
}

// Of up to two rows.
template <int kRows, int kVecs>
EP_DEVICE void sum_few(algo::Warp warp, const uint8_t* const (&rows)[2], Vec16* target, const Chunk<kVecs>& chunk) {
    algo::Piece<kVecs> held[2];
#pragma unroll
    for (int row = 0; row < kRows; ++row) held[row] = load_chunk(rows[row], chunk);
    algo::issue_loads(warp);
    algo::Bf16Sums sums[kVecs] = {};
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
#pragma unroll
        for (int row = 0; row < kRows; ++row) sums[i].add(held[row].vec[i]);
    store_sums(sums, target, chunk);
}

template <int kRows>
EP_DEVICE void reduce_few(algo::Warp warp, const uint8_t* const (&rows)[2], Vec16* target, int num_vecs) {
    for_chunks<kPairVecs>(warp, num_vecs, [&](const auto& chunk) { sum_few<kRows>(warp, rows, target, chunk); });
}

// Of more rows: `for_each` calls its argument with two of them at a time.
template <class ForEach>
EP_DEVICE void reduce_many(algo::Warp warp, Vec16* target, int num_vecs, const ForEach& for_each) {
    for_chunks<kSumVecs>(warp, num_vecs, [&](const auto& chunk) {
        constexpr int kVecs = std::decay_t<decltype(chunk)>::kNumVecs;
        algo::Bf16Sums sums[kVecs] = {};
        for_each([&](const uint8_t* first, const uint8_t* second) {
            const algo::Piece<kVecs> of_first = load_chunk(first, chunk);
            const algo::Piece<kVecs> of_second = load_chunk(second != nullptr ? second : first, chunk);
#pragma unroll
            for (int i = 0; i < kVecs; ++i) sums[i].add(of_first.vec[i]);
            if (second == nullptr) return;
#pragma unroll
            for (int i = 0; i < kVecs; ++i) sums[i].add(of_second.vec[i]);
        });
        store_sums(sums, target, chunk);
    });
}

// More sources than lanes. Made anew here, the context is not kept in memory for this call.
EP_DEVICE_COLD void reduce_row_of_many(const CombineParams* p, uint64_t call, int token, Vec16* target, int num_vecs) {
    const algo::Warp warp;
    const algo::Watch watch = make_watch(*p, call);
    const algo::Ring ring(watch, p->window);
    const CombineContext c{*p, watch, ring, RowMap{p->rank_prefix_matrix, p->heap.num_ranks}};
    reduce_many(warp, target, num_vecs, [&](const auto& use) {
        const RowSource source = source_at(c, warp.thread_rank());
        for_each_pair(warp, find_row(c, source, token, position_of(c, source, token)).row, use);
        for_further_sources(warp, c, token,
                            [&](const RowSource&, const TokenRow& further) { for_each_pair(warp, further.row, use); });
    });
}

// Which lanes have a row of the token: what most tokens have between two ranks is worked on in a way of its own.
struct RowLanes {
    uint32_t lanes;
    bool are_few;

    EP_DEVICE int num_rows() const { return __popc(lanes); }
    EP_DEVICE int first() const { return lanes == 0 ? 0 : __ffs(static_cast<int>(lanes)) - 1; }
    EP_DEVICE int last() const { return kWarpSize - 1 - __clz(static_cast<int>(lanes | 1)); }
};

EP_DEVICE RowLanes row_lanes(algo::Warp, const CombineContext& c, const TokenRow& now) {
    const uint32_t lanes = __ballot_sync(kFullMask, now.row != nullptr);
    return {lanes, num_sources(c) <= kWarpSize && __popc(lanes) <= 2};
}

// Ranks in ascending order, then the biases: the order is part of the contract, it fixes the rounding.
EP_DEVICE void reduce_row(algo::Warp warp, const CombineContext& c, const TokenRow& now, const RowLanes& has_row) {
    const int num_vecs = static_cast<int>(c.p.row_bytes / sizeof(Vec16));
    auto* target = reinterpret_cast<Vec16*>(c.p.combined_x + static_cast<int64_t>(now.token) * c.p.row_bytes);
    if (num_sources(c) > kWarpSize) return reduce_row_of_many(&c.p, c.watch.call, now.token, target, num_vecs);
    if (!has_row.are_few)
        return reduce_many(warp, target, num_vecs, [&](const auto& use) { for_each_pair(warp, now.row, use); });
    const uint8_t* const rows[2] = {algo::broadcast_pointer(warp, now.row, has_row.first()),
                                    algo::broadcast_pointer(warp, now.row, has_row.last())};
    if (has_row.num_rows() == 2)
        reduce_few<2>(warp, rows, target, num_vecs);
    else if (has_row.num_rows() == 1)
        reduce_few<1>(warp, rows, target, num_vecs);
    else
        reduce_few<0>(warp, rows, target, num_vecs);
}

// Before weights are read: those of all lenders can be.
EP_DEVICE bool wait_for_weights(algo::Warp warp, const CombineContext& c) {
    if (c.p.num_topk == 0 || !c.p.may_lend) return true;
    const algo::Heap& heap = c.watch.heap;
    return algo::wait_for_ranks(
        warp, c.watch, Stage::kWeights,
        [&](int rank) { return rank != heap.rank() && algo::loan_of(c.watch, rank).x != 0; },
        [&](int rank) { return heap.weight_flag(heap.rank(), rank); }, c.watch.call);
}

// Of the source's row; null: it is no rank, or has no row.
EP_DEVICE const float* weights_at(const CombineContext& c, const RowSource& source, const TokenRow& now) {
    if (now.row == nullptr || !source.is_rank(c)) return nullptr;
    return source.rows != nullptr ? source.weights + static_cast<int64_t>(now.position) * c.p.num_topk
                                  : reinterpret_cast<const float*>(now.row + c.p.slot.topk_weights.offset);
}

// Sums of the weights that belong to the rows, in rank order like everything.
EP_DEVICE void reduce_weights(algo::Warp warp, const CombineContext& c, const RowSource& source, const TokenRow& now) {
    const CombineParams& p = c.p;
    for (int first_k = 0; first_k < p.num_topk; first_k += kWarpSize) {
        const int k = first_k + warp.thread_rank();
        const bool has_entry = k < p.num_topk;
        float sum = 0.0f;
        const auto add_pair = [&](const float* first, const float* second) {
            const float of_first = has_entry ? first[k] : 0.0f;
            const float of_second = has_entry && second != nullptr ? second[k] : 0.0f;
            sum += of_first;
            sum += of_second;
        };
        for_each_pair(warp, weights_at(c, source, now), add_pair);
        for_further_sources(warp, c, now.token, [&](const RowSource& further, const TokenRow& row) {
            for_each_pair(warp, weights_at(c, further, row), add_pair);
        });
        if (has_entry) p.combined_topk_weights[static_cast<int64_t>(now.token) * p.num_topk + k] = sum;
    }
}

// This lane's weights of few rows, which are loaded while the rows are on their way: alone, they would take as long as those.
struct HeldWeights {
    float of_first, of_last;
};

EP_DEVICE HeldWeights hold_weights(algo::Warp warp, const CombineContext& c, const RowSource& source,
                                   const TokenRow& now, const RowLanes& has_row) {
    const float* mine = weights_at(c, source, now);
    const auto load = [&](int lane) {
        const float* weights = algo::broadcast_pointer(warp, mine, lane);
        return weights != nullptr && warp.thread_rank() < c.p.num_topk ? weights[warp.thread_rank()] : 0.0f;
    };
    const float of_first = load(has_row.first());
    return {of_first, has_row.num_rows() == 2 ? load(has_row.last()) : 0.0f};
}

EP_DEVICE void write_weights(algo::Warp warp, const CombineContext& c, int token, const HeldWeights& held) {
    if (warp.thread_rank() < c.p.num_topk)
        c.p.combined_topk_weights[static_cast<int64_t>(token) * c.p.num_topk + warp.thread_rank()] =
            0.0f + held.of_first + held.of_last;
}

// A later row needs the slot of an earlier one. More sources than lanes: perhaps.
EP_DEVICE bool gives_slots_back(algo::Warp warp, const CombineContext& c) {
    const RowSource source = source_at(c, warp.thread_rank());
    const bool wraps = source.uses_slots(c) && source.num_rows > c.p.window.window;
    return num_sources(c) > kWarpSize || __any_sync(kFullMask, wraps);
}

// `position`: of the row in a slot that this lane's source has filled; -1: none.
EP_DEVICE void give_slots_back(algo::Warp warp, const CombineContext& c, FlagRequester& flags, const RowSource& source,
                               int position) {
    const bool is_due = position >= 0 && position + c.p.window.window < source.num_rows;  // else nobody needs it again
    for (uint32_t rest = __ballot_sync(kFullMask, is_due); rest != 0; rest &= rest - 1) {
        const int lane = __ffs(static_cast<int>(rest)) - 1;
        flags.slot_is_free(warp, __shfl_sync(kFullMask, source.index, lane), __shfl_sync(kFullMask, position, lane));
    }
}

// What a lane knows of its source and of its row of the token is looked up anew behind the sums: kept, it would take registers
// from the rows that are on their way.
EP_DEVICE void finish_token(algo::Warp warp, const CombineContext& c, FlagRequester& flags, int token, bool has_weights,
                            bool has_slots) {
    const RowSource source = source_at(c, warp.thread_rank());
    const TokenRow now = find_row(c, source, token, position_of(c, source, token));
    if (!has_weights) reduce_weights(warp, c, source, now);
    warp.sync();  // every lane's reads, one lane's request
    if (!has_slots) return;
    const auto give_back = [&](const RowSource& from, const TokenRow& row) {
        give_slots_back(warp, c, flags, from, from.uses_slots(c) ? row.position : -1);
    };
    give_back(source, now);
    for_further_sources(warp, c, token, give_back);
}

template <SlotCode kSlots>
EP_DEVICE bool reduce(algo::Warp warp, const CombineContext& c, FlagRequester& flags, int warp_idx, int num_warps) {
    constexpr bool kKeepsSource = kSlots == SlotCode::kInline;
    const RowSource first = source_at(c, warp.thread_rank());
    const bool has_slots = gives_slots_back(warp, c);
    bool can_read_weights = c.p.num_topk == 0;
    int position = position_of(c, first, warp_idx);
    for (int token = warp_idx; token < c.p.num_tokens; token += num_warps) {
        const RowSource source = kKeepsSource ? first : source_at(c, warp.thread_rank());
        const TokenRow now = find_row<kSlots>(c, source, token, position);
        position = position_of(c, source, token + num_warps);  // under way with this token's rows
        if (!have_rows_come(warp, c, now)) return false;
        const RowLanes has_row = row_lanes(warp, c, now);
        const bool holds_weights = can_read_weights && has_row.are_few && c.p.num_topk <= kWarpSize;
        HeldWeights held = {};
        if (holds_weights && c.p.num_topk > 0) held = hold_weights(warp, c, source, now, has_row);
        reduce_row(warp, c, now, has_row);
        if (!can_read_weights && !wait_for_weights(warp, c)) return false;
        can_read_weights = true;
        if (holds_weights) write_weights(warp, c, token, held);
        if (kKeepsSource && holds_weights) {
            warp.sync();  // every lane's reads, one lane's request
            if (has_slots) give_slots_back(warp, c, flags, source, source.uses_slots(c) ? now.position : -1);
        } else if (!holds_weights || has_slots) {
            finish_token(warp, c, flags, token, holds_weights, has_slots);
        }
    }
    return true;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
