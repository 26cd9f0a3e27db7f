// The routing table of a dispatch, as its sender makes it: who gets which token, and where.
//
// An entry is an expert's id and the token's place among all tokens of this source for that expert, in one word; -1: none.
// A token that names an expert twice has one place, and both entries say so. Each receiver also gets the number of tokens
// for each of its experts. So it finds the row of any entry without a look at the other entries: the rows of the sources
// before, plus the place.
//
// Places are counted in sets: for each expert a bit for each token of a stretch of tokens. The place is the number of bits
// below one's own, after the count of the stretches before.
#pragma once

#include "device/algo/group.h"
#include "kernels/low_latency/turn.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

EP_DEVICE int pack_entry(int expert, int place) { return expert << kPlaceBits | place; }
EP_DEVICE int expert_of(int entry) { return entry >> kPlaceBits; }  // -1 stays -1
EP_DEVICE int place_of(int entry) { return entry & ((1 << kPlaceBits) - 1); }

// One stretch of tokens, in dynamic shared memory.
struct TokenSets {
    uint32_t* words;  // [num_experts][num_words]
    int* counts;      // [num_experts], with those of the stretches before
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

// The warps that make the table: all of their block but the first, which begins the send phase meanwhile.
class TableCrew {
public:
    EP_DEVICE TableCrew() : num_others_(num_warps() > 1 ? kWarpSize : 0) {}
    EP_DEVICE bool is_mine() const { return first() >= 0; }
    EP_DEVICE int first() const { return first_of_block() - num_others_; }
    EP_DEVICE int step() const { return step_of_block() - num_others_; }
    EP_DEVICE void sync() const {
        constexpr int kBarrier = 1;
        prim::barrier_sync(kBarrier, step());
    }

private:
    int num_others_;
};

// This rank's choice of experts, as the caller gave it.
struct Choice {
    Ids topk;
    int num_tokens;
};

// Entries of the stretch that begins with token `first`.
EP_DEVICE int entries_of_stretch(const Context& c, const Choice& choice, const TokenSets& sets, int first) {
    const int rest = choice.num_tokens - first;
    return (rest < sets.num_tokens() ? rest : sets.num_tokens()) * c.call.num_topk;
}

constexpr int kEntriesAtOnce = 4;  // of a thread: the chain of each is long, and they do not depend on each other

// The crew: `work(base)` for this thread's next entries: base, base + crew.step() and so on, kEntriesAtOnce of them.
template <class Work> EP_DEVICE void for_entries(const TableCrew& crew, int num_entries, const Work& work) {
#pragma unroll 1
    for (int base = crew.first(); base < num_entries; base += kEntriesAtOnce * crew.step()) work(base);
}

// The crew: a bit in the expert's set for each token; in sets.entries the expert and the token's number in the stretch.
EP_DEVICE void fill_sets(const Context& c, const Choice& choice, const TokenSets& sets, const TableCrew& crew,
                         int first) {
    const int num_entries = entries_of_stretch(c, choice, sets, first);
    for_entries(crew, num_entries, [&](int base) {
        int experts[kEntriesAtOnce];
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i) {
            const int entry = base + i * crew.step();
            experts[i] = -1;
            if (entry < num_entries)
                experts[i] = checked_expert(
                    c, load_expert_id(choice.topk.ids, choice.topk.bytes, int64_t{first} * c.call.num_topk + entry));
        }
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i) {
            const int entry = base + i * crew.step();
            const int idx = entry / c.call.num_topk;
            if (entry < num_entries) sets.entries[entry] = experts[i] < 0 ? -1 : pack_entry(experts[i], idx);
            if (experts[i] >= 0)
                prim::fetch_or<Order::kRelaxed, Scope::kCta>(&sets.words[experts[i] * sets.num_words + idx / 32],
                                                             1u << idx % 32);
        }
    });
}

// The crew, after fill_sets: the token's number becomes its place. Each thread has its own entries, as in fill_sets.
EP_DEVICE void find_places(const Context& c, const Choice& choice, const TokenSets& sets, const TableCrew& crew,
                           int first) {
    const int num_entries = entries_of_stretch(c, choice, sets, first);
    for_entries(crew, num_entries, [&](int base) {
        int chosen[kEntriesAtOnce], places[kEntriesAtOnce];
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i) {
            const int entry = base + i * crew.step();
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
            if (chosen[i] >= 0) sets.entries[base + i * crew.step()] = pack_entry(expert_of(chosen[i]), places[i]);
    });
}

// The crew: the part of the table that the stretch is, in shared memory.
EP_DEVICE void make_stretch(const Context& c, const Choice& choice, const TokenSets& sets, const TableCrew& crew,
                            int first) {
    for (int i = crew.first(); i < c.call.num_experts * sets.num_words; i += crew.step()) sets.words[i] = 0;
    if (first == 0)
        for (int expert = crew.first(); expert < c.call.num_experts; expert += crew.step()) sets.counts[expert] = 0;
    crew.sync();
    fill_sets(c, choice, sets, crew, first);
    crew.sync();
    find_places(c, choice, sets, crew, first);
    crew.sync();
    for (int expert = crew.first(); expert < c.call.num_experts; expert += crew.step())
        for (int word = 0; word < sets.num_words; ++word)
            sets.counts[expert] += __popc(sets.words[expert * sets.num_words + word]);
}

// All threads of the block: a stretch, to every rank.
EP_DEVICE void send_stretch(const Context& c, const Block* block, const Choice& choice, const TokenSets& sets,
                            int first) {
    const int num_entries = entries_of_stretch(c, choice, sets, first);
    for (int peer = 0; peer < c.num_ranks(); ++peer) {
        if (block->leaves_out(c.call, peer)) continue;
        int* table = reinterpret_cast<int*>(c.message(peer, c.rank()) + c.call.message.topk_idx.offset);
        for (int i = first_of_block(); i < num_entries; i += step_of_block())
            table[first * c.call.num_topk + i] = sets.entries[i];
    }
}

// All threads of the block, whose crew has made the first stretch: the table, to every rank.
EP_DEVICE void send_routing_table(const Context& c, const Block* block, const Choice& choice, const TokenSets& sets,
                                  const TableCrew& crew) {
    send_stretch(c, block, choice, sets, 0);
#pragma unroll 1
    for (int first = sets.num_tokens(); first < choice.num_tokens; first += sets.num_tokens()) {
        __syncthreads();  // the stretch before has been sent
        if (crew.is_mine()) make_stretch(c, choice, sets, crew, first);
        __syncthreads();
        send_stretch(c, block, choice, sets, first);
    }
    for (int peer = 0; peer < c.num_ranks(); ++peer) {
        if (block->leaves_out(c.call, peer)) continue;
        auto* num_rows = reinterpret_cast<int*>(c.message(peer, c.rank()) + c.call.message.num_rows.offset);
        for (int expert = first_of_block(); expert < c.num_local_experts(); expert += step_of_block())
            num_rows[expert] = sets.counts[peer * c.num_local_experts() + expert];
    }
    publish_table(c, block, choice.num_tokens);
}

// What a block learns from the tables of all sources, once; in dynamic shared memory, where TokenSets has been.
struct Counts {
    int* is_here;  // [num_ranks]: the source's table counts in this call
    int* rows;     // [num_ranks + 1][num_local_experts]: rows of the expert from the sources before
    int num_local_experts;

    static EP_DEVICE Counts make(const Context& c) {
        auto* is_here = static_cast<int*>(prim::dynamic_shared());
        return {is_here, is_here + c.num_ranks(), c.num_local_experts()};
    }
    static int bytes(const LowLatencyCall& call) {
        return (call.heap.num_ranks + (call.heap.num_ranks + 1) * call.num_local_experts) *
               static_cast<int>(sizeof(int));
    }
    EP_DEVICE int* before(int source) const { return rows + source * num_local_experts; }
};

// All threads of the block; acquire: which tables count in this call. One thread waits for a table: if every warp did for
// itself, they would crowd the flag. False: the call has failed.
EP_DEVICE bool wait_for_tables(const Context& c, const Counts& counts) {
    bool is_lost = false;
#pragma unroll 1
    for (int source = first_of_block(); source < c.num_ranks(); source += step_of_block()) {
        const bool is_here = wait_for_table(c, source);
        is_lost |= !is_here && has_failed(c.watch);
        counts.is_here[source] = is_here ? 1 : 0;
    }
    return !algo::any(algo::Block{}, is_lost);  // one thread's acquire, the block's reads
}

// All threads of the block, after wait_for_tables. False: some table states a number that cannot be true, and the call has
// failed: in every block, since all read the same.
EP_DEVICE bool find_counts(const Context& c, const Counts& counts) {
    constexpr int kAtOnce = 8;  // loads under way
    const int most = c.call.num_max_tokens;
    bool is_lie = false;  // some number cannot be true
    // By the threads with the fewest experts: this trip to memory comes beside that for the counts, not before it.
#pragma unroll 1
    for (int source = step_of_block() - 1 - first_of_block(); source < c.num_ranks(); source += step_of_block())
        is_lie |= counts.is_here[source] != 0 && !may_be(c.num_tokens_of(source), most);
#pragma unroll 1
    for (int expert = first_of_block(); expert < c.num_local_experts(); expert += step_of_block()) {
        int num_rows = 0;
#pragma unroll 1
        for (int first = 0; first < c.num_ranks(); first += kAtOnce) {
            int held[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                held[i] =
                    first + i < c.num_ranks() && counts.is_here[first + i] != 0 ? c.row_counts(first + i)[expert] : 0;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (first + i < c.num_ranks()) counts.before(first + i)[expert] = num_rows;
                is_lie |= !may_be(held[i], most);
                num_rows += held[i];
            }
        }
        counts.before(c.num_ranks())[expert] = num_rows;
    }
    return !algo::any(algo::Block{}, is_lie);
}

// One thread: fails the call with the first number in the table of `source` that cannot be true. True: there is one.
EP_DEVICE bool refuse_table(const Context& c, const Counts& counts, int source) {
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

// One warp of a call that has failed, perhaps by such a number: says so, if there is one. The tables are those of this call
// until the launch ends.
EP_DEVICE_COLD void refuse_tables(Context c, Counts counts) {
    if (prim::lane_idx() == 0)
        for (int source = 0; source < c.num_ranks(); ++source)
            if (counts.is_here[source] != 0 && refuse_table(c, counts, source)) return;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
