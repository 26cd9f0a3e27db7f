// The receive phase of combine: each token is shared by several warps, which wait for the parts of its ranks and sum them in
// FP32, in rank order.
#pragma once

#include "device/algo/group.h"
#include "kernels/low_latency/combine_sums.h"
#include "kernels/low_latency/shares.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

using Params = LowLatencyCombineParams;
using EntrySlots = layout::LowLatencyEntrySlots;

// A part is what one rank has for a token: one row, which the rank has summed; or (only in packets) the rows of its entries,
// from a rank that did not know the weights, which are summed and rounded here exactly as there.
template <bool kIsLogfmt, bool kUsesPackets> struct Receiver {
    static constexpr int kPartsAhead = kIsLogfmt ? 1 : 4;

    // The parts of a token from 32 ranks, one in each lane.
    struct Parts {
        int first_rank;
        uint32_t lanes;    // that have one
        uint32_t as_rows;  // of those
        uint32_t entries;  // of this lane's rank that count; in packets only
        bool is_lost;      // a part does not come, since the call has failed
        uint32_t sent;     // of this lane's rank, if it is far, in packets: the entries that the dispatch had there
    };

    // One warp's token.
    struct OwnToken {
        int idx;
        int64_t id;    // this lane's entry of the first 32
        float weight;  // the same; in packets only
        int own;       // the same of the dispatch, its expert; in packets across nodes only
    };

    static EP_DEVICE OwnToken load_token(Warp warp, const Params& p, const CallContext& c, int idx) {
        const int64_t first = static_cast<int64_t>(idx) * c.call.num_topk;
        const int k = warp.thread_rank();
        OwnToken token = {idx, -1, 0.0f, -1};
        if constexpr (kAcrossNodes && kUsesPackets) {
            const int64_t num_others = int64_t{c.num_ranks()} * c.call.num_max_tokens * c.call.num_topk;
            if (k < c.call.num_topk) token.own = p.row_of_entry[num_others + first + k];
        }
        if (kAcrossNodes && idx >= p.num_tokens) return token;
        token.id = Ids{p.topk_idx, p.idx_bytes}.load(warp, c, idx, 0);
        if (kUsesPackets && k < c.call.num_topk) token.weight = p.topk_weights[first + k];
        return token;
    }

    static EP_DEVICE bool is_of_call(const CallContext& c, uint64_t seen) {
        return (kUsesPackets ? EntrySlots::call_of(seen) : seen) == c.watch.call;
    }

    // One look; acquire.
    static EP_DEVICE bool look_at_part(const CallContext& c, int rank, const uint64_t* flag, uint64_t& seen) {
        seen = prim::load<Order::kAcquire, Scope::kSys>(flag);
        const bool is_here = is_of_call(c, seen);
        if (is_here) confirm_far(c.call, c.watch, rank, flag, seen);
        return is_here;
    }

    // Across nodes what the dispatch had is waited for, also where this combine has fewer tokens.
    static EP_DEVICE int num_units(const Params& p) {
        return (kAcrossNodes && kUsesPackets ? p.call.num_max_tokens : p.num_tokens) * p.call.by_parts.value;
    }

    // Of a warp's first token in a launch that only receives, before the number of the call is known.
    struct EarlyToken {
        OwnToken token;
        uint64_t seen;  // this lane's flag, of a rank in a bank; 0: none
    };

    static EP_DEVICE bool can_look_early(const CallContext& c) {
        return !kAcrossNodes && c.phase == Phase::kReceive && c.num_ranks() <= kWarpSize / layout::kNumLowLatencyBanks;
    }

    static EP_DEVICE EarlyToken look_early(Warp warp, const Params& p, const CallContext& c) {
        const int unit = first_unit();
        if (unit >= num_units(p)) return {};
        EarlyToken early = {load_token(warp, p, c, p.call.by_parts.quotient(unit)), 0};
        const int rank = warp.thread_rank() / layout::kNumLowLatencyBanks;
        const int bank = warp.thread_rank() % layout::kNumLowLatencyBanks;
        if (can_look_early(c) && rank < c.num_ranks())
            early.seen = prim::load<Order::kAcquire, Scope::kSys>(c.token_flag(bank, rank, early.token.idx));
        return early;
    }

    // This lane: what a far rank has put for the token, by entry. All of it is waited for, whatever of it is wanted.
    static EP_DEVICE bool wait_for_far_part(const CallContext& c, const OwnToken& token, int rank, uint32_t sent,
                                            uint64_t& seen) {
        bool is_here = true;
#pragma unroll 1
        for (uint32_t rest = sent; rest != 0; rest &= rest - 1) {
            const int entry = token.idx * c.call.num_topk + __ffs(static_cast<int>(rest)) - 1;
            const auto* flag = c.far().template at<const uint64_t>(c.far().entry_full(c.bank, entry));
            uint64_t of_entry = 0;
            is_here &=
                look_at_part(c, rank, flag, of_entry) || wait_for_late_part(&c.call, c.watch, rank, flag, &of_entry);
            if (rest == sent) seen = of_entry;
            if (!is_here || !EntrySlots::has_rows(of_entry)) break;
        }
        return is_here;
    }

    // A lane looks before it is known who has a part: the ids may still be under way.
    static EP_DEVICE Parts wait_for_parts(Warp warp, const Params& p, const CallContext& c, const OwnToken& token,
                                          int first_rank, uint64_t early) {
        warp.expect();
        const int rank = first_rank + warp.thread_rank();
        const bool is_by_entry = kUsesPackets && c.is_far(rank);  // a far rank's
        const uint64_t* flag = c.token_flag(c.bank, rank < c.num_ranks() ? rank : 0, token.idx);
        uint64_t seen = 0;
        bool is_here = false;
        if (can_look_early(c)) {
            const int lane = rank * layout::kNumLowLatencyBanks + c.bank;
            seen = __shfl_sync(kFullMask, early, lane % kWarpSize);
            is_here = rank < c.num_ranks() && is_of_call(c, seen);
        }
        if (!is_here && rank < c.num_ranks() && !is_by_entry) is_here = look_at_part(c, rank, flag, seen);
        Parts parts = {first_rank, 0, 0, 0, false, 0};
        bool is_expected, is_wanted;
        if constexpr (kUsesPackets) {
            parts.entries = entries_of_rank(warp, c, token.id, first_rank);
            is_expected = is_wanted = parts.entries != 0;
            if constexpr (kAcrossNodes) {
                const uint32_t sent = entries_of_rank(warp, c, token.own, first_rank);
                if (is_by_entry) parts.sent = sent;
                if (is_by_entry && sent != 0) is_here = wait_for_far_part(c, token, rank, sent, seen);
                if (is_by_entry && sent == 0 && is_expected) refuse_entries(c.watch, c.rank(), token.idx);
                is_expected |= parts.sent != 0;
            }
            if (is_expected && !is_here && !is_by_entry)
                is_here = wait_for_late_part(&c.call, c.watch, rank, flag, &seen);
            const bool has_rows = EntrySlots::has_rows(seen);
            parts.as_rows = __ballot_sync(kFullMask, is_wanted && is_here && has_rows);
            if (has_rows && is_here && (parts.entries & ~EntrySlots::rows_of(seen)) != 0) {
                refuse_entries(c.watch, c.rank(), token.idx);
                parts.entries &= EntrySlots::rows_of(seen);
            }
        } else {
            is_expected = is_wanted = is_destination(warp, c, {p.topk_idx, p.idx_bytes}, token.id, token.idx,
                                                     first_rank, [&](int peer) { return is_masked(c.call, peer); });
            if (is_expected && !is_here) is_here = wait_for_source(c.call, c.watch, Stage::kRow, rank, flag);
        }
        if (__any_sync(kFullMask, is_expected && !is_here)) parts.is_lost = has_failed(c.watch);
        parts.lanes = __ballot_sync(kFullMask, is_wanted && is_here);
        warp.sync();  // each lane's acquire, every lane's reads
        return parts;
    }

    // The slot of the part that `lane` of `parts` has.
    static EP_DEVICE const uint8_t* slot_of(Warp warp, const CallContext& c, const OwnToken& token, const Parts& parts,
                                            int lane) {
        warp.expect();
        const int rank = parts.first_rank + lane;
        if constexpr (!kUsesPackets) return c.slot(c.rank(), rank, token.idx);
        // A far rank's sum lies at the first entry that it has, wanted or not.
        const uint32_t mine = kAcrossNodes && parts.sent != 0 ? parts.sent : parts.entries;
        const uint32_t entries = __shfl_sync(kFullMask, mine, lane);
        return c.part_slot(rank, token.idx, __ffs(static_cast<int>(entries)) - 1);
    }

    static EP_DEVICE Piece load_sent(Warp warp, const CallContext& c, const uint8_t* slot, int chunk) {
        return load_chunk(warp, kPieces<kIsLogfmt>, c.call, chunk, [&](int vec) {
            return prim::load_shared_with_peers(reinterpret_cast<const Vec16*>(slot) + vec);
        });
    }

    // use(bit, load(bit)) for each bit that is set, in ascending order; the loads of `kAhead` are under way at once.
    template <int kAhead, class Load, class Use>
    static EP_DEVICE void for_pieces(uint32_t bits, const Load& load, const Use& use) {
        const auto first = [](uint32_t set) { return __ffs(static_cast<int>(set)) - 1; };
#pragma unroll 1
        while (bits != 0) {
            Piece held[kAhead];
            uint32_t rest = bits;
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (rest == 0) break;
                held[i] = load(first(rest));
                rest &= rest - 1;
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (bits == 0) break;
                use(first(bits), held[i]);
                bits &= bits - 1;
            }
        }
    }

    // Sums that have been sent as such, of the ranks in `lanes`.
    static EP_DEVICE void add_sums(Warp warp, const CallContext& c, const OwnToken& token, const Parts& parts,
                                   uint32_t lanes, int chunk, Sums (&sums)[kVecsOfPiece]) {
        if constexpr (kIsLogfmt) {
            const auto row = layout::LogfmtRow::make(static_cast<uint64_t>(c.call.hidden));
            const int unit = chunk * kWarpSize + warp.thread_rank();
#pragma unroll 1
            for (; lanes != 0; lanes &= lanes - 1) {
                const uint8_t* slot = slot_of(warp, c, token, parts, __ffs(static_cast<int>(lanes)) - 1);
                if (unit >= static_cast<int>(row.high.count)) continue;
                float values[kLogUnit];
                decode_logfmt(values, load_logfmt(slot, row, unit));
                add_values(sums, values);
            }
        } else {
            const auto load = [&](int lane) { return load_sent(warp, c, slot_of(warp, c, token, parts, lane), chunk); };
            for_pieces<kPartsAhead>(lanes, load, [&](int, const Piece& piece) {
#pragma unroll
                for (int i = 0; i < kVecsOfPiece; ++i) sums[i].add(piece.vec[i]);
            });
        }
    }

    // What a part of these sums would have become on its way.
    static EP_DEVICE void add_as_sent(Warp warp, Sums (&sums)[kVecsOfPiece], const Sums (&part)[kVecsOfPiece]) {
        if constexpr (kIsLogfmt) {
            float values[kLogUnit];
            copy_values(part, values);
            const LogUnit codes = encode_logfmt(warp, values);
            decode_logfmt(values, codes);
            add_values(sums, values);
        } else {
#pragma unroll
            for (int j = 0; j < kVecsOfPiece; ++j) sums[j].add(part[j].rounded());
        }
    }

    // The part of the rank in `lane`, which has sent its rows: summed in order of k.
    static EP_DEVICE void add_rows(Warp warp, const CallContext& c, const OwnToken& token, const Parts& parts, int lane,
                                   int chunk, Sums (&sums)[kVecsOfPiece]) {
        warp.expect();
        Sums part[kVecsOfPiece] = {};
        const uint32_t entries = __shfl_sync(kFullMask, parts.entries, lane);
        const auto load = [&](int k) {
            return load_sent(warp, c, c.part_slot(parts.first_rank + lane, token.idx, k), chunk);
        };
        for_pieces<kRowsAhead>(entries, load, [&](int k, const Piece& piece) {
            const float weight = __shfl_sync(kFullMask, token.weight, k);
#pragma unroll
            for (int i = 0; i < kVecsOfPiece; ++i) part[i].add(piece.vec[i], weight);
        });
        add_as_sent(warp, sums, part);
    }

    // Are the rows of the experts that this rank names? Where a part is a sum its sender has asked that.
    static EP_DEVICE void check_rows(Warp warp, const CallContext& c, const OwnToken& token, const Parts& parts) {
        warp.expect();
        uint32_t entries = 0;
#pragma unroll 1
        for (uint32_t rest = parts.as_rows; rest != 0; rest &= rest - 1)
            entries |= __shfl_sync(kFullMask, parts.entries, __ffs(static_cast<int>(rest)) - 1);
        const int k = warp.thread_rank();
        if ((entries >> k & 1u) == 0) return;
        const int owner = owner_of(c, checked_expert(c, token.id));
        if (*c.expert_behind(c.part_slot(owner, token.idx, k)) != token.id)
            refuse_entries(c.watch, c.rank(), token.idx);
    }

    static EP_DEVICE void add_parts(Warp warp, const CallContext& c, const OwnToken& token, const Parts& parts,
                                    int chunk, Sums (&sums)[kVecsOfPiece]) {
        if (!kUsesPackets || parts.as_rows == 0) return add_sums(warp, c, token, parts, parts.lanes, chunk, sums);
        if (chunk == 0) check_rows(warp, c, token, parts);
#pragma unroll 1
        for (uint32_t rest = parts.lanes; rest != 0; rest &= rest - 1) {
            const int lane = __ffs(static_cast<int>(rest)) - 1;
            if ((parts.as_rows >> lane & 1u) != 0)
                add_rows(warp, c, token, parts, lane, chunk, sums);
            else
                add_sums(warp, c, token, parts, 1u << lane, chunk, sums);
        }
    }

    static EP_DEVICE void store_row(Warp warp, const Params& p, int token, int chunk, const Sums (&sums)[kVecsOfPiece],
                                    bool is_lost) {
        auto* row = reinterpret_cast<Vec16*>(p.combined_x + static_cast<int64_t>(token) * p.call.hidden * 2);
#pragma unroll
        for (int i = 0; i < kVecsOfPiece; ++i)
            if (const int vec = lane_vec<kIsLogfmt>(warp, chunk, i); vec < num_row_vecs(p.call))
                prim::store_streaming(row + vec, is_lost ? algo::void_vec() : sums[i].rounded());
    }

    // A share of one token.
    template <class Claim>
    static EP_DEVICE void receive_token(Warp warp, const Params& p, const CallContext& c, const EarlyToken& early,
                                        int part, const Claim& claim) {
        const int first_chunk = part * p.part_chunks, behind = first_chunk + p.part_chunks;
        const int end = behind < num_chunks(p.call) ? behind : num_chunks(p.call);
        const OwnToken& token = early.token;
        Parts parts = {-1, 0, 0, 0, false, 0};
        bool is_lost = false;
#pragma unroll 1
        for (int chunk = first_chunk; chunk < end; ++chunk) {
            Sums sums[kVecsOfPiece] = {};
#pragma unroll 1
            for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
                if (first != parts.first_rank) parts = wait_for_parts(warp, p, c, token, first, early.seen);
                is_lost |= parts.is_lost;
                add_parts(warp, c, token, parts, chunk, sums);
            }
            claim();
            if (kAcrossNodes && token.idx >= p.num_tokens) continue;
            store_row(warp, p, token.idx, chunk, sums, is_lost);
        }
    }

    // A warp: the weights of a far rank, which this rank may not have asked for. Its place is used again two calls later. Nobody
    // reads them now, so one lane's acquire is enough: what tells the sources that the call has been received comes after a
    // barrier of the block.
    static EP_DEVICE void see_table(Warp warp, const CallContext& c, int idx) {
        if (idx >= c.far().count() || warp.thread_rank() != 0) return;
        const int source = c.far().rank(idx);
        wait_for_source(c.call, c.watch, Stage::kTable, source, c.table_flag(c.bank, source));
    }

    static EP_DEVICE void receive(Block block, const Params& p, const LaunchSession& launch, const EarlyToken& early) {
        const CallContext& c = launch.context;
        int num_tables = 0;
        if constexpr (kAcrossNodes && kUsesPackets) num_tables = c.far().count();
        for_each_unit(block, launch, num_units(p) + num_tables, [&](int unit, bool is_first, const auto& claim) {
            const Warp warp;
            if constexpr (kAcrossNodes)
                if (unit >= num_units(p)) return see_table(warp, c, unit - num_units(p));
            if (unit >= num_units(p)) return;
            const bool has_looked = is_first && c.phase == Phase::kReceive;
            const int idx = p.call.by_parts.quotient(unit);
            const EarlyToken look = has_looked ? early : EarlyToken{load_token(warp, p, c, idx), 0};
            receive_token(warp, p, c, look, p.call.by_parts.rest(unit), claim);
        });
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
