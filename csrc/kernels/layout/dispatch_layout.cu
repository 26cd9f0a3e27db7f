// get_dispatch_layout: which ranks need which token, and how many tokens and entries go where. One pass.
//
//   block b: a contiguous share of the tokens, one thread a token; counts in shared memory -> partials[b]
//   the block that ends last: sums the partials of all blocks (integers: any order gives the same result)
#include "kernels/layout/dispatch_layout.h"

#include "device/launch.h"
#include "kernels/context.h"

namespace deep_ep::kernels::dispatch_layout {
inline namespace EP_BACKEND {

using prim::Order;
using prim::Scope;

struct Kernel {
    using Params = LayoutParams;
    static constexpr int kMaxThreads = kNumThreads;
    struct Shared {
        int is_last_block;
    };

    // The ranks of 64 consecutive ones, from `first_rank`, that own one of the token's experts.
    static EP_DEVICE uint64_t rank_mask(const Params& p, int64_t token, int first_rank) {
        const int experts_per_rank = p.num_experts / p.num_ranks;
        uint64_t mask = 0;
        for (int k = 0; k < p.num_topk; ++k) {
            const int64_t expert = load_expert_id(p.topk_idx, p.idx_bytes, token * p.num_topk + k);
            if (expert < 0 || expert >= p.num_experts) continue;
            const int rank = static_cast<int>(expert) / experts_per_rank - first_rank;
            if (rank >= 0 && rank < 64) mask |= 1ull << rank;
        }
        return mask;
    }

    static EP_DEVICE void report_bad_expert(const Params& p, int token, int64_t expert) {
        layout::LocalState* local = p.watch.local;
        if (prim::compare_swap<Order::kRelaxed, Scope::kGpu>(&local->failure_claimed, 0u, 1u) != 0u) return;
        layout::WaitRecord* record = &p.watch.status->failure;
        record->kind = layout::FailureKind::kBadInput;
        record->operation = layout::Operation::kLayout;
        record->stage = layout::Stage::kInput;
        record->peer = token;
        record->expected = static_cast<uint64_t>(p.num_experts);
        record->seen = static_cast<uint64_t>(expert);
        prim::store<Order::kRelease, Scope::kSys>(&record->state, uint64_t{1});
    }

    static EP_DEVICE void count_token(const Params& p, int token, int* rank_counts, int* expert_counts) {
        for (int k = 0; k < p.num_topk; ++k) {
            const int64_t expert =
                load_expert_id(p.topk_idx, p.idx_bytes, static_cast<int64_t>(token) * p.num_topk + k);
            if (expert >= p.num_experts || expert < -1) report_bad_expert(p, token, expert);
            if (expert >= 0 && expert < p.num_experts)
                prim::fetch_add<Order::kRelaxed, Scope::kCta>(&expert_counts[expert], 1);
        }
        uint8_t* row = p.is_token_in_rank + static_cast<int64_t>(token) * p.num_ranks;
        for (int first = 0; first < p.num_ranks; first += 64) {
            const uint64_t mask = rank_mask(p, token, first);
            for (int i = 0; i < 64 && first + i < p.num_ranks; ++i) {
                const bool is_sent = (mask >> i & 1) != 0;
                row[first + i] = is_sent;
                if (is_sent) prim::fetch_add<Order::kRelaxed, Scope::kCta>(&rank_counts[first + i], 1);
            }
        }
    }

    static EP_DEVICE void count_share(const Params& p, int* counts) {
        const int num_counts = p.num_ranks + p.num_experts;
        for (int i = static_cast<int>(threadIdx.x); i < num_counts; i += static_cast<int>(blockDim.x)) counts[i] = 0;
        __syncthreads();
        const int num_threads = static_cast<int>(gridDim.x * blockDim.x);
        for (int token = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); token < p.num_tokens;
             token += num_threads)
            count_token(p, token, counts, counts + p.num_ranks);
        __syncthreads();
        int* partial = p.partials + static_cast<int64_t>(blockIdx.x) * num_counts;
        for (int i = static_cast<int>(threadIdx.x); i < num_counts; i += static_cast<int>(blockDim.x))
            partial[i] = counts[i];
    }

    static EP_DEVICE void sum_partials(const Params& p) {
        const int num_counts = p.num_ranks + p.num_experts;
        for (int i = static_cast<int>(threadIdx.x); i < num_counts; i += static_cast<int>(blockDim.x)) {
            int sum = 0;
            for (int block = 0; block < static_cast<int>(gridDim.x); ++block)
                sum += p.partials[static_cast<int64_t>(block) * num_counts + i];
            (i < p.num_ranks ? p.num_tokens_per_rank[i] : p.num_tokens_per_expert[i - p.num_ranks]) = sum;
        }
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        count_share(p, static_cast<int*>(prim::dynamic_shared()));
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t* done = &p.watch.local->layout_done_blocks;
            // Release: this block's partials. Acquire, in the last block: everybody's.
            shared.is_last_block = prim::fetch_add<Order::kAcqRel, Scope::kGpu>(done, 1u) + 1 == gridDim.x;
            if (shared.is_last_block) prim::store<Order::kRelaxed, Scope::kGpu>(done, 0u);
        }
        __syncthreads();
        if (shared.is_last_block) sum_partials(p);
    }
};

void launch(const LayoutParams& params, int num_blocks, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = num_blocks;
    config.num_threads = kNumThreads;
    config.dynamic_shared_bytes = static_cast<int>(sizeof(int)) * (params.num_ranks + params.num_experts);
    config.name = "deep_ep::dispatch_layout";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch_layout
