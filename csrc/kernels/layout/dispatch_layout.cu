// get_dispatch_layout: which ranks need which token, and how many tokens and entries go where. One pass.
// The counts of a block stand one after another: of ranks, of experts, of nodes.
//
//   block b: one thread a token; counts in shared memory -> partials[.][b]
//   the block that ends last: sums the partials of all blocks (integers: any order gives the same result)
#include "device/algo/group.h"
#include "device/algo/watch.h"
#include "device/launch.h"
#include "kernels/params.h"

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

    static EP_DEVICE_COLD void report_bad_expert(layout::WatchParams words, int num_experts, int token,
                                                 int64_t expert) {
        algo::record_failure(words, {layout::FailureKind::kBadInput,
                                     layout::Operation::kLayout,
                                     {layout::Stage::kInput, token},
                                     0,
                                     static_cast<uint64_t>(num_experts),
                                     static_cast<uint64_t>(expert),
                                     0});
    }

    // Up to kIdBatch of a token's expert ids, -1 beyond its last one: all loads are under way before the first use.
    static EP_DEVICE void load_ids(const Params& p, int64_t token, int first, int64_t* ids) {
#pragma unroll
        for (int i = 0; i < kIdBatch; ++i)
            ids[i] = first + i < p.num_topk
                         ? algo::load_expert_id(p.topk_idx, p.idx_bytes, token * p.num_topk + first + i)
                         : -1;
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

    static EP_DEVICE int num_counts(const Params& p) {
        return p.num_ranks + p.num_experts + (p.num_tokens_per_node == nullptr ? 0 : p.num_nodes);
    }

    // Whether each lane's token is sent somewhere.
    static EP_DEVICE void count_sent(algo::Warp warp, bool is_sent, int* count) {
        const int num_sent = __popc(__ballot_sync(prim::kFullMask, is_sent));
        if (warp.thread_rank() == 0 && num_sent != 0) prim::fetch_add<Order::kRelaxed, Scope::kCta>(count, num_sent);
    }

    // A token for each lane; a lane without one has a number that is too large.
    static EP_DEVICE void count_tokens(algo::Warp warp, const Params& p, int token, int* counts) {
        warp.expect();
        int* expert_counts = counts + p.num_ranks;
        int* node_count = expert_counts + p.num_experts;
        const int ranks_per_node = p.num_ranks / p.num_nodes;
        int rank_in_node = 0;
        bool is_in_node = false;
        const bool has_token = token < p.num_tokens;
        uint8_t* row = p.is_token_in_rank + static_cast<int64_t>(token) * p.num_ranks;
        for (int first = 0; first < p.num_ranks; first += 64) {
            const uint64_t mask = has_token ? count_experts(p, token, first, expert_counts) : 0;
            for (int i = 0; i < 64 && first + i < p.num_ranks; ++i) {
                const bool is_sent = (mask >> i & 1) != 0;
                if (has_token) row[first + i] = is_sent;
                count_sent(warp, is_sent, &counts[first + i]);
                if (p.num_tokens_per_node == nullptr) continue;
                is_in_node |= is_sent;
                if (++rank_in_node < ranks_per_node) continue;
                count_sent(warp, is_in_node, node_count++);
                rank_in_node = 0;
                is_in_node = false;
            }
        }
    }

    static EP_DEVICE void count_share(algo::Block block, const Params& p, int* counts) {
        algo::for_each(block, num_counts(p), [&](int i) { counts[i] = 0; });
        block.sync();
        const int num_in_grid = static_cast<int>(gridDim.x) * block.size();
        for (int first = static_cast<int>(blockIdx.x) * block.size(); first < p.num_tokens; first += num_in_grid)
            count_tokens(algo::Warp{}, p, first + block.thread_rank(), counts);
        block.sync();
        algo::for_each(block, num_counts(p),
                       [&](int i) { p.partials[static_cast<int64_t>(i) * kMaxLayoutBlocks + blockIdx.x] = counts[i]; });
    }

    static EP_DEVICE int* place_of(const Params& p, int count) {
        if (count < p.num_ranks) return p.num_tokens_per_rank + count;
        if (count < p.num_ranks + p.num_experts) return p.num_tokens_per_expert + (count - p.num_ranks);
        return p.num_tokens_per_node + (count - p.num_ranks - p.num_experts);
    }

    // A count's partials lie side by side: a thread has all of them in flight at once.
    static EP_DEVICE void sum_partials(algo::Block block, const Params& p) {
        const int num_blocks = static_cast<int>(gridDim.x);
        algo::for_each(block, num_counts(p), [&](int i) {
            const int* partials = p.partials + static_cast<int64_t>(i) * kMaxLayoutBlocks;
            int sum = 0;
#pragma unroll
            for (int block_idx = 0; block_idx < kMaxLayoutBlocks; ++block_idx)
                sum += block_idx < num_blocks ? partials[block_idx] : 0;
            *place_of(p, i) = sum;
        });
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Block block;
        count_share(block, p, static_cast<int*>(prim::dynamic_shared()));
        // This block's partials are released; in the last block, everybody's acquired.
        if (algo::is_last_block<Order::kAcqRel, Scope::kGpu>(block, &p.watch.local->layout_done_blocks,
                                                             shared.is_last_block))
            sum_partials(block, p);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch_layout

void deep_ep::kernels::launch(const LayoutParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.grid.num_blocks;
    config.num_threads = params.grid.num_threads;
    config.dynamic_shared_bytes =
        static_cast<int>(sizeof(int)) * (params.num_ranks + params.num_experts + params.num_nodes);
    config.name = "deep_ep::dispatch_layout";
    dev::launch<dispatch_layout::Kernel>(config, stream, params);
}
