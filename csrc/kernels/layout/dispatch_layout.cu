// get_dispatch_layout: which ranks need which token, and how many tokens and entries go where. One pass.
//
//   block b: one thread a token; counts in shared memory -> partials[.][b]
//   the block that ends last: sums the partials of all blocks (integers: any order gives the same result)
#include "kernels/layout/dispatch_layout.h"

#include "device/launch.h"
#include "kernels/context.h"

namespace deep_ep::kernels::dispatch_layout {
inline namespace EP_BACKEND {

using prim::Order;
using prim::Scope;

constexpr int kIdBatch = 8;

struct Kernel {
    using Params = LayoutParams;
    static constexpr int kMaxThreads = kMaxLayoutThreads;
    struct Shared {
        int is_last_block;
    };

    static EP_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }

    static EP_DEVICE_COLD void report_bad_expert(WatchParams watch, int num_experts, int token, int64_t expert) {
        if (prim::compare_swap<Order::kRelaxed, Scope::kGpu>(&watch.local->failure_claimed, 0u, 1u) != 0u) return;
        layout::WaitRecord* record = &watch.status->failure;
        record->kind = layout::FailureKind::kBadInput;
        record->operation = layout::Operation::kLayout;
        record->stage = layout::Stage::kInput;
        record->peer = token;
        record->expected = static_cast<uint64_t>(num_experts);
        record->seen = static_cast<uint64_t>(expert);
        prim::store<Order::kRelease, Scope::kSys>(&record->state, uint64_t{1});
    }

    // Up to kIdBatch of a token's expert ids, -1 beyond its last one: all loads are under way before the first use.
    static EP_DEVICE void load_ids(const Params& p, int64_t token, int first, int64_t* ids) {
#pragma unroll
        for (int i = 0; i < kIdBatch; ++i)
            ids[i] =
                first + i < p.num_topk ? load_expert_id(p.topk_idx, p.idx_bytes, token * p.num_topk + first + i) : -1;
    }

    // Counts the ids; returns which of the 64 ranks from `first_rank` own one of them.
    static EP_DEVICE uint64_t count_experts(const Params& p, int token, int first_rank, int* expert_counts) {
        const auto experts_per_rank = static_cast<unsigned>(p.num_experts / p.num_ranks);
        uint64_t mask = 0;
        for (int first = 0; first < p.num_topk; first += kIdBatch) {
            int64_t ids[kIdBatch];
            load_ids(p, token, first, ids);
#pragma unroll
            for (int i = 0; i < kIdBatch; ++i) {
                if (ids[i] >= p.num_experts || ids[i] < -1) report_bad_expert(p.watch, p.num_experts, token, ids[i]);
                if (ids[i] < 0 || ids[i] >= p.num_experts) continue;
                if (first_rank == 0) prim::fetch_add<Order::kRelaxed, Scope::kCta>(&expert_counts[ids[i]], 1);
                const int rank = static_cast<int>(static_cast<unsigned>(ids[i]) / experts_per_rank) - first_rank;
                if (rank >= 0 && rank < 64) mask |= 1ull << rank;
            }
        }
        return mask;
    }

    // The whole warp, one token each; a lane without one has a number that is too large.
    static EP_DEVICE void count_tokens(const Params& p, int token, int* rank_counts, int* expert_counts) {
        const bool has_token = token < p.num_tokens;
        uint8_t* row = p.is_token_in_rank + static_cast<int64_t>(token) * p.num_ranks;
        for (int first = 0; first < p.num_ranks; first += 64) {
            const uint64_t mask = has_token ? count_experts(p, token, first, expert_counts) : 0;
            for (int i = 0; i < 64 && first + i < p.num_ranks; ++i) {
                const bool is_sent = (mask >> i & 1) != 0;
                if (has_token) row[first + i] = is_sent;
                const int num_sent = __popc(__ballot_sync(prim::kFullMask, is_sent));
                if (prim::lane_idx() == 0 && num_sent != 0)
                    prim::fetch_add<Order::kRelaxed, Scope::kCta>(&rank_counts[first + i], num_sent);
            }
        }
    }

    static EP_DEVICE void count_share(const Params& p, int* counts) {
        const int num_counts = p.num_ranks + p.num_experts;
        for (int i = static_cast<int>(threadIdx.x); i < num_counts; i += num_threads()) counts[i] = 0;
        __syncthreads();
        const int num_in_grid = static_cast<int>(gridDim.x) * num_threads();
        for (int first = static_cast<int>(blockIdx.x) * num_threads(); first < p.num_tokens; first += num_in_grid)
            count_tokens(p, first + static_cast<int>(threadIdx.x), counts, counts + p.num_ranks);
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < num_counts; i += num_threads())
            p.partials[static_cast<int64_t>(i) * kMaxLayoutBlocks + blockIdx.x] = counts[i];
    }

    // A count's partials lie side by side: a thread has all of them in flight at once.
    static EP_DEVICE void sum_partials(const Params& p) {
        const int num_blocks = static_cast<int>(gridDim.x);
        for (int i = static_cast<int>(threadIdx.x); i < p.num_ranks + p.num_experts; i += num_threads()) {
            const int* partials = p.partials + static_cast<int64_t>(i) * kMaxLayoutBlocks;
            int sum = 0;
#pragma unroll
            for (int block = 0; block < kMaxLayoutBlocks; ++block) sum += block < num_blocks ? partials[block] : 0;
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
    config.num_threads = params.num_threads;
    config.dynamic_shared_bytes = static_cast<int>(sizeof(int)) * (params.num_ranks + params.num_experts);
    config.name = "deep_ep::dispatch_layout";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch_layout
