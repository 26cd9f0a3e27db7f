// low_latency_dispatch: few tokens, fixed slots, no host, no counts in advance.
//
//   send     block: one token at a time: cast, one copy into the token's slot at each destination rank, one flag each;
//            the last block: the routing table to every rank
//   receive  each token that has come is shared by several warps; its table entries say which rows it becomes: wait for
//            the token's flag, slot -> rows
//
// Messages, buffer map and orderings: docs/protocols/low_latency.md.
#include "device/algo/fp8.h"
#include "device/algo/warp.h"
#include "device/launch.h"
#include "kernels/low_latency/frame.h"
#include "kernels/low_latency/launchers.h"
#include "kernels/low_latency/routing_table.h"

namespace deep_ep::kernels::low_latency::dispatch {
inline namespace EP_BACKEND {

constexpr int kGroupSize = 128;                                // channels with one scale
constexpr int kElementsPerLane = 16;                           // become 16 bytes of FP8
constexpr int kLanesPerGroup = kGroupSize / kElementsPerLane;  // 8
constexpr int kChunk = kElementsPerLane * kWarpSize;           // channels that a warp sends at once: four groups
constexpr int kVecElements = 8;                                // bfloat16 in 16 bytes
constexpr int kMaxWarpsForItem = 16;
constexpr int kReceiveUnroll = 8;

struct Kernel {
    using Params = LowLatencyDispatchParams;
    static constexpr int kMaxThreads = kMaxLowLatencyThreads;
    struct Shared {
        Block block;
    };

    // One lane's part of a chunk. FP8: its 16 channels; bfloat16: 8 channels of each half.
    struct Piece {
        Vec16 half[2];
    };

    // The destinations of a token among 32 ranks; lane i speaks for rank first_rank + i.
    struct Targets {
        uint32_t lanes;
        uint8_t* slot;  // this lane's
    };

    static EP_DEVICE int piece_vec(const Params& p, int chunk, int half) {
        const int first = chunk * (kChunk / kVecElements);
        return p.payload == Payload::kFp8 ? first + prim::lane_idx() * 2 + half
                                          : first + half * kWarpSize + prim::lane_idx();
    }

    static EP_DEVICE Piece load_piece(const Params& p, int token, int chunk) {
        Piece piece = {};
        const auto* row = reinterpret_cast<const Vec16*>(p.x + static_cast<int64_t>(token) * p.call.hidden * 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int vec = piece_vec(p, chunk, half);
            if (vec * kVecElements < p.call.hidden) piece.half[half] = prim::load_input(row + vec);
        }
        return piece;
    }

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
                words[i] |= algo::fp8_e4m3_pair(algo::bf16_low(pair) * inverse, algo::bf16_high(pair) * inverse)
                            << (16 * j);
            }
        }
    }

    // One warp: a chunk, cast and written to every target.
    static EP_DEVICE void send_fp8(const Params& p, const Piece& piece, int chunk, const Targets& targets) {
        float largest = fmaxf(largest_of(piece.half[0]), largest_of(piece.half[1]));
#pragma unroll
        for (int distance = 1; distance < kLanesPerGroup; distance *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, distance));
        const algo::Fp8Scale scale = algo::fp8_scale(largest, p.rounds_scales);
        Vec16 packed;
        cast(piece.half[0], scale.inverse, packed.word);
        cast(piece.half[1], scale.inverse, packed.word + 2);
        const int element = chunk * kChunk + prim::lane_idx() * kElementsPerLane;
        for (uint32_t rest = targets.lanes; rest != 0; rest &= rest - 1) {
            uint8_t* slot = algo::broadcast_pointer(targets.slot, __ffs(static_cast<int>(rest)) - 1);
            if (p.call.hidden <= element) continue;
            prim::store_streaming(reinterpret_cast<Vec16*>(slot + element), packed);
            if (prim::lane_idx() % kLanesPerGroup == 0)
                *reinterpret_cast<float*>(slot + p.call.message.scales.at(element / kGroupSize)) = scale.scale;
        }
    }

    static EP_DEVICE void send_bf16(const Params& p, const Piece& piece, int chunk, const Targets& targets) {
        for (uint32_t rest = targets.lanes; rest != 0; rest &= rest - 1) {
            uint8_t* slot = algo::broadcast_pointer(targets.slot, __ffs(static_cast<int>(rest)) - 1);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int vec = piece_vec(p, chunk, half);
                if (vec * kVecElements < p.call.hidden)
                    prim::store_streaming(reinterpret_cast<Vec16*>(slot) + vec, piece.half[half]);
            }
        }
    }

    // What a warp knows of the block's first token before it knows anything about the call.
    struct Head {
        Piece piece;
        bool is_sent;  // to this lane's rank
    };

    static EP_DEVICE Head load_head(const Params& p, const Context& c, int token) {
        Head head = {};
        if (token >= p.num_tokens) return head;
        head.piece = load_piece(p, token, prim::warp_idx());
        head.is_sent = is_destination(c, p.topk_idx, p.idx_bytes, token, 0);
        return head;
    }

    // The whole block: one token to all ranks that need it.
    static EP_DEVICE void send_token(const Params& p, const Context& c, int token, const Head& head) {
        const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
        for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
            const bool is_sent = first == 0 ? head.is_sent : is_destination(c, p.topk_idx, p.idx_bytes, token, first);
            const int rank = first + prim::lane_idx();
            const Targets targets{__ballot_sync(kFullMask, is_sent), is_sent ? c.slot(rank, c.rank(), token) : nullptr};
            for (int chunk = prim::warp_idx(); chunk * kChunk < p.call.hidden; chunk += num_warps) {
                const Piece piece = chunk == prim::warp_idx() ? head.piece : load_piece(p, token, chunk);
                if (p.payload == Payload::kFp8)
                    send_fp8(p, piece, chunk, targets);
                else
                    send_bf16(p, piece, chunk, targets);
            }
            __syncthreads();  // every warp's part of the row, warp 0's releases
            // Pairs with: wait_for_slot at the destination.
            if (prim::warp_idx() == 0 && is_sent)
                prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.token_full(rank, c.bank, c.rank(), token),
                                                          c.watch.call);
        }
    }

    static EP_DEVICE void send(const Params& p, const Context& c, Block* block) {
        const int num_blocks = static_cast<int>(gridDim.x);
        int token = static_cast<int>(blockIdx.x);
        const Choice choice{p.topk_idx, p.idx_bytes, p.num_tokens};
        const auto sets = TokenSets::make(p.call.num_experts, p.num_set_words);
        if (token == num_blocks - 1) begin_routing_table(c, choice, sets);
        Head head = load_head(p, c, token);
        begin_send(c, block);
        if (block->is_ready != 0) {
            if (token == num_blocks - 1) send_routing_table(c, choice, sets);
            while (token < p.num_tokens) {
                send_token(p, c, token, head);
                token += num_blocks;
                head = load_head(p, c, token);
            }
        }
        if (block->is_first != 0 && is_last_warp()) publish_ended(c);
        end_send(c, block);
    }

    static EP_DEVICE uint32_t packed_exponents(const uint32_t* scales, int word) {
        uint32_t packed = 0;
        for (int i = 0; i < 4; ++i) packed |= (scales[word * 4 + i] >> 23 & 0xffu) << (8 * i);
        return packed;
    }

    // What one warp moves: its share of a token, to the rows of the lanes in `lanes`.
    struct Move {
        const uint8_t* slot;  // null: the source is left out, the rows become zeros
        uint32_t lanes;
        int row;  // this lane's: expert * rows of an expert + row
        int part, num_parts;

        // The share of `count` things that falls to this warp.
        EP_DEVICE int first_of(int count) const { return part * ((count + num_parts - 1) / num_parts); }
        EP_DEVICE int end_of(int count) const {
            const int end = first_of(count) + (count + num_parts - 1) / num_parts;
            return end < count ? end : count;
        }
    };

    static EP_DEVICE void place_scales(const Params& p, const Context& c, const Move& move) {
        const int num_scales = p.call.hidden / kGroupSize;
        const int num_words = p.packs_scales ? num_scales / 4 : num_scales;
        const int num_rows = c.num_rows_of_expert();
        const uint32_t* scales = nullptr;
        if (move.slot != nullptr) scales = reinterpret_cast<const uint32_t*>(move.slot + p.call.message.scales.offset);
        for (int base = move.first_of(num_words); base < move.end_of(num_words); base += kWarpSize) {
            const int word = base + prim::lane_idx();
            const bool is_inside = word < move.end_of(num_words);
            uint32_t value = 0;
            if (is_inside && scales != nullptr) value = p.packs_scales ? packed_exponents(scales, word) : scales[word];
            for (uint32_t rest = move.lanes; rest != 0; rest &= rest - 1) {
                const int row = __shfl_sync(kFullMask, move.row, __ffs(static_cast<int>(rest)) - 1);
                const int64_t column = static_cast<int64_t>(row / num_rows) * num_words + word;
                if (is_inside) p.recv_scales[column * num_rows + row % num_rows] = value;
            }
        }
    }

    struct Held {
        Vec16 vec[kReceiveUnroll];
    };

    // The part of the warp's share that begins with vector `base`. Without a slot: zeros.
    static EP_DEVICE void load_share(const Move& move, int base, int end, Held& held) {
#pragma unroll
        for (int i = 0; i < kReceiveUnroll; ++i) {
            const int idx = base + i * kWarpSize + prim::lane_idx();
            held.vec[i] = {};
            if (idx < end && move.slot != nullptr)
                held.vec[i] = prim::load_shared_with_peers(reinterpret_cast<const Vec16*>(move.slot) + idx);
        }
    }

    static EP_DEVICE void store_share(const Params& p, const Move& move, int base, int end, const Held& held) {
        const int64_t row_bytes = p.payload == Payload::kFp8 ? p.call.hidden : p.call.hidden * 2;
        for (uint32_t rest = move.lanes; rest != 0; rest &= rest - 1) {
            const int row = __shfl_sync(kFullMask, move.row, __ffs(static_cast<int>(rest)) - 1);
            auto* target = reinterpret_cast<Vec16*>(p.recv_x + row * row_bytes);
#pragma unroll
            for (int i = 0; i < kReceiveUnroll; ++i) {
                const int idx = base + i * kWarpSize + prim::lane_idx();
                if (idx < end) prim::store_streaming(target + idx, held.vec[i]);
            }
        }
    }

    // One warp: the rows of all sources before `source` for this lane's expert, one of ours, or -1. `here`: which of the
    // first 32 ranks' tables count.
    static EP_DEVICE int rows_before(const Context& c, int source, int expert, uint32_t here) {
        int num_rows = 0;
        for (int first = 0; first < source; first += kWarpSize) {
            if (first > 0) here = wait_for_tables(c, first, source);
            const int count = source - first < kWarpSize ? source - first : kWarpSize;
#pragma unroll 8
            for (int i = 0; i < count; ++i)
                if (expert >= 0 && (here >> i & 1u) != 0) num_rows += c.row_counts(first + i)[expert];
        }
        return num_rows;
    }

    // Whether an entry before this one sends the token to the same expert: a row is placed once.
    static EP_DEVICE bool is_repeated(const int* entries, int k) {
        bool is_found = false;
#pragma unroll 8
        for (int earlier = 0; earlier < k; ++earlier) is_found |= entries[earlier] == entries[k];
        return is_found;
    }

    // Up to 32 top-k entries of one token, one in each lane.
    struct Entries {
        int source, token;
        int k;         // this lane's
        int expert;    // one of ours, or -1
        int place;     // among the source's rows for it
        bool is_used;  // it is one of the token's
    };

    static EP_DEVICE Entries load_entries(const Params& p, const Context& c, int source, int token, int k) {
        const bool is_used = k < p.call.num_topk;
        const int entry = is_used ? c.table(source)[static_cast<int64_t>(token) * p.call.num_topk + k] : -1;
        const int expert = expert_of(entry) - c.first_expert();
        return {source,          token,  k, expert < 0 || expert >= c.num_local_experts() ? -1 : expert,
                place_of(entry), is_used};
    }

    static EP_DEVICE int64_t first_entry_of(const Params& p, int source, int token) {
        return (static_cast<int64_t>(source) * p.call.num_max_tokens + token) * p.call.num_topk;
    }

    // One warp: its share of one token, as far as these entries want it. What does not depend on the slot's contents is
    // found while they are under way.
    static EP_DEVICE void receive_entries(const Params& p, const Context& c, const Entries& of, uint32_t here,
                                          Move move) {
        const int num_vecs =
            (p.payload == Payload::kFp8 ? p.call.hidden : p.call.hidden * 2) / static_cast<int>(sizeof(Vec16));
        const int* entries = c.table(of.source) + static_cast<int64_t>(of.token) * p.call.num_topk;
        const bool is_placed = of.expert >= 0 && !is_repeated(entries, of.k);
        move.lanes = __ballot_sync(kFullMask, is_placed);
        if (move.lanes != 0 && wait_for_slot(c, of.source, of.token)) move.slot = c.slot(c.rank(), of.source, of.token);
        const int first = move.first_of(num_vecs);
        const int end = move.lanes == 0 ? first : move.end_of(num_vecs);
        Held held;
        load_share(move, first, end, held);
        if (of.expert >= 0) move.row = of.expert * c.num_rows_of_expert() + of.place;
        const int before = rows_before(c, of.source, of.expert, here);
        if (of.expert >= 0) move.row += before;
        if (move.part == 0 && of.is_used) {
            p.row_of_entry[first_entry_of(p, of.source, of.token) + of.k] = move.row;
            if (is_placed) p.src_info[move.row] = of.token;
        }
        if (p.payload == Payload::kFp8 && move.lanes != 0) place_scales(p, c, move);
        for (int base = first; base < end; base += kReceiveUnroll * kWarpSize) {
            if (base != first) load_share(move, base, end, held);
            store_share(p, move, base, end, held);
        }
    }

    // One warp. Where a source has no such token, combine learns that from row_of_entry.
    static EP_DEVICE void receive_token(const Params& p, const Context& c, int source, int token, int part,
                                        int num_parts) {
        const uint32_t here = wait_for_tables(c, 0, source + 1);
        const bool is_here =
            source < kWarpSize ? (here >> source & 1u) != 0 : wait_for_tables(c, source, source + 1) != 0;
        int num_tokens = 0;
        Entries of = {source, token, prim::lane_idx(), -1, 0, prim::lane_idx() < p.call.num_topk};
        if (is_here) {
            num_tokens = c.num_tokens_of(source);
            of = load_entries(p, c, source, token, prim::lane_idx());
        }
        const bool exists = token < num_tokens;
        if (!exists && part != 0) return;
        for (int first = 0; first < p.call.num_topk; first += kWarpSize) {
            if (first > 0 && exists) of = load_entries(p, c, source, token, first + prim::lane_idx());
            if (exists)
                receive_entries(p, c, of, here, {nullptr, 0, -1, part, num_parts});
            else if (first + prim::lane_idx() < p.call.num_topk)
                p.row_of_entry[first_entry_of(p, source, token) + first + prim::lane_idx()] = -1;
        }
    }

    // One warp, an expert for each lane: how many rows it gets, and from whom.
    static EP_DEVICE void write_counts(const Params& p, const Context& c, int first_expert) {
        const int expert = first_expert + prim::lane_idx();
        const bool is_inside = expert < c.num_local_experts();
        int num_rows = 0;
        for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
            const uint32_t here = wait_for_tables(c, first, c.num_ranks());
            const int count = c.num_ranks() - first < kWarpSize ? c.num_ranks() - first : kWarpSize;
#pragma unroll 4
            for (int i = 0; i < count; ++i) {
                if (!is_inside) continue;
                const int rows = (here >> i & 1u) != 0 ? c.row_counts(first + i)[expert] : 0;
                p.layout_range[static_cast<int64_t>(expert) * c.num_ranks() + first + i] =
                    static_cast<int64_t>(num_rows) << 32 | rows;
                num_rows += rows;
            }
        }
        if (!is_inside) return;
        p.recv_count[expert] = num_rows;
        if (p.cumulative_stats != nullptr) p.cumulative_stats[expert] += num_rows;
    }

    // Tokens of all sources in turn, so that no link is the last; every rank begins with another source.
    static EP_DEVICE void receive(const Params& p, const Context& c, Block* block) {
        const int num_items = c.num_ranks() * p.call.num_max_tokens;
        const int num_parts = warps_for_item(num_items, kMaxWarpsForItem);
        const int num_moves = num_items * num_parts;
        const int num_lists = (c.num_local_experts() + kWarpSize - 1) / kWarpSize;
        for_each_unit(c, block, num_moves + num_lists, [&](int unit) {
            const int item = unit / num_parts;
            if (unit < num_moves)
                receive_token(p, c, (c.rank() + item) % c.num_ranks(), item / c.num_ranks(), unit % num_parts,
                              num_parts);
            else
                write_counts(p, c, (unit - num_moves) * kWarpSize);
        });
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Watch watch{make_watch_words(p.call.watch), make_heap(p.call.heap),
                                layout::Operation::kLowLatencyDispatch, call_number(p.call)};
        const Context context{p.call, watch, current_turn(p.call),
                              static_cast<int>(watch.call % layout::kNumLowLatencyBanks)};
        if (context.sends())
            send(p, context, &shared.block);
        else
            begin_receive(context);
        if (!context.sends() || shared.block.receives != 0) receive(p, context, &shared.block);
        add_statistics(context, &shared.block);
    }
};

void launch(const LowLatencyDispatchParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.call.num_blocks;
    config.num_threads = kWarpSize * params.call.num_warps;
    config.dynamic_shared_bytes = TokenSets::bytes(params.call.num_experts, params.num_set_words, params.call.num_topk);
    config.name = "deep_ep::low_latency::dispatch";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::dispatch
