// The routing table of a dispatch, as its sender makes it: who gets which token, and where.
//
// An entry is an expert's id and the token's place among all tokens of this source for that expert, in one word; -1: none.
// A token that names an expert twice has one place, and both entries say so. Each receiver also gets the number of tokens
// for each of its experts. So it finds the row of any entry without a look at the other entries: the rows of the sources
// before, plus the place.
//
// Places are counted in sets: for each expert a bit for each token of a tile of tokens. The place is the number of bits below
// one's own, after the count of the tiles before.
#pragma once

#include "device/algo/group.h"
#include "kernels/low_latency/launch_session.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

EP_DEVICE int pack_entry(int expert, int place) { return expert << kPlaceBits | place; }
EP_DEVICE int expert_of(int entry) { return entry >> kPlaceBits; }  // -1 stays -1
EP_DEVICE int place_of(int entry) { return entry & ((1 << kPlaceBits) - 1); }

// One tile of tokens, in dynamic shared memory.
struct TokenSets {
    uint32_t* words;  // [num_experts][num_words]
    int* counts;      // [num_experts], with those of the tiles before
    int* entries;     // [num_tokens() * num_topk], of the table
    int num_words;

    static EP_DEVICE TokenSets make(int num_experts, int num_words) {
        auto* words = static_cast<uint32_t*>(prim::dynamic_shared());
        auto* counts = reinterpret_cast<int*>(words + num_experts * num_words);
        return {words, counts, counts + num_experts, num_words};
    }
    static int bytes(int num_experts, int num_words, int num_topk) {
        return (num_experts * (num_words + 1) + 32 * num_words * num_topk) * static_cast<int>(sizeof(int));
    }
    EP_DEVICE int num_tokens() const { return 32 * num_words; }
    // Tokens of the set in one word that come before token `idx`.
    EP_DEVICE int count_before(int expert, int idx, int word) const {
        const int rest = idx - word * 32;
        const uint32_t before = rest >= 32 ? 0xffffffffu : rest <= 0 ? 0u : (1u << rest) - 1;
        return __popc(words[expert * num_words + word] & before);
    }
};

// This rank's choice of experts, as the caller gave it.
struct Choice {
    Ids topk;
    int num_tokens;
};

// Entries of the tile that begins with token `first`.
EP_DEVICE int entries_of_tile(const CallContext& c, const Choice& choice, const TokenSets& sets, int first) {
    const int rest = choice.num_tokens - first;
    return (rest < sets.num_tokens() ? rest : sets.num_tokens()) * c.call.num_topk;
}

constexpr int kEntriesAtOnce = 4;  // of a thread: the chain of each is long, and they do not depend on each other

// `work(base)` for this thread's next entries: base, base + block.size() and so on, kEntriesAtOnce of them.
template <class Work> EP_DEVICE void for_entries(Block block, int num_entries, const Work& work) {
    block.expect();
#pragma unroll 1
    for (int base = block.thread_rank(); base < num_entries; base += kEntriesAtOnce * block.size()) work(base);
}

// A bit in the expert's set for each token; in sets.entries the expert and the token's number in the tile.
EP_DEVICE void fill_sets(Block block, const CallContext& c, const Choice& choice, const TokenSets& sets, int first) {
    const int num_entries = entries_of_tile(c, choice, sets, first);
    for_entries(block, num_entries, [&](int base) {
        int experts[kEntriesAtOnce];
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i) {
            const int entry = base + i * block.size();
            experts[i] = -1;
            if (entry < num_entries)
                experts[i] = checked_expert(c, algo::load_expert_id(choice.topk.ids, choice.topk.bytes,
                                                                    int64_t{first} * c.call.num_topk + entry));
        }
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i) {
            const int entry = base + i * block.size();
            const int idx = c.call.by_topk.quotient(entry);
            if (entry < num_entries) sets.entries[entry] = experts[i] < 0 ? -1 : pack_entry(experts[i], idx);
            if (experts[i] >= 0)
                prim::fetch_or<Order::kRelaxed, Scope::kCta>(&sets.words[experts[i] * sets.num_words + idx / 32],
                                                             1u << idx % 32);
        }
    });
}

// After fill_sets: the token's number becomes its place. Each thread has its own entries, as in fill_sets.
EP_DEVICE void find_places(Block block, const CallContext& c, const Choice& choice, const TokenSets& sets, int first) {
    const int num_entries = entries_of_tile(c, choice, sets, first);
    for_entries(block, num_entries, [&](int base) {
        int chosen[kEntriesAtOnce], places[kEntriesAtOnce];
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i) {
            const int entry = base + i * block.size();
            chosen[i] = entry < num_entries ? sets.entries[entry] : -1;
            places[i] = chosen[i] < 0 ? 0 : sets.counts[expert_of(chosen[i])];
        }
#pragma unroll 1
        for (int word = 0; word < sets.num_words; ++word)
#pragma unroll
            for (int i = 0; i < kEntriesAtOnce; ++i)
                if (chosen[i] >= 0) places[i] += sets.count_before(expert_of(chosen[i]), place_of(chosen[i]), word);
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i)
            if (chosen[i] >= 0) sets.entries[base + i * block.size()] = pack_entry(expert_of(chosen[i]), places[i]);
    });
}

// The part of the table that the tile is, in shared memory.
EP_DEVICE void make_tile(Block block, const CallContext& c, const Choice& choice, const TokenSets& sets, int first) {
    algo::for_each(block, c.call.num_experts * sets.num_words, [&](int i) { sets.words[i] = 0; });
    if (first == 0) algo::for_each(block, c.call.num_experts, [&](int expert) { sets.counts[expert] = 0; });
    block.sync();
    fill_sets(block, c, choice, sets, first);
    block.sync();
    find_places(block, c, choice, sets, first);
    block.sync();
    algo::for_each(block, c.call.num_experts, [&](int expert) {
        for (int word = 0; word < sets.num_words; ++word)
            sets.counts[expert] += __popc(sets.words[expert * sets.num_words + word]);
    });
}

// A tile, to every rank.
EP_DEVICE void send_tile(Block block, const CallContext& c, const SendPhase<Tells::kAtEnd>& phase, const Choice& choice,
                         const TokenSets& sets, int first) {
    const int num_entries = entries_of_tile(c, choice, sets, first);
    phase.for_tables([&](uint8_t* message) {
        int* table = reinterpret_cast<int*>(message + c.call.message.topk_idx.offset);
        algo::for_each(block, num_entries, [&](int i) { table[first * c.call.num_topk + i] = sets.entries[i]; });
    });
}

// To each rank those of its experts; across nodes those of all.
EP_DEVICE void send_counts(Block block, const CallContext& c, const SendPhase<Tells::kAtEnd>& phase,
                           const TokenSets& sets) {
    const auto counts_of = [&](uint8_t* message) {
        return reinterpret_cast<int*>(message + c.call.message.num_rows.offset);
    };
    if constexpr (kAcrossNodes) {
        phase.for_tables([&](uint8_t* message) {
            algo::for_each(block, c.call.num_experts,
                           [&](int expert) { counts_of(message)[expert] = sets.counts[expert]; });
        });
    } else {
        for (int peer = 0; peer < c.num_ranks(); ++peer) {
            if (phase.leaves_out(peer)) continue;
            int* num_rows = counts_of(c.message(peer, c.rank()));
            algo::for_each(block, c.num_local_experts(),
                           [&](int expert) { num_rows[expert] = sets.counts[peer * c.num_local_experts() + expert]; });
        }
    }
}

// The block that has made the first tile: the table, to every rank.
EP_DEVICE void send_routing_table(Block block, const CallContext& c, const SendPhase<Tells::kAtEnd>& phase,
                                  const Choice& choice, const TokenSets& sets) {
    send_tile(block, c, phase, choice, sets, 0);
#pragma unroll 1
    for (int first = sets.num_tokens(); first < choice.num_tokens; first += sets.num_tokens()) {
        make_tile(block, c, choice, sets, first);  // its first barrier comes before any entry is overwritten
        block.sync();
        send_tile(block, c, phase, choice, sets, first);
    }
    send_counts(block, c, phase, sets);
    phase.publish_table(block, choice.num_tokens);
}

// What a block learns from the tables of all sources, once; in dynamic shared memory, where TokenSets has been.
struct Counts {
    int* is_here;  // [num_ranks]: the source's table counts in this call
    int* rows;     // [num_ranks + 1][num_local_experts]: rows of the expert from the sources before
    int num_local_experts;

    static EP_DEVICE Counts make(const CallContext& c) {
        auto* is_here = static_cast<int*>(prim::dynamic_shared());
        return {is_here, is_here + c.num_ranks(), c.num_local_experts()};
    }
    static int bytes(const LowLatencyCall& call) {
        const int num_ranks = call.heap.num_nodes * call.heap.num_ranks;
        return (num_ranks + (num_ranks + 1) * call.num_local_experts) * static_cast<int>(sizeof(int));
    }
    EP_DEVICE int* before(int source) const { return rows + source * num_local_experts; }
};

// Notes whether the table of `source` counts in this call. Acquire. True: this thread has found that the call has failed.
EP_DEVICE bool note_table(const CallContext& c, const Counts& counts, int source, bool is_seen) {
    const bool is_here = is_seen || wait_for_table(c, source);
    counts.is_here[source] = is_here ? 1 : 0;
    return !is_here && has_failed(c.watch);
}

// The flags that a block looks at when it begins to receive, each lane at one, so that all are one trip to memory. In a launch
// that only receives the number of the call is not known yet: they are those of both banks. Two lanes have the slot of the
// warp's first token; the others, of all warps together, have tables.
constexpr int kSlotLanes = layout::kNumLowLatencyBanks;

struct EarlyLook {
    uint64_t seen;  // this lane's flag; 0: none
};

// Of all tables in both banks, the one that is this lane's; below zero: none.
EP_DEVICE int early_table(Warp warp) {
    const int lane = warp.thread_rank() - kSlotLanes;
    return lane < 0 ? -1 : prim::warp_idx() * (kWarpSize - kSlotLanes) + lane;
}

EP_DEVICE const uint64_t* table_flag(const CallContext& c, int table) {
    constexpr int kNumBanks = layout::kNumLowLatencyBanks;
    return c.table_flag(table % kNumBanks, table / kNumBanks);
}

// After that look. Acquire: which tables count in this call. One thread waits for a table: if every warp did for itself, they
// would crowd the flag. A barrier must follow. True: this thread has found that the call has failed.
EP_DEVICE bool wait_for_tables(Block block, const CallContext& c, const Counts& counts, BlockRole& role,
                               EarlyLook early) {
    block.expect();
    constexpr int kNumBanks = layout::kNumLowLatencyBanks;
    const int first = early_table(Warp{}), num_tables = c.num_ranks() * kNumBanks;
    bool is_lost = false;
#pragma unroll 1
    for (int table = first; table >= 0 && table < num_tables; table += block.num_warps() * (kWarpSize - kSlotLanes)) {
        if (table % kNumBanks != c.bank) continue;
        // Where a source may be left out, one thread of the device decides.
        const bool is_seen = table == first && early.seen == c.watch.call && !c.call.is_shrinkable;
        is_lost |= note_table(c, counts, table / kNumBanks, is_seen);
    }
    // A hint for watch_slot, when every lane has its tables.
    if (prim::warp_idx() == 0 && (__any_sync(kFullMask, is_lost) != 0 || Warp::thread_rank() == 0))
        prim::fetch_or<Order::kRelaxed, Scope::kCta>(&role.knows_tables, 1);
    return is_lost;
}

constexpr int kCountsAtOnce = 8;  // loads under way

// Rows for one expert from kCountsAtOnce sources.
struct SourceCounts {
    int rows[kCountsAtOnce];
};

// After wait_for_tables.
EP_DEVICE SourceCounts load_counts(const CallContext& c, const Counts& counts, int expert, int first_source) {
    SourceCounts found;
#pragma unroll
    for (int i = 0; i < kCountsAtOnce; ++i) {
        const int source = first_source + i;
        found.rows[i] = expert < c.num_local_experts() && source < c.num_ranks() && counts.is_here[source] != 0
                            ? c.row_counts(source)[expert]
                            : 0;
    }
    return found;
}

// `ahead`: load_counts of this thread's first expert. False: some table states a number that cannot be true, and the call has
// failed: in every block, since all read the same.
EP_DEVICE bool find_counts(Block block, const CallContext& c, const Counts& counts, const SourceCounts& ahead) {
    block.expect();
    const int most = c.call.num_max_tokens;
    bool is_lie = false;  // some number cannot be true
    // By the threads with the fewest experts: this trip to memory comes beside that for the counts, not before it.
#pragma unroll 1
    for (int source = block.size() - 1 - block.thread_rank(); source < c.num_ranks(); source += block.size())
        is_lie |= counts.is_here[source] != 0 && !may_be(c.num_tokens_of(source), most);
#pragma unroll 1
    for (int expert = block.thread_rank(); expert < c.num_local_experts(); expert += block.size()) {
        int num_rows = 0;
#pragma unroll 1
        for (int first = 0; first < c.num_ranks(); first += kCountsAtOnce) {
            const bool is_ahead = first == 0 && expert == block.thread_rank();
            const SourceCounts found = is_ahead ? ahead : load_counts(c, counts, expert, first);
#pragma unroll
            for (int i = 0; i < kCountsAtOnce; ++i) {
                if (first + i < c.num_ranks()) counts.before(first + i)[expert] = num_rows;
                is_lie |= !may_be(found.rows[i], most);
                num_rows += found.rows[i];
            }
        }
        counts.before(c.num_ranks())[expert] = num_rows;
    }
    return !any(block, is_lie);
}

// Fails the call with the first number in the table of `source` that cannot be true. True: there is one.
EP_DEVICE bool refuse_table(const CallContext& c, const Counts& counts, int source) {
    const int num_tokens = c.num_tokens_of(source), most = c.call.num_max_tokens;
    int stated = num_tokens, limit = most;
    for (int i = 0; i < c.num_local_experts() && may_be(stated, limit); ++i) stated = c.row_counts(source)[i];
    for (int i = 0; i < num_tokens * c.call.num_topk && may_be(stated, limit); ++i) {
        const int entry = c.table(source)[i], expert = local_expert(c, expert_of(entry));
        if (expert < 0) continue;
        stated = place_of(entry);
        limit = counts.before(source + 1)[expert] - counts.before(source)[expert] - 1;
    }
    if (may_be(stated, limit)) return false;
    algo::fail(c.watch, layout::FailureKind::kBadInput, {Stage::kStated, source}, static_cast<uint64_t>(limit),
               static_cast<uint64_t>(stated), 0);
    return true;
}

// In a call that has failed, perhaps by such a number: says so, if there is one. The tables are those of this call until the
// launch ends.
EP_DEVICE_COLD void refuse_tables(CallContext c, Counts counts) {
    for (int source = 0; source < c.num_ranks(); ++source)
        if (counts.is_here[source] != 0 && refuse_table(c, counts, source)) return;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
