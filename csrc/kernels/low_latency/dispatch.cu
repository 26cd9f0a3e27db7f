// low_latency_dispatch: few tokens, fixed slots, no host, no counts in advance.
//
//   send     block: one token at a time: cast, one copy into the token's slot at each destination rank, one flag each;
//            and the routing table to every rank
//   receive  blocks share the local experts; each warp reads all routing tables in order, so it knows every row of its
//            expert, and moves its share of them: wait for the token's flag, slot -> row
//
// Messages, buffer map and orderings: docs/protocols/low_latency.md.
#include "device/algo/fp8.h"
#include "device/algo/warp.h"
#include "device/launch.h"
#include "kernels/low_latency/frame.h"
#include "kernels/low_latency/launchers.h"

namespace deep_ep::kernels::low_latency::dispatch {
inline namespace EP_BACKEND {

constexpr int kGroupSize = 128;                                 // channels with one scale
constexpr int kElementsPerLane = 16;                            // become 16 bytes of FP8
constexpr int kLanesPerGroup = kGroupSize / kElementsPerLane;   // 8
constexpr int kElementsPerWarp = kElementsPerLane * kWarpSize;  // 512: four groups

struct Kernel {
    using Params = LowLatencyDispatchParams;
    static constexpr int kMaxThreads = 512;
    struct Shared {
        Beginning beginning;
        int is_last_block;
    };

    // The destinations of a token among 32 ranks; lane i speaks for rank first_rank + i.
    struct Targets {
        uint32_t lanes;
        uint8_t* slot;  // this lane's
    };

    static EP_DEVICE float largest_of(const Vec16& value) {
        float largest = 0.0f;
#pragma unroll
        for (uint32_t pair : value.word)
            largest = fmaxf(largest, fmaxf(fabsf(algo::bf16_low(pair)), fabsf(algo::bf16_high(pair))));
        return largest;
    }

    // Eight bfloat16 -> eight FP8.
    static EP_DEVICE void cast(const Vec16& value, float inverse, uint32_t* words) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            words[i] = 0;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t pair = value.word[2 * i + j];
                words[i] |= algo::fp8_e4m3_from_float(algo::bf16_low(pair) * inverse) << (16 * j);
                words[i] |= algo::fp8_e4m3_from_float(algo::bf16_high(pair) * inverse) << (16 * j + 8);
            }
        }
    }

    // One warp: 512 channels from `first`, cast and written to every target.
    static EP_DEVICE void send_fp8(const Params& p, const uint8_t* row, int first, const Targets& targets) {
        const int element = first + prim::lane_idx() * kElementsPerLane;
        const bool is_inside = element < p.call.hidden;
        Vec16 held[2] = {};
        if (is_inside) {
            const auto* source = reinterpret_cast<const Vec16*>(row + int64_t{element} * 2);
            held[0] = prim::load_input(source);
            held[1] = prim::load_input(source + 1);
        }
        float largest = fmaxf(largest_of(held[0]), largest_of(held[1]));
#pragma unroll
        for (int distance = 1; distance < kLanesPerGroup; distance *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, distance));
        const algo::Fp8Scale scale = algo::fp8_scale(largest, p.rounds_scales);
        Vec16 packed;
        cast(held[0], scale.inverse, packed.word);
        cast(held[1], scale.inverse, packed.word + 2);
        for (uint32_t rest = targets.lanes; rest != 0; rest &= rest - 1) {
            uint8_t* slot = algo::broadcast_pointer(targets.slot, __ffs(static_cast<int>(rest)) - 1);
            if (!is_inside) continue;
            prim::store_streaming(reinterpret_cast<Vec16*>(slot + element), packed);
            if (prim::lane_idx() % kLanesPerGroup == 0)
                *reinterpret_cast<float*>(slot + p.call.message.scales.at(element / kGroupSize)) = scale.scale;
        }
    }

    // One warp: its share of the row, to every target.
    static EP_DEVICE void send_row(const Params& p, const uint8_t* row, const Targets& targets) {
        const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
        if (p.payload == Payload::kFp8) {
            for (int first = prim::warp_idx() * kElementsPerWarp; first < p.call.hidden;
                 first += num_warps * kElementsPerWarp)
                send_fp8(p, row, first, targets);
            return;
        }
        constexpr int kUnroll = 2;
        const int num_vecs = p.call.hidden * 2 / static_cast<int>(sizeof(Vec16));
        constexpr int kShare = kUnroll * kWarpSize;
        for (int base = prim::warp_idx() * kShare; base < num_vecs; base += num_warps * kShare) {
            const int count = num_vecs - base < kShare ? num_vecs - base : kShare;
            algo::warp_multicast<kUnroll>(
                reinterpret_cast<const Vec16*>(row) + base, count, targets.lanes,
                targets.slot == nullptr ? nullptr : reinterpret_cast<Vec16*>(targets.slot) + base);
        }
    }

    // The whole block: one token to all ranks that need it.
    static EP_DEVICE void send_token(const Params& p, const Context& c, int token) {
        const uint8_t* row = p.x + static_cast<int64_t>(token) * p.call.hidden * 2;
        for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
            const bool is_sent = is_destination(c, p.topk_idx, p.idx_bytes, token, first);
            const int rank = first + prim::lane_idx();
            const Targets targets{__ballot_sync(kFullMask, is_sent), is_sent ? c.slot(rank, c.rank(), token) : nullptr};
            send_row(p, row, targets);
            __syncthreads();  // every warp's part of the row, warp 0's releases
            // Pairs with: receive_row at the destination.
            if (prim::warp_idx() == 0 && is_sent)
                prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.token_full(rank, c.bank, c.rank(), token),
                                                          c.watch.call);
        }
    }

    static EP_DEVICE void send(const Params& p, const Context& c, Shared& shared) {
        begin_send(c, &shared.beginning);
        if (shared.beginning.is_ready == 0) return;
        if (shared.beginning.is_first != 0) send_tables(c, p.topk_idx, p.idx_bytes, nullptr, p.num_tokens);
        for (int token = static_cast<int>(blockIdx.x); token < p.num_tokens; token += static_cast<int>(gridDim.x))
            send_token(p, c, token);
    }

    static EP_DEVICE uint32_t packed_exponents(const uint32_t* scales, int word) {
        uint32_t packed = 0;
        for (int i = 0; i < 4; ++i) packed |= (scales[word * 4 + i] >> 23 & 0xffu) << (8 * i);
        return packed;
    }

    // One warp: a slot, or zeros where the source is left out, to row `row` of the local expert.
    static EP_DEVICE void place_row(const Params& p, const Context& c, const uint8_t* slot, int expert, int row) {
        const int64_t num_rows = static_cast<int64_t>(c.num_ranks()) * p.call.num_max_tokens;
        const int64_t row_bytes = p.payload == Payload::kFp8 ? p.call.hidden : p.call.hidden * 2;
        auto* target = reinterpret_cast<Vec16*>(p.recv_x + (expert * num_rows + row) * row_bytes);
        const int num_vecs = static_cast<int>(row_bytes / static_cast<int64_t>(sizeof(Vec16)));
        if (slot != nullptr) {
            algo::warp_copy<algo::SourceKind::kFromPeer, 8>(target, reinterpret_cast<const Vec16*>(slot), num_vecs);
        } else {
            for (int i = prim::lane_idx(); i < num_vecs; i += kWarpSize) prim::store_streaming(target + i, Vec16{});
        }
        if (p.payload == Payload::kBf16) return;
        const int num_scales = p.call.hidden / kGroupSize;
        const int num_words = p.packs_scales ? num_scales / 4 : num_scales;
        const auto* scales =
            slot == nullptr ? nullptr : reinterpret_cast<const uint32_t*>(slot + p.call.message.scales.offset);
        for (int word = prim::lane_idx(); word < num_words; word += kWarpSize) {
            const uint32_t value = scales == nullptr ? 0u
                                   : p.packs_scales  ? packed_exponents(scales, word)
                                                     : scales[word];
            p.recv_scales[(static_cast<int64_t>(expert) * num_words + word) * num_rows + row] = value;
        }
    }

    // One warp: a token of `source` becomes row `row` of the local expert.
    static EP_DEVICE void receive_row(const Params& p, const Context& c, int source, int token, int expert, int row) {
        const int num_rows = c.num_ranks() * p.call.num_max_tokens;
        int is_here = 0;
        if (prim::lane_idx() == 0)
            is_here = wait_for_source(c, Stage::kRow, source, c.watch.heap.token_full(c.rank(), c.bank, source, token));
        is_here = __shfl_sync(kFullMask, is_here, 0);
        __syncwarp();  // one lane's acquire, every lane's reads
        place_row(p, c, is_here != 0 ? c.slot(c.rank(), source, token) : nullptr, expert, row);
        if (prim::lane_idx() == 0) p.src_info[static_cast<int64_t>(expert) * num_rows + row] = token;
        const int64_t first_entry = static_cast<int64_t>(token) * p.call.num_topk;
        int* row_of_entry = p.row_of_entry + static_cast<int64_t>(source) * p.call.num_max_tokens * p.call.num_topk;
        for (int k = prim::lane_idx(); k < p.call.num_topk; k += kWarpSize)
            if (c.table(source)[first_entry + k] == global_expert(c, expert))
                row_of_entry[first_entry + k] = expert * num_rows + row;
    }

    static EP_DEVICE int global_expert(const Context& c, int expert) {
        return c.rank() * c.num_local_experts() + expert;
    }

    // This lane: is the entry the token's first one for this expert? A token is one row of an expert, however often it
    // names it: an expert has room for every token once.
    static EP_DEVICE bool is_first_match(const int* table, int entry, int num_topk, int wanted) {
        if (table[entry] != wanted) return false;
        for (int earlier = entry / num_topk * num_topk; earlier < entry; ++earlier)
            if (table[earlier] == wanted) return false;
        return true;
    }

    // One warp: the rows of one local expert from one source; returns their number. Of all warps that read the table
    // together, this one moves every `num_shares`-th row.
    static EP_DEVICE int receive_from(const Params& p, const Context& c, int source, int expert, int first_row,
                                      int share, int num_shares) {
        int is_here = 0;
        if (prim::lane_idx() == 0) is_here = wait_for_table(c, source);
        is_here = __shfl_sync(kFullMask, is_here, 0);
        __syncwarp();  // one lane's acquire, every lane's reads
        if (is_here == 0) return 0;
        const int wanted = global_expert(c, expert);
        const int num_entries = c.num_tokens_of(source) * p.call.num_topk;
        const int* table = c.table(source);
        int num_rows = 0;
        for (int base = 0; base < num_entries; base += kWarpSize) {
            const int entry = base + prim::lane_idx();
            const bool is_match = entry < num_entries && is_first_match(table, entry, p.call.num_topk, wanted);
            for (uint32_t rest = __ballot_sync(kFullMask, is_match); rest != 0; rest &= rest - 1) {
                const int token = (base + __ffs(static_cast<int>(rest)) - 1) / p.call.num_topk;
                const int row = first_row + num_rows++;
                if (row % num_shares == share) receive_row(p, c, source, token, expert, row);
            }
        }
        return num_rows;
    }

    static EP_DEVICE void receive_expert(const Params& p, const Context& c, int expert, int share, int num_shares) {
        const bool is_first = share == 0 && prim::lane_idx() == 0;
        int num_rows = 0;
        for (int source = 0; source < c.num_ranks(); ++source) {
            const int count = receive_from(p, c, source, expert, num_rows, share, num_shares);
            if (is_first)
                p.layout_range[static_cast<int64_t>(expert) * c.num_ranks() + source] =
                    static_cast<int64_t>(num_rows) << 32 | count;
            num_rows += count;
        }
        if (!is_first) return;
        p.recv_count[expert] = num_rows;
        if (p.cumulative_stats != nullptr) p.cumulative_stats[expert] += num_rows;
    }

    // Every local expert has the same number of blocks, or every block the same number of experts.
    static EP_DEVICE void receive(const Params& p, const Context& c) {
        const int num_blocks = static_cast<int>(gridDim.x);
        const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
        const int num_experts = c.num_local_experts();
        const int blocks_per_expert = num_blocks / num_experts > 0 ? num_blocks / num_experts : 1;
        for (int item = static_cast<int>(blockIdx.x); item < num_experts * blocks_per_expert; item += num_blocks)
            receive_expert(p, c, item % num_experts, item / num_experts * num_warps + prim::warp_idx(),
                           blocks_per_expert * num_warps);
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Watch watch{make_watch_words(p.call.watch), make_heap(p.call.heap),
                                layout::Operation::kLowLatencyDispatch, call_number(p.call)};
        const Context context{p.call, watch, static_cast<int>(watch.call % layout::kNumLowLatencyBanks)};
        if (p.call.phase == Phase::kSend)
            send(p, context, shared);
        else
            receive(p, context);
        finish_phase(context, &shared.is_last_block);
    }
};

void launch(const LowLatencyDispatchParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.call.num_blocks;
    config.num_threads = kWarpSize * params.call.num_warps;
    config.name = "deep_ep::low_latency::dispatch";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::dispatch
