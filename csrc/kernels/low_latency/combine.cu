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
#include "kernels/low_latency/logfmt_row.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

constexpr int kPairs = 4;  // of bfloat16 in 16 bytes
constexpr int kVecsOfUnit = kLogUnit / (2 * kPairs);

// One kernel for each format: the packing of the logarithmic one costs registers.
template <bool kIsLogfmt> struct Kernel {
    using Params = LowLatencyCombineParams;
    static constexpr int kMaxThreads = 512;
    static constexpr int kVecs = kIsLogfmt ? kVecsOfUnit : 1;  // that a thread of the receive phase holds
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
        for (int pair = 0; pair < kPairs; ++pair)
            value.word[pair] = prim::round_to_bf16x2(sums.low[pair], sums.high[pair]);
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

    // What this rank's experts have for one token.
    struct Work {
        const int* entries;
        const float* weights;
        const int* rows;
    };

    static EP_DEVICE Work work_for(const Params& p, const Context& c, int source, int token) {
        const int64_t first_entry = static_cast<int64_t>(token) * p.call.num_topk;
        const int64_t first_of_source = static_cast<int64_t>(source) * p.call.num_max_tokens * p.call.num_topk;
        return {c.table(source) + first_entry, c.weight_table(source) + first_entry,
                p.row_of_entry + first_of_source + first_entry};
    }

    // One thread: the sum of weight x row over eight channels, in order of k.
    static EP_DEVICE Sums sum_experts(const Params& p, const Context& c, const Work& work, int vec) {
        const int first = c.rank() * c.num_local_experts();
        Sums sums = {};
        for (int k = 0; k < p.call.num_topk; ++k) {
            if (work.entries[k] < first || work.entries[k] >= first + c.num_local_experts()) continue;
            // With other experts than in the dispatch the row is garbage, and must not be an address as well.
            const int row = work.rows[k];
            if (row < 0 || row >= c.num_local_experts() * c.num_ranks() * p.call.num_max_tokens) continue;
            const uint8_t* source = p.x + static_cast<int64_t>(row) * p.call.hidden * 2;
            add(sums, prim::load_input(reinterpret_cast<const Vec16*>(source) + vec), work.weights[k]);
        }
        return sums;
    }

    static EP_DEVICE int num_vecs(const Params& p) { return p.call.hidden * 2 / static_cast<int>(sizeof(Vec16)); }

    // The whole block: sums the experts' rows of one token into its slot.
    static EP_DEVICE void reduce_experts(const Params& p, const Context& c, const Work& work, uint8_t* slot) {
        for (int vec = static_cast<int>(threadIdx.x); vec < num_vecs(p); vec += static_cast<int>(blockDim.x))
            prim::store_streaming(reinterpret_cast<Vec16*>(slot) + vec, rounded(sum_experts(p, c, work, vec)));
    }

    // The same in the logarithmic format. Whole warps, because lanes share a scale.
    static EP_DEVICE void reduce_experts_logfmt(const Params& p, const Context& c, const Work& work, uint8_t* slot) {
        const auto row = layout::LogfmtRow::make(static_cast<uint64_t>(p.call.hidden));
        const int num_units = static_cast<int>(row.high.count);
        for (int base = prim::warp_idx() * kWarpSize; base < num_units; base += static_cast<int>(blockDim.x)) {
            const int unit = base + prim::lane_idx();
            float values[kLogUnit] = {};
#pragma unroll
            for (int half = 0; half < kVecsOfUnit; ++half) {
                const int vec = unit * kVecsOfUnit + half;
                if (vec >= num_vecs(p)) continue;
                const Sums sums = sum_experts(p, c, work, vec);
#pragma unroll
                for (int pair = 0; pair < kPairs; ++pair) {
                    values[(half * kPairs + pair) * 2] = sums.low[pair];
                    values[(half * kPairs + pair) * 2 + 1] = sums.high[pair];
                }
            }
            store_logfmt(values, slot, row, unit, unit < num_units);
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
                const Work work = work_for(p, c, source, token);
                uint8_t* slot = c.slot(source, c.rank(), token);
                if constexpr (kIsLogfmt)
                    reduce_experts_logfmt(p, c, work, slot);
                else
                    reduce_experts(p, c, work, slot);
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

    // One thread: adds what a rank has sent to the sums of `unit`, which is one vector, or a unit of the logarithmic format.
    static EP_DEVICE void add_part(const Params& p, Sums (&sums)[kVecs], const uint8_t* slot, int unit) {
        if constexpr (kIsLogfmt) {
            float values[kLogUnit];
            load_logfmt(values, slot, layout::LogfmtRow::make(static_cast<uint64_t>(p.call.hidden)), unit);
#pragma unroll
            for (int i = 0; i < kLogUnit / 2; ++i) {
                sums[i / kPairs].low[i % kPairs] += values[2 * i];
                sums[i / kPairs].high[i % kPairs] += values[2 * i + 1];
            }
        } else {
            add(sums[0], prim::load_shared_with_peers(reinterpret_cast<const Vec16*>(slot) + unit), 1.0f);
        }
    }

    // The whole block, each warp its own part of the row.
    static EP_DEVICE void receive_token(const Params& p, const Context& c, int token) {
        const int num_units = (num_vecs(p) + kVecs - 1) / kVecs;
        auto* target = reinterpret_cast<Vec16*>(p.combined_x + static_cast<int64_t>(token) * p.call.hidden * 2);
        int held_group = -1;
        uint32_t lanes = 0;
        for (int base = prim::warp_idx() * kWarpSize; base < num_units; base += static_cast<int>(blockDim.x)) {
            const int unit = base + prim::lane_idx();
            Sums sums[kVecs] = {};
            for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
                if (first != held_group) lanes = wait_for_parts(p, c, token, first);
                held_group = first;
                for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
                    const int rank = first + __ffs(static_cast<int>(rest)) - 1;
                    if (unit < num_units) add_part(p, sums, c.slot(c.rank(), rank, token), unit);
                }
            }
#pragma unroll
            for (int i = 0; i < kVecs; ++i)
                if (unit * kVecs + i < num_vecs(p)) prim::store_streaming(target + unit * kVecs + i, rounded(sums[i]));
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
    if (params.uses_logfmt)
        dev::launch<Kernel<true>>(config, stream, params);
    else
        dev::launch<Kernel<false>>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
