// The send phase of combine: our top-k weights to every rank; then one summed row for each token that has experts here.
//
// A block sums its tokens batch by batch. It lists the rows of a batch in shared memory before it knows anything of the
// call, so that they are on their way to it while it waits for the weights.
#pragma once

#include "device/algo/stages.h"
#include "kernels/low_latency/combine_batch.h"
#include "kernels/low_latency/combine_row.h"
#include "kernels/low_latency/turn.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

constexpr int kRowsAtOnce = 4;    // that are read before the first of them is added
constexpr int kWeightsAhead = 4;  // table entries of a thread

// The rows of a batch in the order in which one warp adds them: of the first token its first chunk of each row, then its
// next chunk, and so on through all tokens.
struct RowCursor {
    int token, chunk;
    int group;      // of the token's entries
    uint32_t rest;  // entries of that whose rows are still to come; zero: no more in the batch

    static EP_DEVICE RowCursor begin(const Params& p, const Batch& batch) {
        RowCursor cursor{0, prim::warp_idx(), -1, 0};
        if (cursor.chunk >= num_chunks(p.call)) cursor.token = batch.num_tokens;
        cursor.find_group(p, batch);
        return cursor;
    }
    EP_DEVICE int row(const Params& p, const Batch& batch) const {
        return batch.rows[token * p.call.num_topk + group * kWarpSize + __ffs(static_cast<int>(rest)) - 1];
    }
    EP_DEVICE void advance(const Params& p, const Batch& batch) {
        rest &= rest - 1;
        if (rest == 0) find_group(p, batch);
    }

private:
    EP_DEVICE void find_group(const Params& p, const Batch& batch) {
        while (rest == 0 && token < batch.num_tokens) {
            if (++group == p.batch.num_groups) {
                group = 0;
                chunk += num_warps();
            }
            if (chunk >= num_chunks(p.call)) {
                chunk = prim::warp_idx();
                ++token;
            }
            if (token < batch.num_tokens) rest = batch.placed[token * p.batch.num_groups + group];
        }
    }
};

// One warp's chunks of rows, on their way through its ring of stages in the order in which they are added. Without bulk
// copies they are loaded when they are wanted.
template <bool kIsLogfmt> class RowStream {
public:
    EP_DEVICE explicit RowStream(const Params& p)
        : stages_(static_cast<uint8_t*>(prim::dynamic_shared()) + prim::warp_idx() * p.staging.bytes(), p.staging),
          num_stages_(p.staging.num_stages) {
        if (prim::has_bulk_copy()) stages_.init();
    }

    // The whole warp, after list_rows; nothing is on its way.
    EP_DEVICE void start(const Params& p, const Batch& batch) {
        next_ = RowCursor::begin(p, batch);
        load_ahead(p, batch);
    }

    // The next row's piece. `row`: which one it is.
    EP_DEVICE Piece take(const Params& p, int row, int chunk) {
        const int num_vecs = num_chunk_vecs(p.call, chunk);
        if (!prim::has_bulk_copy()) {
            const auto* source = chunk_of(p, row, chunk);
            return load_piece(kPieces<kIsLogfmt>, num_vecs, [&](int vec) { return prim::load_input(source + vec); });
        }
        stages_.wait(read_);
        const auto* stage = reinterpret_cast<const Vec16*>(stages_.at(read_));
        read_.advance(num_stages_);
        --num_loading_;
        return load_piece(kPieces<kIsLogfmt>, num_vecs, [&](int vec) { return prim::load_shared(stage + vec); });
    }

    // The whole warp: stages that have been read are loaded again.
    EP_DEVICE void go_on(const Params& p, const Batch& batch) {
        if (next_.rest == 0) return;
        __syncwarp();  // every lane's reads, one lane's loads
        load_ahead(p, batch);
    }

    // The whole warp: what is on its way must land before the block ends.
    EP_DEVICE void drain() {
        for (; num_loading_ > 0; --num_loading_) {
            stages_.wait(read_);
            read_.advance(num_stages_);
        }
    }

private:
    static EP_DEVICE const Vec16* chunk_of(const Params& p, int row, int chunk) {
        const auto* rows = reinterpret_cast<const Vec16*>(p.x);
        return rows + static_cast<int64_t>(row) * num_row_vecs(p.call) + chunk * kChunkVecs;
    }

    EP_DEVICE void load_ahead(const Params& p, const Batch& batch) {
        if (!prim::has_bulk_copy()) return;
        while (num_loading_ < num_stages_ && next_.rest != 0) {
            if (prim::lane_idx() == 0)
                stages_.load(load_, chunk_of(p, next_.row(p, batch), next_.chunk),
                             static_cast<uint32_t>(num_chunk_vecs(p.call, next_.chunk)) * sizeof(Vec16));
            next_.advance(p, batch);
            load_.advance(num_stages_);
            ++num_loading_;
        }
    }

    algo::Stages stages_;
    algo::StageCursor load_, read_;
    RowCursor next_ = {};  // to be loaded
    int num_stages_;
    int num_loading_ = 0;
};

// One warp: the rows of one token's group of entries, in order of k.
template <bool kIsLogfmt>
EP_DEVICE void add_rows(const Params& p, const Batch& batch, int token, int group, int chunk,
                        RowStream<kIsLogfmt>& stream, Sums& sums) {
    const uint32_t placed = batch.placed[token * p.batch.num_groups + group];
    const uint32_t wanted = batch.wanted[token * p.batch.num_groups + group];
    const int first = token * p.call.num_topk + group * kWarpSize;
#pragma unroll 1
    for (uint32_t rest = placed; rest != 0;) {
        Piece held[kRowsAtOnce];
        uint32_t taken = rest;
#pragma unroll
        for (Piece& piece : held) {
            if (taken == 0) break;
            piece = stream.take(p, batch.rows[first + __ffs(static_cast<int>(taken)) - 1], chunk);
            taken &= taken - 1;
        }
        stream.go_on(p, batch);
#pragma unroll
        for (const Piece& piece : held) {
            if (rest == 0) break;
            const int k = __ffs(static_cast<int>(rest)) - 1;
            if ((wanted >> k & 1u) != 0) add(sums, piece, batch.weights[first + k]);
            rest &= rest - 1;
        }
    }
}

// All threads: the batch's tokens, each to its owner; then one flag for each.
template <bool kIsLogfmt>
EP_DEVICE void send_tokens(const Params& p, const Context& c, const Batch& batch, RowStream<kIsLogfmt>& stream) {
#pragma unroll 1
    for (int i = 0; i < batch.num_tokens; ++i) {
        const Token token = token_of(c, batch, i);
        const bool is_sent = is_wanted(p, batch, i);
#pragma unroll 1
        for (int chunk = prim::warp_idx(); chunk < num_chunks(p.call); chunk += num_warps()) {
            Sums sums = {};
#pragma unroll 1
            for (int group = 0; group < p.batch.num_groups; ++group) add_rows(p, batch, i, group, chunk, stream, sums);
            if (is_sent) store_part<kIsLogfmt>(p.call, sums, chunk, c.slot(token.source, c.rank(), token.idx));
        }
    }
    __syncthreads();  // every warp's parts of the rows, one warp's releases
    if (static_cast<int>(threadIdx.x) >= batch.num_tokens || !is_wanted(p, batch, static_cast<int>(threadIdx.x)))
        return;
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

template <bool kIsLogfmt> EP_DEVICE void send(const Params& p, Context& c, Block* block) {
    // Most likely the block that begins first.
    const bool has_weights = blockIdx.x == 0;
    Weights weights = {};
    if (has_weights) weights = load_weights(p, c, 0);
    Batch batch = batch_from(p, c, 0);
    RowStream<kIsLogfmt> stream(p);
    list_rows(p, c, batch);
    stream.start(p, batch);
    begin_send(c, block);
    if (block->is_ready == 0) {
        stream.drain();
        batch.num_tokens = 0;
    } else if (block->is_first != 0) {
        send_weights(p, c, weights, has_weights);
    }
#pragma unroll 1
    while (batch.num_tokens > 0) {
        wait_for_tables(c, batch.is_here);
        list_weights(p, c, batch);
        send_tokens(p, c, batch, stream);
        batch = batch_from(p, c, batch.first + batch.num_tokens);
        list_rows(p, c, batch);
        stream.start(p, batch);
    }
    end_send(c, block);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
