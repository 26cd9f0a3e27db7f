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
    int* chosen;      // [num_tokens() * num_topk]: expert and token of each entry, as in pack_entry; -1: none
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
};

// This rank's choice of experts, as the caller gave it.
struct Choice {
    Ids topk;
    int num_tokens;
};

constexpr int kEntriesAtOnce = 4;  // of a thread: the chain of each is long, and they do not depend on each other

struct Experts {
    int of[kEntriesAtOnce];
};

// Entries of the stretch that begins with token `first`.
EP_DEVICE int entries_of_stretch(const Context& c, const Choice& choice, const TokenSets& sets, int first) {
    const int rest = choice.num_tokens - first;
    return (rest < sets.num_tokens() ? rest : sets.num_tokens()) * c.call.num_topk;
}

// This thread's entries of the stretch from `base` on, one every step_of_block().
EP_DEVICE Experts load_experts(const Context& c, const Choice& choice, const TokenSets& sets, int first, int base) {
    const int num_entries = entries_of_stretch(c, choice, sets, first);
    Experts experts;
#pragma unroll
    for (int i = 0; i < kEntriesAtOnce; ++i) {
        const int entry = base + i * step_of_block();
        experts.of[i] = -1;
        if (entry < num_entries)
            experts.of[i] = checked_expert(
                c, load_expert_id(choice.topk.ids, choice.topk.bytes, int64_t{first} * c.call.num_topk + entry));
    }
    return experts;
}

EP_DEVICE void clear_sets(const Context& c, const TokenSets& sets) {
    for (int i = first_of_block(); i < c.call.num_experts * sets.num_words; i += step_of_block()) sets.words[i] = 0;
}

// All threads of the block, before anything is known of the call. A barrier must follow.
EP_DEVICE Experts begin_routing_table(const Context& c, const Choice& choice, const TokenSets& sets) {
    for (int expert = first_of_block(); expert < c.call.num_experts; expert += step_of_block()) sets.counts[expert] = 0;
    clear_sets(c, sets);
    return load_experts(c, choice, sets, 0, first_of_block());
}

// All threads of the block. `experts`: those of this thread's first entries.
EP_DEVICE void fill_sets(const Context& c, const Choice& choice, const TokenSets& sets, int first, Experts experts) {
    const int num_entries = entries_of_stretch(c, choice, sets, first);
#pragma unroll 1
    for (int base = first_of_block(); base < num_entries; base += kEntriesAtOnce * step_of_block()) {
        if (base != first_of_block()) experts = load_experts(c, choice, sets, first, base);
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i) {
            const int entry = base + i * step_of_block();
            const int idx = entry / c.call.num_topk;
            const int expert = experts.of[i];
            if (entry < num_entries) sets.chosen[entry] = expert < 0 ? -1 : pack_entry(expert, idx);
            if (expert >= 0)
                prim::fetch_or<Order::kRelaxed, Scope::kCta>(&sets.words[expert * sets.num_words + idx / 32],
                                                             1u << idx % 32);
        }
    }
    __syncthreads();
}

// Bits of the tokens before token `idx`, in word `word` of a set.
EP_DEVICE uint32_t tokens_before(int idx, int word) {
    const int count = idx - word * 32;
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1;
}

EP_DEVICE int* table_at(const Context& c, int peer) {
    return reinterpret_cast<int*>(c.message(peer, c.rank()) + c.call.message.topk_idx.offset);
}

// All threads of the block, after fill_sets: the stretch's part of the table, to every rank.
EP_DEVICE void send_entries(const Context& c, const Choice& choice, const TokenSets& sets, int first) {
    const int num_entries = entries_of_stretch(c, choice, sets, first);
#pragma unroll 1
    for (int base = first_of_block(); base < num_entries; base += kEntriesAtOnce * step_of_block()) {
        int chosen[kEntriesAtOnce], expert[kEntriesAtOnce], place[kEntriesAtOnce];
#pragma unroll
        for (int i = 0; i < kEntriesAtOnce; ++i) {
            const int entry = base + i * step_of_block();
            chosen[i] = entry < num_entries ? sets.chosen[entry] : -1;
            expert[i] = chosen[i] < 0 ? 0 : expert_of(chosen[i]);
            place[i] = sets.counts[expert[i]];
        }
#pragma unroll 1
        for (int word = 0; word < sets.num_words; ++word)
#pragma unroll
            for (int i = 0; i < kEntriesAtOnce; ++i)
                place[i] +=
                    __popc(sets.words[expert[i] * sets.num_words + word] & tokens_before(place_of(chosen[i]), word));
#pragma unroll 1
        for (int peer = 0; peer < c.num_ranks(); ++peer) {
            int* table = table_at(c, peer) + first * c.call.num_topk;
#pragma unroll
            for (int i = 0; i < kEntriesAtOnce; ++i)
                if (const int entry = base + i * step_of_block(); entry < num_entries)
                    table[entry] = chosen[i] < 0 ? -1 : pack_entry(expert[i], place[i]);
        }
    }
}

// All threads of the block, after fill_sets: the expert's tokens, with those of the stretches before.
EP_DEVICE int count_set(const TokenSets& sets, int expert) {
    int count = sets.counts[expert];
    for (int word = 0; word < sets.num_words; ++word) count += __popc(sets.words[expert * sets.num_words + word]);
    return count;
}

// All threads of the block that began the table: to every rank. `experts`: what that gave.
EP_DEVICE void send_routing_table(const Context& c, const Choice& choice, const TokenSets& sets, Experts experts) {
    int first = 0;
    fill_sets(c, choice, sets, first, experts);
    send_entries(c, choice, sets, first);
#pragma unroll 1
    for (; first + sets.num_tokens() < choice.num_tokens;) {
        __syncthreads();  // every place of the stretch has been looked up
        for (int expert = first_of_block(); expert < c.call.num_experts; expert += step_of_block())
            sets.counts[expert] = count_set(sets, expert);
        __syncthreads();
        clear_sets(c, sets);
        __syncthreads();
        first += sets.num_tokens();
        fill_sets(c, choice, sets, first, load_experts(c, choice, sets, first, first_of_block()));
        send_entries(c, choice, sets, first);
    }
    for (int expert = first_of_block(); expert < c.call.num_experts; expert += step_of_block()) {
        const int peer = expert / c.num_local_experts();
        auto* num_rows = reinterpret_cast<int*>(c.message(peer, c.rank()) + c.call.message.num_rows.offset);
        num_rows[expert % c.num_local_experts()] = count_set(sets, expert);
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
