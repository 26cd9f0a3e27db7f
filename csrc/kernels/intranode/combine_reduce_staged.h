// The reducing role of combine with bulk copies: a warp loads pieces of rows ahead through shared memory. It needs a lane for
// each rank and each bias.
#pragma once

#include "device/algo/ring.h"
#include "kernels/intranode/combine_reduce.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

constexpr int kStagedUnroll = 7;
constexpr int kChunkVecs = kStagedUnroll * kWarpSize;  // of a row: what a warp has in a stage, and sums at a time
static_assert(kChunkVecs * sizeof(Vec16) == layout::kReduceStageBytes);

// Of kUnroll vectors of one lane.
template <int kUnroll> struct PieceSums { algo::Bf16Sums of[kUnroll]; };

template <int kUnroll>
EP_DEVICE void write_sums(algo::Warp warp, const PieceSums<kUnroll>& sums, Vec16* target, int base, int num_vecs) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        const int idx = base + i * kWarpSize + warp.thread_rank();
        const Vec16 value = sums.of[i].rounded();  // outside the branch, which would take the vectors one by one
        if (idx < num_vecs) prim::store_streaming(target + idx, value);
    }
}

// Lane i's source, with its slots worked out once.
struct StagedSource : RowSource {
    algo::Port port;
};

EP_DEVICE StagedSource staged_source(algo::Warp warp, const CombineContext& c) {
    const RowSource source = source_at(c, warp.thread_rank());
    return {source, c.ring.from(source.is_rank(c) ? source.index : c.watch.heap.rank())};
}

// What a reduce warp knows about a token. Lane i speaks for source i.
struct TokenRows {
    int token;
    int position;            // of the source's row, -1: none
    const uint8_t* pointer;  // of the source's row
    uint32_t lanes;          // that have a row
    bool is_here;            // all rows have come
};

EP_DEVICE TokenRows open_token(const CombineContext& c, const StagedSource& source, int token, int position) {
    const uint8_t* pointer = position < 0             ? nullptr
                             : source.rows != nullptr ? source.rows + static_cast<int64_t>(position) * c.p.row_bytes
                                                      : source.port.slot(position);
    return {token, position, pointer, __ballot_sync(kFullMask, pointer != nullptr), false};
}

EP_DEVICE bool wait_for_rows(algo::Warp warp, const CombineContext& c, const StagedSource& source,
                             const TokenRows& token) {
    bool is_here = true;
    if (token.position >= source.num_rows)
        is_here = refuse_position(c.watch, source.index, token.token, token.position, source.num_rows);
    else if (token.position >= 0 && source.rows == nullptr)
        is_here = c.ring.wait(Stage::kRow, source.index, source.port.row_is_here(token.position));
    return algo::all(warp, is_here);
}

EP_DEVICE bool rows_are_here(algo::Warp warp, const CombineContext& c, const StagedSource& source,
                             const TokenRows& token) {
    if (!__all_sync(kFullMask, token.position < source.num_rows)) return false;  // wait_for_rows says what is wrong
    const bool is_in_slot = token.position >= 0 && source.rows == nullptr;
    if (!__any_sync(kFullMask, is_in_slot)) return true;
    bool is_here = !is_in_slot || c.ring.is_set(source.port.row_is_here(token.position));
    is_here = __all_sync(kFullMask, is_here);
    warp.sync();  // each lane's acquire, the leader's bulk loads
    prim::fence_async_global();
    return is_here;
}

// How far the loads have come: chunk by chunk, of each chunk one piece for each rank, in this token or the next.
struct Fetch {
    algo::StageCursor cursor;  // of the next piece to be loaded
    int num_under_way = 0;     // pieces loaded and not yet taken
    int base;                  // of the chunk, in vectors
    uint32_t rest;             // ranks whose piece of this chunk is still to be loaded
    bool is_on_next = false;

    EP_DEVICE void start(const TokenRows& token, bool is_next) {
        base = 0;
        rest = token.lanes;
        is_on_next = is_next;
    }
};

// Loads pieces until every stage is taken or no more rows are there. Waits for nothing.
EP_DEVICE void fetch_more(algo::Warp warp, const CombineContext& c, const StagedSource& source,
                          const algo::Stages& stages, Fetch& fetch, const TokenRows& now, TokenRows& next) {
    const int num_stages = c.p.geometry.recv.num_stages;
    const int num_vecs = static_cast<int>(c.p.row_bytes / sizeof(Vec16));
    while (fetch.num_under_way < num_stages) {
        if (fetch.rest != 0) {
            const int rank = __ffs(static_cast<int>(fetch.rest)) - 1;
            const uint8_t* row = algo::broadcast_pointer(warp, fetch.is_on_next ? next.pointer : now.pointer, rank);
            const int num_left = num_vecs - fetch.base;
            const int num_here = num_left < kChunkVecs ? num_left : kChunkVecs;
            if (warp.thread_rank() == 0)
                stages.load(fetch.cursor, reinterpret_cast<const Vec16*>(row) + fetch.base,
                            static_cast<uint32_t>(num_here) * sizeof(Vec16));
            fetch.cursor.advance(num_stages);
            ++fetch.num_under_way;
            fetch.rest &= fetch.rest - 1;
        } else if (fetch.base + kChunkVecs < num_vecs) {
            fetch.base += kChunkVecs;
            fetch.rest = fetch.is_on_next ? next.lanes : now.lanes;
        } else {
            if (fetch.is_on_next) return;
            if (!next.is_here) next.is_here = rows_are_here(warp, c, source, next);
            if (!next.is_here) return;
            fetch.start(next, true);
        }
    }
}

// Some vectors of a stage beyond the end of the row may be old: their sums are not written.
EP_DEVICE void add_stage(algo::Warp warp, PieceSums<kStagedUnroll>& sums, const uint8_t* stage) {
    const Vec16* vectors = reinterpret_cast<const Vec16*>(stage) + warp.thread_rank();
    Vec16 held[kStagedUnroll];
#pragma unroll
    for (int i = 0; i < kStagedUnroll; ++i) held[i] = prim::load_shared(vectors + i * kWarpSize);
#pragma unroll
    for (int i = 0; i < kStagedUnroll; ++i) sums.of[i].add(held[i]);
}

// Sums of the weights that belong to the rows, in rank order like everything.
EP_DEVICE void sum_weights(algo::Warp warp, const CombineContext& c, const StagedSource& source,
                           const TokenRows& token) {
    constexpr int kBatch = 4;
    const CombineParams& p = c.p;
    const uint32_t ranks = token.lanes & (kFullMask >> (kWarpSize - c.watch.heap.num_ranks()));
    const float* mine = nullptr;
    if (token.position >= 0 && p.num_topk > 0)
        mine = source.rows != nullptr ? source.weights + static_cast<int64_t>(token.position) * p.num_topk
                                      : reinterpret_cast<const float*>(token.pointer + p.slot.topk_weights.offset);
    for (int first = 0; first < p.num_topk; first += kWarpSize) {
        const int k = first + warp.thread_rank();
        float sum = 0.0f;
        for (uint32_t rest = ranks; rest != 0;) {
            float held[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int rank = rest != 0 ? __ffs(static_cast<int>(rest)) - 1 : 0;
                const float* weights = algo::broadcast_pointer(warp, mine, rank);
                held[i] = rest != 0 && k < p.num_topk ? weights[k] : 0.0f;
                rest &= rest - 1;
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) sum += held[i];
        }
        if (k < p.num_topk) p.combined_topk_weights[static_cast<int64_t>(token.token) * p.num_topk + k] = sum;
    }
}

// The sum of one chunk of the token, while pieces of later ones are loaded.
EP_DEVICE PieceSums<kStagedUnroll> sum_chunk(algo::Warp warp, const CombineContext& c, const StagedSource& source,
                                             const algo::Stages& stages, Fetch& fetch, algo::StageCursor& taken,
                                             const TokenRows& now, TokenRows& next) {
    PieceSums<kStagedUnroll> sums = {};
    for (uint32_t rest = now.lanes; rest != 0; rest &= rest - 1) {
        fetch_more(warp, c, source, stages, fetch, now, next);
        stages.wait(taken);
        add_stage(warp, sums, stages.at(taken));
        taken.advance(c.p.geometry.recv.num_stages);
        --fetch.num_under_way;
        prim::fence_async_shared();
        warp.sync();  // every lane's reads of the stage, the leader's next load into it
    }
    return sums;
}

EP_DEVICE bool reduce_staged(algo::Warp warp, const CombineContext& c, FlagRequester& flags, int warp_idx,
                             int num_warps, uint8_t* memory) {
    const CombineParams& p = c.p;
    const int num_vecs = static_cast<int>(p.row_bytes / sizeof(Vec16));
    const StagedSource source = staged_source(warp, c);
    const algo::Stages stages(memory, p.geometry.recv);
    prim::fence_async_global();  // the loans that this block has seen, this lane's bulk loads
    stages.init(warp);
    bool has_weights = false;
    Fetch fetch;
    algo::StageCursor taken;
    TokenRows now = open_token(c, source, warp_idx, position_of(c, source, warp_idx));
    int position_after = position_of(c, source, warp_idx + num_warps);
    while (now.token < p.num_tokens) {
        if (!now.is_here) {  // then nothing is under way
            if (!wait_for_rows(warp, c, source, now)) return false;
            prim::fence_async_global();
            fetch.start(now, false);
        }
        TokenRows next = open_token(c, source, now.token + num_warps, position_after);
        position_after = position_of(c, source, next.token + num_warps);
        const int64_t token_offset = static_cast<int64_t>(now.token) * p.row_bytes;
        for (int base = 0; base < num_vecs; base += kChunkVecs) {
            const PieceSums<kStagedUnroll> sums = sum_chunk(warp, c, source, stages, fetch, taken, now, next);
            write_sums(warp, sums, reinterpret_cast<Vec16*>(p.combined_x + token_offset), base, num_vecs);
        }
        if (!has_weights && !wait_for_weights(warp, c)) {
            for (; fetch.num_under_way > 0; --fetch.num_under_way) {
                stages.wait(taken);  // given up: nothing may land after the end
                taken.advance(p.geometry.recv.num_stages);
            }
            return false;
        }
        has_weights = true;
        sum_weights(warp, c, source, now);
        warp.sync();  // every lane's reads, one lane's request
        give_slots_back(warp, c, flags, source, source.rows == nullptr ? now.position : -1);
        fetch.is_on_next = false;
        now = next;
    }
    return true;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
