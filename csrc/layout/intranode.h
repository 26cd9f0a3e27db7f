// The symmetric heap of one node: control words, then the data regions of the high-throughput mode (declared here) and
// of the low-latency mode. Equal on every rank.
//
// Protocol and picture: docs/protocols/intranode.md.
#pragma once

#include <cstdint>

#include "layout/field.h"
#include "layout/low_latency.h"

namespace deep_ep::layout {

constexpr int kNumBanks = 2;            // calls alternate between the banks
constexpr int kMaxWindow = 4096;        // slots of one source in one bank, at most
constexpr int kMaxLocalExperts = 1024;  // experts of one rank, at most
constexpr int kMaxTokens = 1 << 24;     // tokens of one rank in one call, less one: see make_tag
constexpr uint64_t kHeapAlignment = 128;
constexpr int kMaxRanks = 128;  // whose heaps are mapped here: their addresses travel with every launch

// A flag says which row of which call it speaks of, so that it never needs clearing: flags only grow.
constexpr uint64_t make_tag(uint64_t call, uint64_t position) { return call << 24 | (position + 1); }

// A count on its way to a peer. The call that it belongs to stands in the same word, so that it needs no flag and no order.
constexpr uint64_t make_count(uint64_t call, int count) { return call << 32 | static_cast<uint32_t>(count); }
constexpr bool is_count_of(uint64_t word, uint64_t call) { return word >> 32 == (call & 0xffffffffu); }
constexpr int count_in(uint64_t word) { return static_cast<int>(static_cast<uint32_t>(word)); }

// What a rank lends to its peers for one call, as offsets into its heap (0: not lent). A dispatch lends its outputs, and
// peers write rows where they stay; a combine lends its input, and peers read rows where they stand.
struct Loan {
    uint64_t x = 0;
    uint64_t scales = 0;
    uint64_t topk_idx = 0;
    uint64_t topk_weights = 0;
    uint64_t src_idx = 0;
    uint64_t num_rows = 0;  // that the memory at each of these has room for
};

// Words that ranks write into each other's memory to coordinate. [x][y] is row-major.
struct ControlLayout {
    Field started;        // u64[R]: the last call that this source has entered; written by the source
    Field abort;          // u64[1]: not zero: some rank gave up (AbortCode)
    Field rank_counts;    // u64[banks][R][R]: tokens that source i sends to each rank, as make_count writes them
    Field expert_counts;  // u64[banks][R][kMaxLocalExperts]: entries that source i has for our experts, likewise
    Field full;           // u64[banks][R][kMaxWindow]: the row that source i has put into this slot of ours
    Field empty;          // u64[banks][R][kMaxWindow]: the row of ours that rank i has taken out of this slot of its
    Field loan_flags;     // u64[banks][R]: the call whose loan this lender has stated
    Field loans;          // Loan[banks][R]: by lender
    Field weight_flags;   // u64[R]: the last call of which this lender's weights can be read
    Field returned;       // u64[R]: the last call in which this borrower has done with our loan
    LowLatencyControl low_latency;
    uint64_t bytes = 0;

    static constexpr ControlLayout make(uint64_t num_ranks) {
        ControlLayout layout;
        FieldCursor cursor;
        layout.started = cursor.take(8, num_ranks, kHeapAlignment);
        layout.abort = cursor.take(8, 1, kHeapAlignment);
        layout.rank_counts = cursor.take(8, kNumBanks * num_ranks * num_ranks, kHeapAlignment);
        layout.expert_counts = cursor.take(8, kNumBanks * num_ranks * kMaxLocalExperts, kHeapAlignment);
        layout.full = cursor.take(8, kNumBanks * num_ranks * kMaxWindow, kHeapAlignment);
        layout.empty = cursor.take(8, kNumBanks * num_ranks * kMaxWindow, kHeapAlignment);
        layout.loan_flags = cursor.take(8, kNumBanks * num_ranks, kHeapAlignment);
        layout.loans = cursor.take(sizeof(Loan), kNumBanks * num_ranks, kHeapAlignment);
        layout.weight_flags = cursor.take(8, num_ranks, kHeapAlignment);
        layout.returned = cursor.take(8, num_ranks, kHeapAlignment);
        layout.low_latency = LowLatencyControl::make(cursor, num_ranks);
        layout.bytes = cursor.total(4096);
        return layout;
    }
};

// One token on its way: its row, then 4-byte metadata words.
struct SlotLayout {
    Field row;           // bytes
    Field src_idx;       // i32[0..1]: index of the token at its source
    Field topk_idx;      // i32[K]: local expert ids, -1: not here
    Field topk_weights;  // f32[K]
    Field scales;        // any 4-byte type [num_scales]
    uint64_t bytes = 0;

    static constexpr SlotLayout make(uint64_t row_bytes, bool has_src_idx, uint64_t num_topk, bool has_weights,
                                     uint64_t num_scales) {
        SlotLayout layout;
        FieldCursor cursor;
        layout.row = cursor.take(1, row_bytes, 16);
        layout.src_idx = cursor.take(4, has_src_idx ? 1 : 0, 4);
        layout.topk_idx = cursor.take(4, has_src_idx ? num_topk : 0, 4);
        layout.topk_weights = cursor.take(4, has_weights ? num_topk : 0, 4);
        layout.scales = cursor.take(4, num_scales, 4);
        layout.bytes = cursor.total(kHeapAlignment);
        return layout;
    }
    static constexpr SlotLayout for_dispatch(uint64_t row_bytes, uint64_t num_topk, uint64_t num_scales) {
        return make(row_bytes, true, num_topk, true, num_scales);
    }
    static constexpr SlotLayout for_combine(uint64_t row_bytes, uint64_t num_topk) {
        return make(row_bytes, false, num_topk, true, 0);
    }
};

// How the data region is cut for one call: banks x (R - 1) sources x window slots. A rank keeps no slots for itself.
struct WindowLayout {
    uint64_t bank_bytes = 0;
    uint64_t source_bytes = 0;
    uint64_t slot_bytes = 0;
    int window = 0;  // slots of one source in one bank; 0: the region is too small

    static constexpr WindowLayout make(uint64_t data_bytes, uint64_t num_ranks, uint64_t slot_bytes) {
        WindowLayout layout;
        layout.slot_bytes = slot_bytes;
        if (num_ranks < 2) return layout;
        layout.bank_bytes = data_bytes / kNumBanks / kHeapAlignment * kHeapAlignment;
        const uint64_t fitting = layout.bank_bytes / ((num_ranks - 1) * slot_bytes);
        layout.window = static_cast<int>(fitting < kMaxWindow ? fitting : kMaxWindow);
        layout.source_bytes = static_cast<uint64_t>(layout.window) * slot_bytes;
        return layout;
    }
    // Where `owner` keeps the slots of `source`, from the start of its data region.
    constexpr uint64_t slot_offset(uint64_t bank, uint64_t owner, uint64_t source, uint64_t slot) const {
        const uint64_t region = source < owner ? source : source - 1;
        return bank * bank_bytes + region * source_bytes + slot * slot_bytes;
    }
    // The smallest data region with `window` slots a source.
    static constexpr uint64_t bytes_for(uint64_t num_ranks, uint64_t slot_bytes, uint64_t window) {
        return num_ranks < 2 ? 0 : kNumBanks * align_up((num_ranks - 1) * slot_bytes * window, kHeapAlignment);
    }
};

}  // namespace deep_ep::layout
