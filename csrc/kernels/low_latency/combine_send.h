// The send phase of combine: our top-k weights to every rank; then one summed row for each token that has experts here.
//
// A block sums its tokens batch by batch. It lists the rows of a batch before it knows anything of the call, so that the
// first of them are on their way while it waits for the weights.
#pragma once

#include "kernels/low_latency/combine_batch.h"
#include "kernels/low_latency/combine_row.h"
#include "kernels/low_latency/turn.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

constexpr int kRowsAhead = 4;     // of a token, whose loads are under way at once
constexpr int kWeightsAhead = 4;  // table entries of a thread

// Up to kRowsAhead rows of experts, of each this lane's piece of a chunk.
struct Ahead {
    Piece piece[kRowsAhead];
};

// Entries of the batch's i-th token, `rest` of the 32 from `first_k` on.
struct Entries {
    int i, first_k;
    uint32_t rest;

    EP_DEVICE int k() const { return first_k + __ffs(static_cast<int>(rest)) - 1; }  // the first
};

// One warp: the rows of the first entries.
template <bool kIsLogfmt>
EP_DEVICE void load_ahead(const Params& p, const Batch& batch, Entries entries, int chunk, Ahead& ahead) {
    const auto* rows = reinterpret_cast<const Vec16*>(p.x) + chunk * kChunkVecs;
#pragma unroll
    for (Piece& piece : ahead.piece) {
        if (entries.rest == 0) break;
        const Vec16* row = rows + static_cast<int64_t>(batch.row(entries.i, entries.k())) * num_row_vecs(p.call);
        piece = load_piece(kPieces<kIsLogfmt>, num_chunk_vecs(p.call, chunk),
                           [&](int vec) { return prim::load_input(row + vec); });
        entries.rest &= entries.rest - 1;
    }
}

// Adds them, in order of k, where the caller has kept the entry. The rest of the entries is left.
EP_DEVICE void add_ahead(const Batch& batch, Entries& entries, uint32_t wanted, const Ahead& ahead, Sums& sums) {
#pragma unroll
    for (const Piece& piece : ahead.piece) {
        if (entries.rest == 0) break;
        if ((entries.rest & -entries.rest & wanted) != 0) add(sums, piece, batch.weight(entries.i, entries.k()));
        entries.rest &= entries.rest - 1;
    }
}

// One warp: begins a chunk of the batch's i-th token, if there is one.
template <bool kIsLogfmt>
EP_DEVICE void begin_chunk(const Params& p, const Batch& batch, int i, int chunk, Ahead& ahead) {
    if (i < batch.num_tokens && chunk < num_chunks(p.call))
        load_ahead<kIsLogfmt>(p, batch, {i, 0, batch.placed(i, 0)}, chunk, ahead);
}

// One warp: the sum of what it has begun.
template <bool kIsLogfmt>
EP_DEVICE Sums sum_chunk(const Params& p, const Batch& batch, int i, int chunk, Ahead& ahead) {
    Sums sums = {};
#pragma unroll 1
    for (int group = 0; group < p.batch.num_groups; ++group) {
        Entries entries{i, group * kWarpSize, batch.placed(i, group)};
        const uint32_t wanted = batch.wanted(i, group);
        if (group == 0) add_ahead(batch, entries, wanted, ahead, sums);
#pragma unroll 1
        while (entries.rest != 0) {
            load_ahead<kIsLogfmt>(p, batch, entries, chunk, ahead);
            add_ahead(batch, entries, wanted, ahead, sums);
        }
    }
    return sums;
}

// All threads: the batch's tokens, each to its owner; then one flag for each. `ahead`: of each warp's first chunk.
template <bool kIsLogfmt>
EP_DEVICE void send_tokens(const Params& p, const Context& c, const Batch& batch, Ahead& ahead) {
#pragma unroll 1
    for (int i = 0; i < batch.num_tokens; ++i) {
        const Token token = token_of(c, batch, i);
        const bool is_sent = is_wanted(batch, i);
#pragma unroll 1
        for (int chunk = prim::warp_idx(); chunk < num_chunks(p.call); chunk += num_warps()) {
            const Sums sums = sum_chunk<kIsLogfmt>(p, batch, i, chunk, ahead);
            if (const int next = chunk + num_warps(); next < num_chunks(p.call))
                begin_chunk<kIsLogfmt>(p, batch, i, next, ahead);
            else
                begin_chunk<kIsLogfmt>(p, batch, i + 1, prim::warp_idx(), ahead);
            if (is_sent) store_part<kIsLogfmt>(p.call, sums, chunk, c.slot(token.source, c.rank(), token.idx));
        }
    }
    __syncthreads();  // every warp's parts of the rows, one warp's releases
    if (static_cast<int>(threadIdx.x) >= batch.num_tokens || !is_wanted(batch, static_cast<int>(threadIdx.x))) return;
    const Token token = token_of(c, batch, static_cast<int>(threadIdx.x));
    // Pairs with: wait_for_parts at the owner.
    prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.token_full(token.source, c.bank, c.rank(), token.idx),
                                              c.watch.call);
}

// A thread's part of our own table, from entry `base` on.
struct Weights {
    int expert[kWeightsAhead];
    float weight[kWeightsAhead];
};

EP_DEVICE Weights load_weights(const Params& p, const Context& c, int base) {
    Weights held = {};
#pragma unroll
    for (int i = 0; i < kWeightsAhead; ++i) {
        const int entry = base + i * step_of_block() + first_of_block();
        if (entry >= p.num_tokens * c.call.num_topk) continue;
        // An id out of range reaches no rank; the table must agree.
        held.expert[i] = checked_expert(c, load_expert_id(p.topk_idx, p.idx_bytes, entry));
        held.weight[i] = p.topk_weights[entry];
    }
    return held;
}

// All threads of the block that began first: our top-k ids and weights to every rank. Peers wait for them in their
// send phases, so they must not depend on a block that may not be resident yet.
EP_DEVICE void send_weights(const Params& p, const Context& c, Weights held, bool is_loaded) {
    const int num_entries = p.num_tokens * c.call.num_topk;
    for (int base = 0; base < num_entries; base += kWeightsAhead * step_of_block()) {
        if (base > 0 || !is_loaded) held = load_weights(p, c, base);
        for (int peer = 0; peer < c.num_ranks(); ++peer) {
            uint8_t* message = c.message(peer, c.rank());
            auto* ids = reinterpret_cast<int*>(message + c.call.message.topk_idx.offset);
            auto* weights = reinterpret_cast<float*>(message + c.call.message.topk_weights.offset);
#pragma unroll
            for (int i = 0; i < kWeightsAhead; ++i) {
                const int entry = base + i * step_of_block() + first_of_block();
                if (entry < num_entries) ids[entry] = held.expert[i];
                if (entry < num_entries) weights[entry] = held.weight[i];
            }
        }
    }
    publish_table(c, p.num_tokens);
    if (is_last_warp()) publish_ended(c);
}

template <bool kIsLogfmt> EP_DEVICE void send(const Params& p, const Context& c, Block* block) {
    // Most likely the block that begins first.
    const bool has_weights = blockIdx.x == 0;
    Weights weights = {};
    if (has_weights) weights = load_weights(p, c, 0);
    Batch batch = Batch::begin(p, num_tokens_of_block(p, c));
    Ahead ahead;
    list_rows(p, c, batch);
    begin_chunk<kIsLogfmt>(p, batch, 0, prim::warp_idx(), ahead);
    begin_send(c, block);
    const bool is_ready = block->is_ready != 0;
    if (is_ready && block->is_first != 0) send_weights(p, c, weights, has_weights);
#pragma unroll 1
    while (is_ready && batch.num_tokens > 0) {
        wait_for_tables(c, batch.is_here());
        list_weights(p, c, batch);
        send_tokens<kIsLogfmt>(p, c, batch, ahead);
        batch.go_on(num_tokens_of_block(p, c));
        list_rows(p, c, batch);
        begin_chunk<kIsLogfmt>(p, batch, 0, prim::warp_idx(), ahead);
    }
    end_send(c, block);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
