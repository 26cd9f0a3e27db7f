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

#include "kernels/low_latency/frame.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

EP_DEVICE int pack_entry(int expert, int place) { return expert << kPlaceBits | place; }
EP_DEVICE int expert_of(int entry) { return entry >> kPlaceBits; }  // -1 stays -1
EP_DEVICE int place_of(int entry) { return entry & ((1 << kPlaceBits) - 1); }

// One stretch of tokens, in dynamic shared memory.
struct TokenSets {
    uint32_t* words;  // [num_experts][num_words]
    int* counts;      // [num_experts], of the stretches before
    int* experts;     // [num_tokens() * num_topk], of the entries; -1: none
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
    EP_DEVICE int place(int expert, int idx) const {
        const uint32_t* set = words + expert * num_words;
        int place = counts[expert] + __popc(set[idx / 32] & ((1u << idx % 32) - 1u));
        for (int i = 0; i < idx / 32; ++i) place += __popc(set[i]);
        return place;
    }
};

// This rank's choice of experts, as the caller gave it.
struct Choice {
    Ids topk;
    int num_tokens;
};

EP_DEVICE int chosen_expert(const Context& c, const Choice& choice, int64_t entry) {
    return checked_expert(c, load_expert_id(choice.topk.ids, choice.topk.bytes, entry));
}

// Entries of the stretch that begins with token `first`.
EP_DEVICE int entries_of_stretch(const Context& c, const Choice& choice, const TokenSets& sets, int first) {
    const int rest = choice.num_tokens - first;
    return (rest < sets.num_tokens() ? rest : sets.num_tokens()) * c.call.num_topk;
}

// All threads of the block.
EP_DEVICE void fill_sets(const Context& c, const Choice& choice, int first, const TokenSets& sets) {
    constexpr int kAtOnce = 4;  // loads under way
    const int num_entries = entries_of_stretch(c, choice, sets, first);
    for (int i = first_of_block(); i < c.call.num_experts * sets.num_words; i += step_of_block()) sets.words[i] = 0;
    __syncthreads();
    for (int base = first_of_block(); base < num_entries; base += kAtOnce * step_of_block()) {
        int experts[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int entry = base + i * step_of_block();
            experts[i] = -1;
            if (entry < num_entries) experts[i] = chosen_expert(c, choice, int64_t{first} * c.call.num_topk + entry);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int entry = base + i * step_of_block();
            const int idx = entry / c.call.num_topk;
            if (entry < num_entries) sets.experts[entry] = experts[i];
            if (experts[i] >= 0)
                prim::fetch_or<Order::kRelaxed, Scope::kCta>(&sets.words[experts[i] * sets.num_words + idx / 32],
                                                             1u << idx % 32);
        }
    }
    __syncthreads();
}

// All threads of the block, before anything is known of the call: the first stretch.
EP_DEVICE void begin_routing_table(const Context& c, const Choice& choice, const TokenSets& sets) {
    for (int expert = first_of_block(); expert < c.call.num_experts; expert += step_of_block()) sets.counts[expert] = 0;
    fill_sets(c, choice, 0, sets);
}

// All threads of the block, after a barrier: adds the current stretch to the counts.
EP_DEVICE void count_sets(const Context& c, const TokenSets& sets) {
    for (int expert = first_of_block(); expert < c.call.num_experts; expert += step_of_block())
        for (int i = 0; i < sets.num_words; ++i) sets.counts[expert] += __popc(sets.words[expert * sets.num_words + i]);
}

EP_DEVICE int* table_at(const Context& c, int peer) {
    return reinterpret_cast<int*>(c.message(peer, c.rank()) + c.call.message.topk_idx.offset);
}

// All threads of the block that began the table: to every rank.
EP_DEVICE void send_routing_table(const Context& c, const Choice& choice, const TokenSets& sets) {
    for (int first = 0; first < choice.num_tokens; first += sets.num_tokens()) {
        if (first > 0) fill_sets(c, choice, first, sets);
        const int num_entries = entries_of_stretch(c, choice, sets, first);
        for (int i = first_of_block(); i < num_entries; i += step_of_block()) {
            const int expert = sets.experts[i];
            const int entry = expert < 0 ? -1 : pack_entry(expert, sets.place(expert, i / c.call.num_topk));
            for (int peer = 0; peer < c.num_ranks(); ++peer) table_at(c, peer)[first * c.call.num_topk + i] = entry;
        }
        __syncthreads();  // every place has been looked up
        count_sets(c, sets);
        __syncthreads();
    }
    for (int expert = first_of_block(); expert < c.call.num_experts; expert += step_of_block()) {
        const int peer = expert / c.num_local_experts();
        reinterpret_cast<int*>(c.message(peer, c.rank()) +
                               c.call.message.num_rows.offset)[expert % c.num_local_experts()] = sets.counts[expert];
    }
    publish_table(c, choice.num_tokens);
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

// All threads of the block, after wait_for_tables.
EP_DEVICE void find_counts(const Context& c, const Counts& counts) {
    constexpr int kAtOnce = 8;  // loads under way
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
                num_rows += held[i];
            }
        }
        counts.before(c.num_ranks())[expert] = num_rows;
    }
    __syncthreads();
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
