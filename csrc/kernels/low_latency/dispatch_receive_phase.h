// The receive phase of dispatch: each token that has come is shared by several warps. Its table entries say which rows it
// becomes; from its slot each warp writes its share to all of them.
#pragma once

#include "kernels/low_latency/dispatch_outputs.h"
#include "kernels/low_latency/shares.h"

namespace deep_ep::kernels::low_latency::dispatch {
inline namespace EP_BACKEND {

// Vectors of a row that a lane has on their way: of its first part, which is in registers while the tables are awaited, and
// of a further one. With 128 tokens there is no further one, and more registers would be spilled.
constexpr int kFirstVecs = 4;
constexpr int kFurtherVecs = 8;

// A warp's part in the receive phase: a part of a token, or some of the lists of counts.
struct Unit {
    int source, token, part;
    int list;
    bool is_token, is_list;
};

// Of a row's vectors, or of its scales.
struct Range {
    int first, end;
};

EP_DEVICE Range range_of_part(int part, int size, int count) {
    const int first = part * size, end = first + size;
    return {first, end < count ? end : count};
}

EP_DEVICE Range vecs_of(const Params& p, const Unit& unit) {
    return range_of_part(unit.part, p.part_vecs, num_vecs(p));
}
EP_DEVICE Range scales_of(const Params& p, const Unit& unit) {
    return range_of_part(unit.part, p.part_scale_words, p.num_scale_words);
}

EP_DEVICE int num_token_units(const CallContext& c) {
    return c.num_ranks() * c.call.num_max_tokens * c.call.by_parts.value;
}

// Tokens of all sources in turn, so that no link is the last; every rank begins with another source.
EP_DEVICE Unit unit_of(const CallContext& c, int idx) {
    const int num_shares = num_token_units(c);
    const int item = c.call.by_parts.quotient(idx), token = c.call.by_ranks.quotient(item);
    const int source = c.rank() + item - token * c.num_ranks();
    return {source < c.num_ranks() ? source : source - c.num_ranks(),
            token,
            idx - item * c.call.by_parts.value,
            idx - num_shares,
            idx < num_shares,
            idx >= num_shares && idx - num_shares < num_lists(c)};
}

// Up to 32 of a token's table entries, one in each lane.
struct Entries {
    int entry;        // -1: none
    int expert;       // one of ours, or -1
    bool is_placed;   // ours, and the first entry to name it: a token becomes one row of an expert
    uint32_t placed;  // lanes for which that holds
};

// What a warp knows of its token before it knows the rows.
struct ReceivedToken {
    const uint8_t* slot;  // null: not here yet, or it will not come
    algo::Piece<kFirstVecs> held;
    uint32_t scale;
    bool exists;      // among the tokens of its source
    Entries entries;  // the first 32
};

EP_DEVICE const int* entries_of(const CallContext& c, const Unit& unit) {
    return c.table(unit.source) + static_cast<int64_t>(unit.token) * c.call.num_topk;
}

EP_DEVICE int load_entry(Warp warp, const CallContext& c, const Unit& unit, int first) {
    const int k = first + warp.thread_rank();
    return k < c.call.num_topk ? entries_of(c, unit)[k] : -1;
}

// Does an earlier entry of the token name the same expert? `first`: of the lanes' entries.
EP_DEVICE bool is_repeated(Warp warp, const CallContext& c, const Unit& unit, int first, int entry) {
    warp.expect();
    const int rest = c.call.num_topk - first;
    bool is_found = false;
#pragma unroll 1
    for (int earlier = 0; earlier < first; ++earlier) is_found |= entries_of(c, unit)[earlier] == entry;
#pragma unroll 4
    for (int lane = 0; lane < (rest < kWarpSize ? rest : kWarpSize); ++lane)
        is_found |= __shfl_sync(kFullMask, entry, lane) == entry && lane < warp.thread_rank();
    return is_found;
}

EP_DEVICE Entries choose_entries(Warp warp, const CallContext& c, const Unit& unit, int first, int entry) {
    const int expert = local_expert(c, expert_of(entry));
    const bool is_placed = !is_repeated(warp, c, unit, first, entry) && expert >= 0;
    return {entry, expert, is_placed, __ballot_sync(kFullMask, is_placed)};
}

// A token's slot as far as a lane has loaded it, from some vector, or word, of the warp's share on. Of a source that is left out:
// zeros; in a call that has failed: NaN, in every word.
template <int kVecs>
EP_DEVICE algo::Piece<kVecs> load_row(Warp warp, const uint8_t* slot, uint32_t filler, int base, int end) {
    algo::Piece<kVecs> held;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
        const int idx = base + i * kWarpSize + warp.thread_rank();
        held.vec[i] = {{filler, filler, filler, filler}};
        if (idx < end && slot != nullptr)
            held.vec[i] = prim::load_shared_with_peers(reinterpret_cast<const Vec16*>(slot) + idx);
    }
    return held;
}

EP_DEVICE uint32_t packed_exponents(const uint32_t* scales, int word) {
    uint32_t packed = 0;
    for (int i = 0; i < 4; ++i) packed |= (scales[word * 4 + i] >> 23 & 0xffu) << (8 * i);
    return packed;
}

EP_DEVICE uint32_t load_scale(Warp warp, const Params& p, const Unit& unit, const uint8_t* slot, uint32_t filler,
                              int base) {
    const int word = base + warp.thread_rank();
    if (word >= scales_of(p, unit).end || slot == nullptr) return filler;
    const auto* scales = reinterpret_cast<const uint32_t*>(slot + p.call.message.scales.offset);
    return p.packs_scales ? packed_exponents(scales, word) : scales[word];
}

EP_DEVICE void load_slot(Warp warp, const Params& p, const CallContext& c, const Unit& unit, ReceivedToken& token) {
    token.slot = c.row_slot(unit.source, unit.token);
    const Range vecs = vecs_of(p, unit);
    token.held = load_row<kFirstVecs>(warp, token.slot, 0, vecs.first, vecs.end);
    token.scale = load_scale(warp, p, unit, token.slot, 0, scales_of(p, unit).first);
}

EP_DEVICE void void_slot(ReceivedToken& token) {
    token.scale = algo::kVoidWord;
#pragma unroll
    for (Vec16& vec : token.held.vec) vec = algo::void_vec();
}

EP_DEVICE const uint64_t* slot_flag(const CallContext& c, const Unit& unit) {
    return c.row_flag(c.bank, unit.source, unit.token);
}

// Acquire: is the slot full?
EP_DEVICE bool look_at_slot(Warp warp, const CallContext& c, const Unit& unit) {
    warp.expect();
    return algo::broadcast(warp, warp.thread_rank() == 0 && is_set(c.call, c.watch, unit.source, slot_flag(c, unit)));
}

// Acquire. False: the source is left out.
EP_DEVICE bool wait_for_slot(Warp warp, const CallContext& c, const Unit& unit) {
    warp.expect();
    return algo::broadcast(warp, warp.thread_rank() == 0 &&
                                     wait_for_source(c.call, c.watch, Stage::kRow, unit.source, slot_flag(c, unit)));
}

// See kSlotLanes. What a far rank's flag guards takes a look of another kind.
EP_DEVICE EarlyLook look_early(Warp warp, const CallContext& c, const Unit& unit) {
    if (kAcrossNodes) return {0};
    const uint64_t* flag = nullptr;
    if (const int bank = warp.thread_rank(); bank < kSlotLanes) {
        if (unit.is_token) flag = c.token_flag(bank, unit.source, unit.token);
    } else if (const int table = early_table(warp); table < c.num_ranks() * layout::kNumLowLatencyBanks) {
        flag = table_flag(c, table);
    }
    return {flag != nullptr ? prim::load<Order::kAcquire, Scope::kSys>(flag) : 0};
}

// Was it the slot that this lane has seen full? Acquire.
EP_DEVICE bool has_seen_slot(Warp warp, const CallContext& c, EarlyLook early) {
    const bool is_full = warp.thread_rank() < kSlotLanes && early.seen == c.watch.call;
    return __any_sync(kFullMask, is_full) != 0;
}

// Looks at the slot until it is full, or its block knows the tables, which others of its threads wait for. Acquire.
EP_DEVICE bool watch_slot(Warp warp, const CallContext& c, BlockRole& role, const Unit& unit) {
    for (;;) {
        if (look_at_slot(warp, c, unit)) return true;
        const bool is_leader = warp.thread_rank() == 0;
        if (algo::broadcast(warp,
                            is_leader && prim::fetch_or<Order::kRelaxed, Scope::kCta>(&role.knows_tables, 0) != 0))
            return false;
        prim::pause();
    }
}

// After the source's table: all that is to be loaded is under way when the entries are here.
EP_DEVICE void begin_token(Warp warp, const Params& p, const CallContext& c, const Unit& unit, bool is_full,
                           ReceivedToken& token) {
    const int num_tokens = c.num_tokens_of(unit.source), entry = load_entry(warp, c, unit, 0);
    if (is_full || look_at_slot(warp, c, unit)) load_slot(warp, p, c, unit, token);
    token.exists = unit.token < num_tokens;
    token.entries = choose_entries(warp, c, unit, 0, token.exists ? entry : -1);
}

// This share of the row, to the rows of all `lanes`. `row`: this lane's, of all experts' rows.
template <int kVecs>
EP_DEVICE void store_row(Warp warp, const Params& p, uint32_t lanes, int row, int base, int end,
                         const algo::Piece<kVecs>& held) {
    warp.expect();
#pragma unroll 1
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int64_t target_row = __shfl_sync(kFullMask, row, __ffs(static_cast<int>(rest)) - 1);
        auto* target = reinterpret_cast<Vec16*>(p.recv_x + target_row * row_bytes(p));
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
            const int idx = base + i * kWarpSize + warp.thread_rank();
            if (idx < end) prim::store_streaming(target + idx, held.vec[i]);
        }
    }
}

EP_DEVICE void place_row(Warp warp, const Params& p, const Unit& unit, const ReceivedToken& token, uint32_t lanes,
                         int row) {
    const Range vecs = vecs_of(p, unit);
    store_row(warp, p, lanes, row, vecs.first, vecs.end, token.held);
#pragma unroll 1
    for (int base = vecs.first + kFirstVecs * kWarpSize; base < vecs.end; base += kFurtherVecs * kWarpSize)
        store_row(warp, p, lanes, row, base, vecs.end,
                  load_row<kFurtherVecs>(warp, token.slot, token.held.vec[0].word[0], base, vecs.end));
}

// Scales stand word by word, each with those of all rows of its expert side by side.
EP_DEVICE void place_scales(Warp warp, const Params& p, const CallContext& c, const Unit& unit,
                            const ReceivedToken& token, const Entries& entries, int row) {
    warp.expect();
    const int num_words = p.num_scale_words, num_rows = c.num_rows_of_expert();
    const Range words = scales_of(p, unit);
#pragma unroll 1
    for (int base = words.first; base < words.end; base += kWarpSize) {
        const int word = base + warp.thread_rank();
        const uint32_t scale =
            base == words.first ? token.scale : load_scale(warp, p, unit, token.slot, token.scale, base);
#pragma unroll 1
        for (uint32_t rest = entries.placed; rest != 0; rest &= rest - 1) {
            const int lane = __ffs(static_cast<int>(rest)) - 1;
            const int expert = __shfl_sync(kFullMask, entries.expert, lane);
            const int row_of_expert = __shfl_sync(kFullMask, row, lane) - expert * num_rows;
            const int64_t column = static_cast<int64_t>(expert) * num_words + word;
            if (word < words.end) p.recv_scales[column * num_rows + row_of_expert] = scale;
        }
    }
}

// After find_counts: what these entries want of the token. `first`: which of its entries they are. False: a place
// is beyond the rows that its source has stated, and nothing is written.
EP_DEVICE bool place_entries(Warp warp, const Params& p, const CallContext& c, const Unit& unit, const Counts& counts,
                             int first, const Entries& entries, const ReceivedToken& token) {
    warp.expect();
    int row = -1;
    bool is_stated = true;
    if (entries.expert >= 0) {
        const int before = counts.before(unit.source)[entries.expert];
        const int num_rows = counts.before(unit.source + 1)[entries.expert] - before;
        row = entries.expert * c.num_rows_of_expert() + before + place_of(entries.entry);
        is_stated = place_of(entries.entry) < num_rows;
    }
    if (!__all_sync(kFullMask, is_stated)) return false;
    if (const int k = first + warp.thread_rank(); unit.part == 0 && k < p.call.num_topk) {
        const int64_t idx = static_cast<int64_t>(unit.source) * p.call.num_max_tokens + unit.token;
        p.row_of_entry[idx * p.call.num_topk + k] = row;
        if (entries.is_placed) p.src_info[row] = unit.token;
    }
    if (entries.placed == 0) return true;
    place_scales(warp, p, c, unit, token, entries, row);
    place_row(warp, p, unit, token, entries.placed, row);
    return true;
}

// The rest of the token, once the counts are known. Of a token that does not exist combine learns that it has no
// rows. False: the call has failed, or does now, since a place in the table of the source cannot be true.
template <class Claim>
EP_DEVICE bool finish_token(Warp warp, const Params& p, const CallContext& c, const Unit& unit, const Counts& counts,
                            ReceivedToken& token, const Claim& claim) {
    bool is_right = true;
#pragma unroll 1
    for (int first = 0; first < p.call.num_topk; first += kWarpSize) {
        const bool is_known = first == 0 || !token.exists;
        const Entries entries =
            is_known ? token.entries : choose_entries(warp, c, unit, first, load_entry(warp, c, unit, first));
        if (entries.placed != 0 && token.slot == nullptr) {
            if (wait_for_slot(warp, c, unit)) {
                load_slot(warp, p, c, unit, token);
            } else if (has_failed(c.watch)) {
                void_slot(token);
                is_right = false;
            }
        }
        claim();
        is_right &= place_entries(warp, p, c, unit, counts, first, entries, token);
    }
    return is_right;
}

// A trip to memory is as long as a barrier is short: the block learns the counts together, while the entries and slots of
// its first tokens are under way.
EP_DEVICE void receive(Block block, const Params& p, const LaunchSession& launch, EarlyLook early) {
    const CallContext& c = launch.context;
    const Warp warp;
    const auto counts = Counts::make(c);
    bool knows_rows = true;  // the block
    bool is_right = true;    // this thread has met nothing that makes the call fail
    for_each_unit(block, launch, num_token_units(c) + num_lists(c), [&](int idx, bool is_first, const auto& claim) {
        const Unit unit = unit_of(c, idx);
        // Before the tables, which come last, only whether the slot is full: a peer that has another shape has its table
        // where this rank sees a slot, and may be writing there.
        if (is_first && c.sends()) early = look_early(warp, c, unit);
        bool is_full = is_first ? has_seen_slot(warp, c, early) : unit.is_token && look_at_slot(warp, c, unit);
        if (is_first) {
            const bool is_lost = wait_for_tables(block, c, counts, launch.role, early);
            // Where the launch has not sent, all is here most likely.
            if (unit.is_token && !is_full && c.sends() && prim::warp_idx() != 0)
                is_full = watch_slot(warp, c, launch.role, unit);
            knows_rows = !any(block, is_lost);  // one thread's acquire, the block's reads
        }
        ReceivedToken token = {};
        token.entries = {-1, -1, false, 0};
        SourceCounts ahead = {};
        if (is_first && knows_rows) ahead = load_counts(c, counts, block.thread_rank(), 0);
        if (knows_rows && unit.is_token && counts.is_here[unit.source] != 0)
            begin_token(warp, p, c, unit, is_full, token);
        if (is_first && knows_rows) knows_rows = find_counts(block, c, counts, ahead);
        if (knows_rows && unit.is_token) is_right &= finish_token(warp, p, c, unit, counts, token, claim);
        if (knows_rows && unit.is_list) write_list(warp, p, c, launch.role, counts, unit.list);
        if (!knows_rows && unit.is_list) void_list(warp, p, c, unit.list);
    });
    if (__all_sync(kFullMask, knows_rows && is_right)) return;
    if (warp.thread_rank() == 0) refuse_tables(c, counts);
    void_outputs(warp, &p, c, launch.role.launch_state, knows_rows);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::dispatch
