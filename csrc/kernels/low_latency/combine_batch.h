// What a block of combine knows of the tokens that it sums next.
#pragma once

#include "kernels/low_latency/frame.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

using Params = LowLatencyCombineParams;

struct Token {
    int source, idx;
};

// Some of this block's tokens. What is known of them is in dynamic shared memory; see layout::LowLatencyBatch.
struct Batch {
    const Params& p;
    int first, num_tokens;  // of the block's tokens

    static EP_DEVICE Batch begin(const Params& p, int num_tokens_of_block) {
        Batch batch{p, 0, 0};
        batch.go_on(num_tokens_of_block);
        return batch;
    }
    // To those after it; none: no tokens.
    EP_DEVICE void go_on(int num_tokens_of_block) {
        first += num_tokens;
        const int rest = num_tokens_of_block - first;
        num_tokens = rest < p.batch.num_tokens ? rest : p.batch.num_tokens;
    }

    EP_DEVICE int* is_here() const { return at<int>(p.batch.is_here); }
    EP_DEVICE uint32_t& placed(int i, int group) const {
        return at<uint32_t>(p.batch.placed)[i * p.batch.num_groups + group];
    }
    EP_DEVICE uint32_t& wanted(int i, int group) const {
        return at<uint32_t>(p.batch.wanted)[i * p.batch.num_groups + group];
    }
    EP_DEVICE int& row(int i, int k) const { return at<int>(p.batch.rows)[i * p.call.num_topk + k]; }
    EP_DEVICE float& weight(int i, int k) const { return at<float>(p.batch.weights)[i * p.call.num_topk + k]; }

private:
    template <class T> EP_DEVICE T* at(const layout::Field& field) const {
        return reinterpret_cast<T*>(static_cast<uint8_t*>(prim::dynamic_shared()) + field.offset);
    }
};

// Every num_blocks-th token of all ranks is this block's.
EP_DEVICE int num_tokens_of_block(const Params& p, const Context& c) {
    const int rest = c.num_ranks() * p.call.num_max_tokens - static_cast<int>(blockIdx.x);
    const int num_blocks = static_cast<int>(gridDim.x);
    return rest > 0 ? (rest + num_blocks - 1) / num_blocks : 0;
}

// Tokens of all sources in turn, so that no link is the last; every rank begins with another source.
EP_DEVICE Token token_of(const Context& c, const Batch& batch, int i) {
    const int idx = static_cast<int>(blockIdx.x) + (batch.first + i) * static_cast<int>(gridDim.x);
    return {(c.rank() + 1 + idx) % c.num_ranks(), idx / c.num_ranks()};
}

// A warp for each token: `work(i, group)` for the groups of 32 entries of the batch's i-th token.
template <class Work> EP_DEVICE void for_each_group(const Batch& batch, const Work& work) {
#pragma unroll 1
    for (int i = prim::warp_idx(); i < batch.num_tokens; i += num_warps())
#pragma unroll 1
        for (int group = 0; group < batch.p.batch.num_groups; ++group) work(i, group);
}

// All threads. The rows are those of the dispatch, so they are known before the weights.
EP_DEVICE void list_rows(const Params& p, const Context& c, const Batch& batch) {
    for_each_group(batch, [&](int i, int group) {
        const Token token = token_of(c, batch, i);
        const int k = group * kWarpSize + prim::lane_idx();
        const bool exists = k < p.call.num_topk;
        const int64_t idx = static_cast<int64_t>(token.source) * p.call.num_max_tokens + token.idx;
        int row = exists ? p.row_of_entry[idx * p.call.num_topk + k] : -1;
        // With another handle than that of the dispatch the row is garbage, and must not be an address as well.
        if (row >= c.num_local_experts() * c.num_rows_of_expert()) row = -1;
        const uint32_t placed = __ballot_sync(kFullMask, row >= 0);
        if (exists) batch.row(i, k) = row;
        if (prim::lane_idx() == 0) batch.placed(i, group) = placed;
    });
    __syncthreads();
}

// All threads, after wait_for_tables.
EP_DEVICE void list_weights(const Params& p, const Context& c, const Batch& batch) {
    for_each_group(batch, [&](int i, int group) {
        const Token token = token_of(c, batch, i);
        const int k = group * kWarpSize + prim::lane_idx();
        int num_tokens = 0, expert = -1;
        if (k < p.call.num_topk && batch.is_here()[token.source] != 0) {
            const int64_t idx = static_cast<int64_t>(token.idx) * p.call.num_topk + k;
            num_tokens = c.num_tokens_of(token.source);
            expert = c.table(token.source)[idx];
            batch.weight(i, k) = c.weight_table(token.source)[idx];
        }
        const uint32_t wanted = __ballot_sync(kFullMask, token.idx < num_tokens && local_expert(c, expert) >= 0);
        if (prim::lane_idx() == 0) batch.wanted(i, group) = wanted;
    });
    __syncthreads();
}

// Has the batch's i-th token experts here?
EP_DEVICE bool is_wanted(const Batch& batch, int i) {
    uint32_t wanted = 0;
    for (int group = 0; group < batch.p.batch.num_groups; ++group) wanted |= batch.wanted(i, group);
    return wanted != 0;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
