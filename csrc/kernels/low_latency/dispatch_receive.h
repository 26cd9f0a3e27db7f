// The receive phase of dispatch: each token that has come is shared by several warps. Its table entries say which rows it
// becomes; from its slot each warp writes its share to all of them.
#pragma once

#include "kernels/low_latency/routing_table.h"
#include "kernels/low_latency/spoil.h"

namespace deep_ep::kernels::low_latency::dispatch {
inline namespace EP_BACKEND {

using Params = LowLatencyDispatchParams;

constexpr int kMaxWarpsForItem = 16;
constexpr int kReceiveUnroll = 8;

// A warp's part in the receive phase: a share of a token, or some of the lists of counts.
struct Unit {
    int source, token;
    int part, num_parts;
    int list;
    bool is_token, is_list;

    // The share of `count` things that falls to this warp.
    EP_DEVICE int first_of(int count) const { return part * ((count + num_parts - 1) / num_parts); }
    EP_DEVICE int end_of(int count) const {
        const int end = first_of(count) + (count + num_parts - 1) / num_parts;
        return end < count ? end : count;
    }
};

// Lists of counts, each written by one warp: 32 experts, or with very many experts several times 32.
EP_DEVICE int num_lists(const Context& c) {
    const int wanted = (c.num_local_experts() + kWarpSize - 1) / kWarpSize;
    return wanted < layout::LowLatencyTurn::kMaxLists ? wanted : layout::LowLatencyTurn::kMaxLists;
}

// Tokens of all sources in turn, so that no link is the last; every rank begins with another source.
EP_DEVICE Unit unit_of(const Context& c, int idx, int num_parts) {
    const int num_shares = c.num_ranks() * c.call.num_max_tokens * num_parts;
    const int item = idx / num_parts;
    return {(c.rank() + item) % c.num_ranks(),
            item / c.num_ranks(),
            idx % num_parts,
            num_parts,
            idx - num_shares,
            idx < num_shares,
            idx >= num_shares && idx - num_shares < num_lists(c)};
}

EP_DEVICE int row_bytes(const Params& p) { return p.payload == Payload::kFp8 ? p.call.hidden : p.call.hidden * 2; }
EP_DEVICE int num_vecs(const Params& p) { return row_bytes(p) / static_cast<int>(sizeof(Vec16)); }

// Words of scales that a row has, as the caller gets them.
EP_DEVICE int num_scale_words(const Params& p) {
    if (p.payload != Payload::kFp8) return 0;
    return p.call.hidden / layout::kFp8GroupSize / (p.packs_scales ? 4 : 1);
}

// Up to 32 of a token's table entries, one in each lane.
struct Entries {
    int entry;        // -1: none
    int expert;       // one of ours, or -1
    bool is_placed;   // ours, and the first entry to name it: a token becomes one row of an expert
    uint32_t placed;  // lanes for which that holds
};

// A token's slot as far as a lane has loaded it, from some vector, or word, of the warp's share on. Of a source that is
// left out: zeros; in a call that has failed: NaN, in every word.
struct Held {
    Vec16 vec[kReceiveUnroll];
};

// What a warp knows of its token before it knows the rows.
struct Token {
    const uint8_t* slot;  // null: not here yet, or it will not come
    Held held;
    uint32_t scale;
    int num_tokens;  // of the source
    int entry;       // this lane's of the first 32
};

EP_DEVICE const int* entries_of(const Context& c, const Unit& unit) {
    return c.table(unit.source) + static_cast<int64_t>(unit.token) * c.call.num_topk;
}

EP_DEVICE int load_entry(const Context& c, const Unit& unit, int first) {
    const int k = first + prim::lane_idx();
    return k < c.call.num_topk ? entries_of(c, unit)[k] : -1;
}

// One warp: does an earlier entry of the token name the same expert? `first`: of the lanes' entries.
EP_DEVICE bool is_repeated(const Context& c, const Unit& unit, int first, int entry) {
    const int rest = c.call.num_topk - first;
    bool is_found = false;
#pragma unroll 1
    for (int earlier = 0; earlier < first; ++earlier) is_found |= entries_of(c, unit)[earlier] == entry;
#pragma unroll 4
    for (int lane = 0; lane < (rest < kWarpSize ? rest : kWarpSize); ++lane)
        is_found |= __shfl_sync(kFullMask, entry, lane) == entry && lane < prim::lane_idx();
    return is_found;
}

EP_DEVICE Entries choose_entries(const Context& c, const Unit& unit, int first, int entry) {
    const int expert = local_expert(c, expert_of(entry));
    const bool is_placed = !is_repeated(c, unit, first, entry) && expert >= 0;
    return {entry, expert, is_placed, __ballot_sync(kFullMask, is_placed)};
}

EP_DEVICE Held load_row(const uint8_t* slot, uint32_t filler, int base, int end) {
    Held held;
#pragma unroll
    for (int i = 0; i < kReceiveUnroll; ++i) {
        const int idx = base + i * kWarpSize + prim::lane_idx();
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

EP_DEVICE uint32_t load_scale(const Params& p, const Unit& unit, const uint8_t* slot, uint32_t filler, int base) {
    const int word = base + prim::lane_idx();
    if (word >= unit.end_of(num_scale_words(p)) || slot == nullptr) return filler;
    const auto* scales = reinterpret_cast<const uint32_t*>(slot + p.call.message.scales.offset);
    return p.packs_scales ? packed_exponents(scales, word) : scales[word];
}

EP_DEVICE void load_slot(const Params& p, const Context& c, const Unit& unit, Token& token) {
    token.slot = c.slot(c.rank(), unit.source, unit.token);
    token.held = load_row(token.slot, 0, unit.first_of(num_vecs(p)), unit.end_of(num_vecs(p)));
    token.scale = load_scale(p, unit, token.slot, 0, unit.first_of(num_scale_words(p)));
}

EP_DEVICE void spoil_slot(Token& token) {
    token.scale = kSpoiled;
#pragma unroll
    for (Vec16& vec : token.held.vec) vec = spoiled_vec();
}

EP_DEVICE const uint64_t* slot_flag(const Context& c, const Unit& unit) {
    return c.watch.heap.token_full(c.rank(), c.bank, unit.source, unit.token);
}

// One warp; acquire: is the slot full?
EP_DEVICE bool look_at_slot(const Context& c, const Unit& unit) {
    return as_lane_0_says(prim::lane_idx() == 0 && is_set(c.watch, slot_flag(c, unit)));
}

// One warp; acquire. False: the source is left out.
EP_DEVICE bool wait_for_slot(const Context& c, const Unit& unit) {
    return as_lane_0_says(prim::lane_idx() == 0 &&
                          wait_for_source(c.call, c.watch, Stage::kRow, unit.source, slot_flag(c, unit)));
}

// One warp, after the source's table. A slot that is full is one of ours, so that it may be read before the entries say so.
EP_DEVICE Token begin_token(const Params& p, const Context& c, const Unit& unit, bool is_full) {
    Token token = {};
    token.num_tokens = c.num_tokens_of(unit.source);
    token.entry = load_entry(c, unit, 0);
    if (is_full || look_at_slot(c, unit)) load_slot(p, c, unit, token);
    return token;
}

// One warp: this share of the row, to the rows of all `lanes`. `row`: this lane's, of all experts' rows.
EP_DEVICE void store_row(const Params& p, uint32_t lanes, int row, int base, int end, const Held& held) {
#pragma unroll 1
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int64_t target_row = __shfl_sync(kFullMask, row, __ffs(static_cast<int>(rest)) - 1);
        auto* target = reinterpret_cast<Vec16*>(p.recv_x + target_row * row_bytes(p));
#pragma unroll
        for (int i = 0; i < kReceiveUnroll; ++i) {
            const int idx = base + i * kWarpSize + prim::lane_idx();
            if (idx < end) prim::store_streaming(target + idx, held.vec[i]);
        }
    }
}

EP_DEVICE void place_row(const Params& p, const Unit& unit, const Token& token, uint32_t lanes, int row) {
    constexpr int kStep = kReceiveUnroll * kWarpSize;
    const int begin = unit.first_of(num_vecs(p)), end = unit.end_of(num_vecs(p));
    store_row(p, lanes, row, begin, end, token.held);
#pragma unroll 1
    for (int base = begin + kStep; base < end; base += kStep)
        store_row(p, lanes, row, base, end, load_row(token.slot, token.held.vec[0].word[0], base, end));
}

// Scales stand word by word, each with those of all rows of its expert side by side.
EP_DEVICE void place_scales(const Params& p, const Context& c, const Unit& unit, const Token& token,
                            const Entries& entries, int row) {
    const int num_words = num_scale_words(p), num_rows = c.num_rows_of_expert();
    const int begin = unit.first_of(num_words), end = unit.end_of(num_words);
#pragma unroll 1
    for (int base = begin; base < end; base += kWarpSize) {
        const int word = base + prim::lane_idx();
        const uint32_t scale = base == begin ? token.scale : load_scale(p, unit, token.slot, token.scale, base);
#pragma unroll 1
        for (uint32_t rest = entries.placed; rest != 0; rest &= rest - 1) {
            const int lane = __ffs(static_cast<int>(rest)) - 1;
            const int expert = __shfl_sync(kFullMask, entries.expert, lane);
            const int row_of_expert = __shfl_sync(kFullMask, row, lane) - expert * num_rows;
            const int64_t column = static_cast<int64_t>(expert) * num_words + word;
            if (word < end) p.recv_scales[column * num_rows + row_of_expert] = scale;
        }
    }
}

// One warp, after find_counts: what these entries want of the token. `first`: which of its entries they are. False: a place
// is beyond the rows that its source has stated, and nothing is written.
EP_DEVICE bool place_entries(const Params& p, const Context& c, const Unit& unit, const Counts& counts, int first,
                             const Entries& entries, const Token& token) {
    int row = -1;
    bool is_stated = true;
    if (entries.expert >= 0) {
        const int before = counts.before(unit.source)[entries.expert];
        const int num_rows = counts.before(unit.source + 1)[entries.expert] - before;
        row = entries.expert * c.num_rows_of_expert() + before + place_of(entries.entry);
        is_stated = place_of(entries.entry) < num_rows;
    }
    if (!__all_sync(kFullMask, is_stated)) return false;
    if (const int k = first + prim::lane_idx(); unit.part == 0 && k < p.call.num_topk) {
        const int64_t idx = static_cast<int64_t>(unit.source) * p.call.num_max_tokens + unit.token;
        p.row_of_entry[idx * p.call.num_topk + k] = row;
        if (entries.is_placed) p.src_info[row] = unit.token;
    }
    if (entries.placed == 0) return true;
    place_scales(p, c, unit, token, entries, row);
    place_row(p, unit, token, entries.placed, row);
    return true;
}

// One warp: the rest of the token, once the counts are known. Of a token that does not exist combine learns that it has no
// rows. False: the call has failed, or does now, since a place in the table of the source cannot be true.
template <class Draw>
EP_DEVICE bool finish_token(const Params& p, const Context& c, const Unit& unit, const Counts& counts, Token& token,
                            const Draw& draw) {
    const bool exists = unit.token < token.num_tokens;
    bool is_right = true;
#pragma unroll 1
    for (int first = 0; first < p.call.num_topk; first += kWarpSize) {
        if (first > 0 && exists) token.entry = load_entry(c, unit, first);
        const Entries entries = choose_entries(c, unit, first, exists ? token.entry : -1);
        if (entries.placed != 0 && token.slot == nullptr) {
            if (wait_for_slot(c, unit)) {
                load_slot(p, c, unit, token);
            } else if (has_failed(c.watch)) {
                spoil_slot(token);
                is_right = false;
            }
        }
        draw();
        is_right &= place_entries(p, c, unit, counts, first, entries, token);
    }
    return is_right;
}

// This lane: how many rows the expert gets, and from whom.
EP_DEVICE void write_count(const Params& p, const Context& c, const Counts& counts, int expert) {
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

template <class Work> EP_DEVICE void for_experts_of_list(const Context& c, int list, const Work& work) {
#pragma unroll 1
    for (int expert = list * kWarpSize + prim::lane_idx(); expert < c.num_local_experts();
         expert += num_lists(c) * kWarpSize)
        work(expert);
}

// This lane's experts of the list have no rows.
EP_DEVICE void void_list(const Params& p, const Context& c, int list) {
    for_experts_of_list(c, list, [&](int expert) {
        p.recv_count[expert] = 0;
        for (int source = 0; source < c.num_ranks(); ++source)
            p.layout_range[static_cast<int64_t>(expert) * c.num_ranks() + source] = 0;
    });
}

// One warp. The call may fail meanwhile: whoever comes last of this one and void_lists makes the list void.
EP_DEVICE void write_list(const Params& p, const Context& c, const Block* block, const Counts& counts, int list) {
    for_experts_of_list(c, list, [&](int expert) { write_count(p, c, counts, expert); });
    __syncwarp();  // every lane's counts, lane 0's release
    uint32_t lists = 0;
    // Pairs with: void_lists, whichever is first.
    if (prim::lane_idx() == 0) lists = prim::fetch_or<Order::kRelease, Scope::kGpu>(&block->turn->lists, 1u << list);
    if ((__shfl_sync(kFullMask, lists, 0) & layout::LowLatencyTurn::kSpoiledLists) != 0) void_list(p, c, list);
}

// One warp of a call that has failed.
EP_DEVICE void void_lists(const Params& p, const Context& c, layout::LowLatencyTurn* turn) {
    constexpr uint32_t kSpoiledLists = layout::LowLatencyTurn::kSpoiledLists;
    uint32_t lists = 0;
    if (prim::lane_idx() == 0) lists = prim::fetch_or<Order::kAcquire, Scope::kGpu>(&turn->lists, kSpoiledLists);
    lists = __shfl_sync(kFullMask, lists, 0);
    __syncwarp();  // lane 0's acquire, every lane's stores
    if ((lists & kSpoiledLists) != 0) return;
    for (; lists != 0; lists &= lists - 1) void_list(p, c, __ffs(static_cast<int>(lists)) - 1);
}

// A warp that has met what makes the call fail. `knows_rows`: from tables that are right, so that each row is spoiled by the
// warp that it waits for. If not, all are spoiled. (Other blocks may just have seen all tables: a row is right or NaN.)
EP_DEVICE_COLD void spoil_outputs(const Params* p, Context c, layout::LowLatencyTurn* turn, bool knows_rows) {
    const int64_t num_rows = static_cast<int64_t>(c.num_local_experts()) * c.num_rows_of_expert();
    void_lists(*p, c, turn);
    if (knows_rows) return;
    spoil(turn, {p->recv_x, num_rows * row_bytes(*p) / 4}, {p->recv_scales, num_rows * num_scale_words(*p)});
}
// A trip to memory is as long as a barrier is short: the block learns the counts together, while the entries and slots of
// its first tokens are under way.
EP_DEVICE void receive(const Params& p, const Context& c, Block* block) {
    const int num_tokens = c.num_ranks() * p.call.num_max_tokens;
    const int num_parts = warps_for_item(num_tokens, kMaxWarpsForItem);
    const auto counts = Counts::make(c);
    bool knows_rows = true;  // the block
    bool is_right = true;    // this thread has met nothing that makes the call fail
    for_each_unit(c, block, num_tokens * num_parts + num_lists(c), [&](int idx, bool is_first, const auto& draw) {
        const Unit unit = unit_of(c, idx, num_parts);
        // Before the wait for the tables, which come last: one trip less after it.
        const bool is_full = unit.is_token && look_at_slot(c, unit);
        if (is_first) knows_rows = wait_for_tables(c, counts);
        Token token = {};
        if (knows_rows && unit.is_token && counts.is_here[unit.source] != 0) token = begin_token(p, c, unit, is_full);
        if (is_first && knows_rows) knows_rows = find_counts(c, counts);
        if (knows_rows && unit.is_token) is_right &= finish_token(p, c, unit, counts, token, draw);
        if (knows_rows && unit.is_list) write_list(p, c, block, counts, unit.list);
        if (!knows_rows && unit.is_list) void_list(p, c, unit.list);
    });
    if (__all_sync(kFullMask, knows_rows && is_right)) return;
    refuse_tables(c, counts);
    spoil_outputs(&p, c, block->turn, knows_rows);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::dispatch
