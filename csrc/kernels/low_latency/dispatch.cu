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
#include "kernels/low_latency/turn.h"

namespace deep_ep::kernels::low_latency::dispatch {
inline namespace EP_BACKEND {

constexpr int kGroupSize = 128;                                // channels with one scale
constexpr int kElementsPerLane = 16;                           // become 16 bytes of FP8
constexpr int kLanesPerGroup = kGroupSize / kElementsPerLane;  // 8
constexpr int kChunk = kElementsPerLane * kWarpSize;           // channels that a warp sends at once: four groups
constexpr int kVecElements = 8;                                // bfloat16 in 16 bytes
constexpr int kMaxWarpsForItem = 16;
constexpr int kReceiveUnroll = 8;

template <Phase kPhase> struct Kernel {
    using Params = LowLatencyDispatchParams;
    static constexpr int kMaxThreads = kMaxLowLatencyThreads;
    static constexpr int kMinBlocks = 1;
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

    // What a warp knows of a token before it knows anything about the call.
    struct Head {
        Piece piece;
        int64_t id;  // this lane's
    };

    static EP_DEVICE Ids ids_of(const Params& p) { return {p.topk_idx, p.idx_bytes}; }

    static EP_DEVICE Head load_head(const Params& p, const Context& c, int token) {
        if (token >= p.num_tokens) return {};
        return {load_piece(p, token, prim::warp_idx()), ids_of(p).load(c, token, 0)};
    }

    // The whole block: one token to all ranks that need it.
    static EP_DEVICE void send_token(const Params& p, const Context& c, int token, const Head& head) {
#pragma unroll 1
        for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
            const bool is_sent = is_destination(c, ids_of(p), head.id, token, first);
            const int rank = first + prim::lane_idx();
            const Targets targets{__ballot_sync(kFullMask, is_sent), is_sent ? c.slot(rank, c.rank(), token) : nullptr};
#pragma unroll 1
            for (int chunk = prim::warp_idx(); chunk * kChunk < p.call.hidden; chunk += num_warps()) {
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

    static EP_DEVICE void send(const Params& p, Context& c, Block* block) {
        const int num_blocks = static_cast<int>(gridDim.x);
        int token = static_cast<int>(blockIdx.x);
        const Choice choice{ids_of(p), p.num_tokens};
        const auto sets = TokenSets::make(p.call.num_experts, p.num_set_words);
        Head head = load_head(p, c, token);
        if (token == num_blocks - 1) begin_routing_table(c, choice, sets);
        begin_send(c, block);
        if (block->is_ready != 0) {
            if (token == num_blocks - 1) send_routing_table(c, choice, sets);
#pragma unroll 1
            while (token < p.num_tokens) {
                const int next_token = token + num_blocks;
                const Head next = load_head(p, c, next_token);
                send_token(p, c, token, head);
                token = next_token;
                head = next;
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
        int expert, row;  // this lane's
        int part, num_parts;

        // The share of `count` things that falls to this warp.
        EP_DEVICE int first_of(int count) const { return part * ((count + num_parts - 1) / num_parts); }
        EP_DEVICE int end_of(int count) const {
            const int end = first_of(count) + (count + num_parts - 1) / num_parts;
            return end < count ? end : count;
        }
    };

    // This lane's word of the scales, from `base` on; of a token that has a slot.
    static EP_DEVICE uint32_t load_scale(const Params& p, const Move& move, int base) {
        const int word = base + prim::lane_idx();
        if (p.payload != Payload::kFp8 || word >= move.end_of(num_scale_words(p)) || move.slot == nullptr) return 0;
        const auto* scales = reinterpret_cast<const uint32_t*>(move.slot + p.call.message.scales.offset);
        return p.packs_scales ? packed_exponents(scales, word) : scales[word];
    }

    static EP_DEVICE int num_scale_words(const Params& p) {
        return p.call.hidden / kGroupSize / (p.packs_scales ? 4 : 1);
    }

    // `value`: this lane's first word.
    static EP_DEVICE void place_scales(const Params& p, const Context& c, const Move& move, uint32_t value) {
        const int num_words = num_scale_words(p);
        const int num_rows = c.num_rows_of_expert();
        const int first = move.first_of(num_words);
#pragma unroll 1
        for (int base = first; base < move.end_of(num_words); base += kWarpSize) {
            const int word = base + prim::lane_idx();
            const bool is_inside = word < move.end_of(num_words);
            if (base != first) value = load_scale(p, move, base);
#pragma unroll 1
            for (uint32_t rest = move.lanes; rest != 0; rest &= rest - 1) {
                const int lane = __ffs(static_cast<int>(rest)) - 1;
                const int expert = __shfl_sync(kFullMask, move.expert, lane);
                const int row = __shfl_sync(kFullMask, move.row, lane);
                const int64_t column = static_cast<int64_t>(expert) * num_words + word;
                if (is_inside) p.recv_scales[column * num_rows + row] = value;
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

    static EP_DEVICE void store_share(const Params& p, const Context& c, const Move& move, int base, int end,
                                      const Held& held) {
        const int64_t row_bytes = p.payload == Payload::kFp8 ? p.call.hidden : p.call.hidden * 2;
        const int place = move.expert * c.num_rows_of_expert() + move.row;
#pragma unroll 1
        for (uint32_t rest = move.lanes; rest != 0; rest &= rest - 1) {
            const int row = __shfl_sync(kFullMask, place, __ffs(static_cast<int>(rest)) - 1);
            auto* target = reinterpret_cast<Vec16*>(p.recv_x + row * row_bytes);
#pragma unroll
            for (int i = 0; i < kReceiveUnroll; ++i) {
                const int idx = base + i * kWarpSize + prim::lane_idx();
                if (idx < end) prim::store_streaming(target + idx, held.vec[i]);
            }
        }
    }

    // One lane for each of up to 32 entries: does an entry before it send the token to the same expert? A row is placed
    // once. `entries`: all of the token's; `first`: the first of these.
    static EP_DEVICE bool is_repeated(const int* entries, int num_entries, int first, int entry) {
        const int count = num_entries - first < kWarpSize ? num_entries - first : kWarpSize;
        bool is_found = false;
#pragma unroll 1
        for (int earlier = 0; earlier < first; ++earlier) is_found |= entries[earlier] == entry;
#pragma unroll 1
        for (int lane = 0; lane < count; ++lane)
            is_found |= __shfl_sync(kFullMask, entry, lane) == entry && lane < prim::lane_idx();
        return is_found;
    }

    // A warp's part in the receive phase: a share of one token, or of the lists of counts.
    struct Unit {
        int source, token;
        int part, num_parts;
        int first_expert;  // of a list
        bool is_move, is_list;
    };

    // Tokens of all sources in turn, so that no link is the last; every rank begins with another source.
    static EP_DEVICE Unit unit_of(const Context& c, int unit, int num_moves, int num_parts, int num_lists) {
        const int item = unit / num_parts;
        return {(c.rank() + item) % c.num_ranks(),
                item / c.num_ranks(),
                unit % num_parts,
                num_parts,
                (unit - num_moves) * kWarpSize,
                unit < num_moves,
                unit >= num_moves && unit < num_moves + num_lists};
    }

    // What a warp has under way of its token before it knows the rows. Of the first 32 top-k entries, one in each lane.
    struct Begun {
        bool exists;     // the source has such a token
        int entry;       // this lane's; -1: none
        bool is_placed;  // this lane's entry is of one of our experts, and the first to name it
        uint32_t scale;
        Move move;
        Held held;
    };

    static EP_DEVICE int num_vecs(const Params& p) {
        return (p.payload == Payload::kFp8 ? p.call.hidden : p.call.hidden * 2) / static_cast<int>(sizeof(Vec16));
    }

    static EP_DEVICE const int* entries_of(const Context& c, const Unit& unit) {
        return c.table(unit.source) + static_cast<int64_t>(unit.token) * c.call.num_topk;
    }

    static EP_DEVICE const uint64_t* slot_flag(const Context& c, const Unit& unit) {
        return c.watch.heap.token_full(c.rank(), c.bank, unit.source, unit.token);
    }

    // One warp; acquire: is the token's slot full?
    static EP_DEVICE bool look_at_slot(const Context& c, const Unit& unit) {
        return as_lane_0_says(prim::lane_idx() == 0 && is_set(c.watch, slot_flag(c, unit)));
    }

    // One warp; acquire. False: the source is left out.
    static EP_DEVICE bool wait_for_slot(const Context& c, const Unit& unit) {
        return as_lane_0_says(prim::lane_idx() == 0 &&
                              wait_for_source(c.call, c.watch, Stage::kRow, unit.source, slot_flag(c, unit)));
    }

    static EP_DEVICE void load_slot(const Params& p, const Context& c, const Unit& unit, Begun& begun) {
        Move& move = begun.move;
        move.slot = c.slot(c.rank(), unit.source, unit.token);
        load_share(move, move.first_of(num_vecs(p)), move.end_of(num_vecs(p)), begun.held);
        begun.scale = load_scale(p, move, move.first_of(num_scale_words(p)));
    }

    // Which of the entries from `first` on become rows here; the rows themselves are found later.
    static EP_DEVICE void choose_entries(const Params& p, const Context& c, const Unit& unit, int first, int entry,
                                         Begun& begun) {
        begun.entry = entry;
        begun.move.expert = local_expert(c, expert_of(entry));
        begun.is_placed = !is_repeated(entries_of(c, unit), p.call.num_topk, first, entry) && begun.move.expert >= 0;
        begun.move.lanes = __ballot_sync(kFullMask, begun.is_placed);
    }

    static EP_DEVICE int load_entry(const Context& c, const Unit& unit, int first) {
        const int k = first + prim::lane_idx();
        return k < c.call.num_topk ? entries_of(c, unit)[k] : -1;
    }

    // One warp, after the source's table. A slot that is full is one of ours, so that it may be read before the entries say so.
    static EP_DEVICE void begin_token(const Params& p, const Context& c, const Unit& unit, bool is_full, Begun& begun) {
        begun = {};
        begun.move = {nullptr, 0, -1, 0, unit.part, unit.num_parts};
        const int num_tokens = c.num_tokens_of(unit.source);
        const int entry = load_entry(c, unit, 0);
        if (!is_full) is_full = look_at_slot(c, unit);
        if (is_full) load_slot(p, c, unit, begun);
        begun.exists = unit.token < num_tokens;
        if (!begun.exists) return;
        choose_entries(p, c, unit, 0, entry, begun);
    }

    // One warp: the rows, once the counts are known.
    static EP_DEVICE void finish_entries(const Params& p, const Context& c, const Unit& unit, const Counts& counts,
                                         int first, Begun& begun) {
        Move& move = begun.move;
        if (move.lanes != 0 && move.slot == nullptr && wait_for_slot(c, unit)) load_slot(p, c, unit, begun);
        const int k = first + prim::lane_idx();
        int place = -1;
        if (move.expert >= 0) {
            move.row = counts.before(unit.source)[move.expert] + place_of(begun.entry);
            place = move.expert * c.num_rows_of_expert() + move.row;
        }
        if (move.part == 0 && k < p.call.num_topk) {
            p.row_of_entry[first_entry_of(p, unit) + k] = place;
            if (begun.is_placed) p.src_info[place] = unit.token;
        }
        if (p.payload == Payload::kFp8 && move.lanes != 0) place_scales(p, c, move, begun.scale);
        const int begin = move.first_of(num_vecs(p));
        const int end = move.lanes == 0 ? begin : move.end_of(num_vecs(p));
#pragma unroll 1
        for (int base = begin; base < end; base += kReceiveUnroll * kWarpSize) {
            if (base != begin) load_share(move, base, end, begun.held);
            store_share(p, c, move, base, end, begun.held);
        }
    }

    static EP_DEVICE int64_t first_entry_of(const Params& p, const Unit& unit) {
        return (static_cast<int64_t>(unit.source) * p.call.num_max_tokens + unit.token) * p.call.num_topk;
    }

    // One warp. Where a source has no such token, combine learns that from row_of_entry.
    static EP_DEVICE void finish_token(const Params& p, const Context& c, const Unit& unit, const Counts& counts,
                                       Begun& begun) {
        if (begun.exists) finish_entries(p, c, unit, counts, 0, begun);
#pragma unroll 1
        for (int first = begun.exists ? kWarpSize : 0; first < p.call.num_topk; first += kWarpSize) {
            if (begun.exists) {
                choose_entries(p, c, unit, first, load_entry(c, unit, first), begun);
                begun.move.row = -1;
                if (begun.move.slot != nullptr) load_slot(p, c, unit, begun);
                finish_entries(p, c, unit, counts, first, begun);
            } else if (unit.part == 0 && first + prim::lane_idx() < p.call.num_topk) {
                p.row_of_entry[first_entry_of(p, unit) + first + prim::lane_idx()] = -1;
            }
        }
    }

    // One warp, an expert for each lane: how many rows it gets, and from whom.
    static EP_DEVICE void write_counts(const Params& p, const Context& c, const Counts& counts, int first_expert) {
        const int expert = first_expert + prim::lane_idx();
        if (expert >= c.num_local_experts()) return;
#pragma unroll 1
        for (int source = 0; source < c.num_ranks(); ++source) {
            const int64_t first = counts.before(source)[expert];
            p.layout_range[static_cast<int64_t>(expert) * c.num_ranks() + source] =
                first << 32 | (counts.before(source + 1)[expert] - first);
        }
        const int num_rows = counts.before(c.num_ranks())[expert];
        p.recv_count[expert] = num_rows;
        if (p.cumulative_stats != nullptr) p.cumulative_stats[expert] += num_rows;
    }

    // A trip to memory is as long as a barrier is short: the block learns the counts together, while the slots of its first
    // tokens are under way.
    static EP_DEVICE void receive(const Params& p, const Context& c, Block* block) {
        const int num_items = c.num_ranks() * p.call.num_max_tokens;
        const int num_parts = warps_for_item(num_items, kMaxWarpsForItem);
        const int num_moves = num_items * num_parts;
        const int num_lists = (c.num_local_experts() + kWarpSize - 1) / kWarpSize;
        const auto counts = Counts::make(c);
        for_each_unit(c, block, num_moves + num_lists, [&](int idx, bool is_first, const auto& draw) {
            const Unit unit = unit_of(c, idx, num_moves, num_parts, num_lists);
            Begun begun = {};
            const bool is_full = unit.is_move && look_at_slot(c, unit);
            if (is_first) wait_for_tables(c, counts.is_here);
            if (unit.is_move && counts.is_here[unit.source] != 0) begin_token(p, c, unit, is_full, begun);
            if (is_first) find_counts(c, counts);
            draw();
            if (unit.is_move) finish_token(p, c, unit, counts, begun);
            if (unit.is_list) write_counts(p, c, counts, unit.first_expert);
        });
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        Context context = make_context(p.call, layout::Operation::kLowLatencyDispatch, kPhase);
        if constexpr (kPhase == Phase::kReceive)
            begin_receive(context);
        else
            send(p, context, &shared.block);
        if constexpr (kPhase != Phase::kSend)
            if (kPhase == Phase::kReceive || shared.block.receives != 0) receive(p, context, &shared.block);
        add_statistics(context, &shared.block);
    }
};

void launch(const LowLatencyDispatchParams& params, dev::Stream stream) {
    const auto table_bytes = TokenSets::bytes(params.call.num_experts, params.num_set_words, params.call.num_topk);
    const auto count_bytes = Counts::bytes(params.call);
    dev::LaunchConfig config;
    config.num_blocks = params.call.num_blocks;
    config.num_threads = kWarpSize * params.call.num_warps;
    config.name = "deep_ep::low_latency::dispatch";
    switch (params.call.phase) {
        case Phase::kSend:
            config.dynamic_shared_bytes = table_bytes;
            return dev::launch<Kernel<Phase::kSend>>(config, stream, params);
        case Phase::kReceive:
            config.dynamic_shared_bytes = count_bytes;
            return dev::launch<Kernel<Phase::kReceive>>(config, stream, params);
        case Phase::kBoth:
            config.dynamic_shared_bytes = table_bytes > count_bytes ? table_bytes : count_bytes;
            return dev::launch<Kernel<Phase::kBoth>>(config, stream, params);
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::dispatch
