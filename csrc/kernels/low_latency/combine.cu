// low_latency_combine: each token's owner gets one row back from each rank that worked on it, and sums them.
//
//   send     our top-k weights to every rank; then, for each token of any source that has experts here: sum of
//            weight x row over those experts in FP32, rounded once, into the token's slot at its owner, one flag
//   receive  block: one token at a time: wait for the flags of its ranks, sum in FP32 in rank order, write
//
// Messages, buffer map and orderings: docs/protocols/low_latency.md.
#include "device/algo/bf16.h"
#include "device/algo/warp.h"
#include "device/launch.h"
#include "kernels/low_latency/frame.h"
#include "kernels/low_latency/launchers.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

constexpr int kPairs = 4;  // of bfloat16 in 16 bytes

struct Kernel {
    using Params = LowLatencyCombineParams;
    static constexpr int kMaxThreads = 512;
    struct Shared {
        Beginning beginning;
        int is_here;
        int is_last_block;
    };

    // FP32 sums of eight elements.
    struct Sums {
        float low[kPairs];
        float high[kPairs];
    };

    static EP_DEVICE void add(Sums& sums, const Vec16& value, float weight) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            sums.low[pair] += weight * algo::bf16_low(value.word[pair]);
            sums.high[pair] += weight * algo::bf16_high(value.word[pair]);
        }
    }

    static EP_DEVICE Vec16 rounded(const Sums& sums) {
        Vec16 value;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) value.word[pair] = algo::bf16_pair(sums.low[pair], sums.high[pair]);
        return value;
    }

    // Every warp: does the token of `source` have experts here?
    static EP_DEVICE bool has_work(const Context& c, const int* entries) {
        const int first = c.rank() * c.num_local_experts();
        bool is_found = false;
        for (int k = prim::lane_idx(); k < c.call.num_topk; k += kWarpSize)
            is_found |= entries[k] >= first && entries[k] < first + c.num_local_experts();
        return __any_sync(kFullMask, is_found);
    }

    // The whole block: sum of weight x row, in order of k.
    static EP_DEVICE void reduce_experts(const Params& p, const Context& c, int source, int token, uint8_t* slot) {
        const int64_t first_entry = static_cast<int64_t>(token) * p.call.num_topk;
        const int* entries = c.table(source) + first_entry;
        const float* weights = c.weight_table(source) + first_entry;
        const int* rows =
            p.row_of_entry + static_cast<int64_t>(source) * p.call.num_max_tokens * p.call.num_topk + first_entry;
        const int first = c.rank() * c.num_local_experts();
        const int num_vecs = p.call.hidden * 2 / static_cast<int>(sizeof(Vec16));
        for (int i = static_cast<int>(threadIdx.x); i < num_vecs; i += static_cast<int>(blockDim.x)) {
            Sums sums = {};
            for (int k = 0; k < p.call.num_topk; ++k) {
                if (entries[k] < first || entries[k] >= first + c.num_local_experts()) continue;
                // With other experts than in the dispatch the row is garbage, and must not be an address as well.
                if (rows[k] < 0 || rows[k] >= c.num_local_experts() * c.num_ranks() * p.call.num_max_tokens) continue;
                const uint8_t* row = p.x + static_cast<int64_t>(rows[k]) * p.call.hidden * 2;
                add(sums, prim::load_input(reinterpret_cast<const Vec16*>(row) + i), weights[k]);
            }
            prim::store_streaming(reinterpret_cast<Vec16*>(slot) + i, rounded(sums));
        }
    }

    // The whole block: one thread waits, the barrier passes on what it has acquired.
    static EP_DEVICE bool has_table(const Context& c, int source, Shared& shared) {
        __syncthreads();  // the answer about the source before has been read
        if (threadIdx.x == 0) shared.is_here = wait_for_table(c, source) ? 1 : 0;
        __syncthreads();
        return shared.is_here != 0;
    }

    // Tokens of all sources are dealt to the blocks; every rank begins with another source.
    static EP_DEVICE void send(const Params& p, const Context& c, Shared& shared) {
        begin_send(c, &shared.beginning);
        if (shared.beginning.is_ready == 0) return;
        if (shared.beginning.is_first != 0) send_tables(c, p.topk_idx, p.idx_bytes, p.topk_weights, p.num_tokens);
        for (int step = 0; step < c.num_ranks(); ++step) {
            const int source = (c.rank() + 1 + step) % c.num_ranks();
            if (!has_table(c, source, shared)) continue;
            const int num_tokens = c.num_tokens_of(source);
            const int first = (static_cast<int>(blockIdx.x) + step) % static_cast<int>(gridDim.x);
            for (int token = first; token < num_tokens; token += static_cast<int>(gridDim.x)) {
                if (!has_work(c, c.table(source) + static_cast<int64_t>(token) * p.call.num_topk)) continue;
                reduce_experts(p, c, source, token, c.slot(source, c.rank(), token));
                __syncthreads();  // every warp's part of the row, one thread's release
                // Pairs with: receive_token at the owner.
                if (threadIdx.x == 0)
                    prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.token_full(source, c.bank, c.rank(), token),
                                                              c.watch.call);
            }
        }
    }

    // The lanes of each warp wait for one rank each; returns the lanes whose rank has sent its part.
    static EP_DEVICE uint32_t wait_for_parts(const Params& p, const Context& c, int token, int first_rank) {
        const int rank = first_rank + prim::lane_idx();
        bool is_here = is_destination(c, p.topk_idx, p.idx_bytes, token, first_rank);
        if (is_here)
            is_here = wait_for_source(c, Stage::kRow, rank, c.watch.heap.token_full(c.rank(), c.bank, rank, token));
        const uint32_t lanes = __ballot_sync(kFullMask, is_here);
        __syncwarp();  // each lane's acquire, every lane's reads
        return lanes;
    }

    // The whole block, each warp its own part of the row.
    static EP_DEVICE void receive_token(const Params& p, const Context& c, int token) {
        const int num_vecs = p.call.hidden * 2 / static_cast<int>(sizeof(Vec16));
        auto* target = reinterpret_cast<Vec16*>(p.combined_x + static_cast<int64_t>(token) * p.call.hidden * 2);
        int held_group = -1;
        uint32_t lanes = 0;
        for (int base = prim::warp_idx() * kWarpSize; base < num_vecs; base += static_cast<int>(blockDim.x)) {
            const int i = base + prim::lane_idx();
            Sums sums = {};
            for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
                if (first != held_group) lanes = wait_for_parts(p, c, token, first);
                held_group = first;
                for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
                    const int rank = first + __ffs(static_cast<int>(rest)) - 1;
                    const auto* part = reinterpret_cast<const Vec16*>(c.slot(c.rank(), rank, token));
                    if (i < num_vecs) add(sums, prim::load_shared_with_peers(part + i), 1.0f);
                }
            }
            if (i < num_vecs) prim::store_streaming(target + i, rounded(sums));
        }
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Watch watch{make_watch_words(p.call.watch), make_heap(p.call.heap),
                                layout::Operation::kLowLatencyCombine, call_number(p.call)};
        const Context context{p.call, watch, static_cast<int>(watch.call % layout::kNumLowLatencyBanks)};
        if (p.call.phase == Phase::kSend)
            send(p, context, shared);
        else
            for (int token = static_cast<int>(blockIdx.x); token < p.num_tokens; token += static_cast<int>(gridDim.x))
                receive_token(p, context, token);
        finish_phase(context, &shared.is_last_block);
    }
};

void launch(const LowLatencyCombineParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.call.num_blocks;
    config.num_threads = kWarpSize * params.call.num_warps;
    config.name = "deep_ep::low_latency::combine";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
