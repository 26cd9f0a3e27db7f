// The symmetric heap of the low-latency mode: control words at fixed places, and the data region as one call cuts it.
//
// Flags stand at places that do not depend on any shape, so that calls of different shapes may alternate on one Buffer.
// Protocol and picture: docs/protocols/low_latency.md.
#pragma once

#include <cstdint>

#include "layout/field.h"

namespace deep_ep::layout {

constexpr int kNumLowLatencyBanks = 2;
constexpr int kMaxLowLatencyTokens = 4096;  // of one rank in one call
// Of one source in one call: two for each top-k entry of its tokens. With more, weights are data with a flag.
constexpr int kMaxLowLatencyPackets = 4096;

struct LowLatencyControl {
    Field started;     // u64[R]: the last call that this rank has entered
    Field received;    // u64[banks][R]: the last call of the bank whose receive phase this rank has finished
    Field table_full;  // u64[banks][R]: the call whose routing table this rank has written
    Field cleaned;     // u64[R]: the last clean_low_latency_buffer that this rank has entered
    Field token_full;  // u64[banks][R][kMaxLowLatencyTokens]: the call for which this rank has written the slot
    Field
        packets;  // Packet[banks][R][kMaxLowLatencyPackets]: [T][K][2]: experts and weights of this rank's combine. Nothing
                  // else is kept there in any call: bits of a row might look like a packet

    static constexpr LowLatencyControl make(FieldCursor& cursor, uint64_t num_ranks) {
        constexpr uint64_t kAlignment = 128;
        LowLatencyControl layout;
        layout.started = cursor.take(8, num_ranks, kAlignment);
        layout.received = cursor.take(8, kNumLowLatencyBanks * num_ranks, kAlignment);
        layout.table_full = cursor.take(8, kNumLowLatencyBanks * num_ranks, kAlignment);
        layout.cleaned = cursor.take(8, num_ranks, kAlignment);
        layout.token_full = cursor.take(8, kNumLowLatencyBanks * num_ranks * kMaxLowLatencyTokens, kAlignment);
        layout.packets = cursor.take(8, kNumLowLatencyBanks * num_ranks * kMaxLowLatencyPackets, kAlignment);
        return layout;
    }
};

// A row of combine in the logarithmic format, ten bits a channel, in planes (see device/algo/logfmt.h).
struct LogfmtRow {
    static constexpr uint64_t kGroupSize = 128;  // channels with one scale
    static constexpr uint64_t kUnit = 16;        // channels that one thread packs

    Field low;     // u8[hidden]: low bits of each channel's code
    Field high;    // u32[hidden / 16]: the other two bits of sixteen channels
    Field scales;  // u32[hidden / 128][2]
    uint64_t bytes = 0;

    static constexpr LogfmtRow make(uint64_t hidden) {
        const uint64_t num_units = (hidden + kUnit - 1) / kUnit;
        LogfmtRow layout;
        FieldCursor cursor;
        layout.low = cursor.take(1, num_units * kUnit, 16);
        layout.high = cursor.take(4, num_units, 16);
        layout.scales = cursor.take(4, 2 * ((hidden + kGroupSize - 1) / kGroupSize), 16);
        layout.bytes = cursor.total(16);
        return layout;
    }
};

// The data region: banks x sources. Where a source writes depends on no shape: a rank that was left out and does not know
// it yet spoils no message but its own, which nobody reads.
struct LowLatencyRegion {
    uint64_t bank_bytes = 0;
    uint64_t source_bytes = 0;

    static constexpr LowLatencyRegion make(uint64_t data_bytes, uint64_t num_ranks) {
        LowLatencyRegion layout;
        layout.bank_bytes = data_bytes / kNumLowLatencyBanks / 128 * 128;
        layout.source_bytes = layout.bank_bytes / num_ranks / 128 * 128;
        return layout;
    }
    // Where combine keeps slot `idx` of a bank whose slots belong to the top-k entries of the owner's tokens.
    constexpr uint64_t entry_offset(uint64_t bank, uint64_t idx, uint64_t slot_bytes) const {
        return bank * bank_bytes + idx * slot_bytes;
    }
    // Where the message of `source` is kept, from the start of the region.
    constexpr uint64_t offset(uint64_t bank, uint64_t source) const {
        return bank * bank_bytes + source * source_bytes;
    }
};

constexpr int kFp8GroupSize = 128;  // channels with one FP8 scale

// Parts of combine in slots that belong to the owner's top-k entries: a part lies at the first entry that it sums. A rank
// that must not wait for the owner's weights sends its rows as they are, each to the slot of its entry, and the owner sums
// them. What a rank has sent stands in the flag of the token.
struct LowLatencyEntrySlots {
    static constexpr int kMaxTopk = 16;
    static constexpr uint64_t kHintTopk = 8;
    static constexpr int kFirstRowBit = 40;  // bits below: the call
    static constexpr uint64_t kRowsMark = 1ull << 63;

    // Behind a row that is sent as it is: i32, the expert that it is of, for the owner to compare.
    static constexpr uint64_t expert_offset(uint64_t hidden) { return align_up(2 * hidden, 16); }
    static constexpr uint64_t slot_bytes(uint64_t hidden) { return align_up(expert_offset(hidden) + 4, 128); }
    // Of a bank.
    static constexpr uint64_t bytes(uint64_t num_max_tokens, uint64_t num_topk, uint64_t hidden) {
        return num_max_tokens * num_topk * slot_bytes(hidden);
    }
    // The flag of a token whose rows of these entries (a bit for each) have been sent.
    static constexpr uint64_t rows_flag(uint64_t call, uint32_t entries) {
        return kRowsMark | static_cast<uint64_t>(entries) << kFirstRowBit | call;
    }
    static constexpr uint64_t call_of(uint64_t flag) { return flag & ((1ull << kFirstRowBit) - 1); }
    static constexpr bool has_rows(uint64_t flag) { return (flag & kRowsMark) != 0; }
    static constexpr uint32_t rows_of(uint64_t flag) {
        return static_cast<uint32_t>(flag >> kFirstRowBit) & ((1u << kMaxTopk) - 1);
    }
};

// What num_rdma_bytes become where the group spans nodes, by what the size hint counts: a source in a bank. A rank has so many
// of these for its near ranks in its heap, and for its far ones in the rail window.
struct LowLatencyShares {
    static constexpr uint64_t kLeast = LowLatencyEntrySlots::kHintTopk;

    uint64_t share_bytes = 0;
    uint64_t num_ranks = 1, ranks_per_node = 1;

    static constexpr LowLatencyShares make(uint64_t data_bytes, uint64_t num_ranks, uint64_t ranks_per_node) {
        const uint64_t num_shares = kNumLowLatencyBanks * (num_ranks < kLeast ? kLeast : num_ranks);
        return {data_bytes / num_shares / 128 * 128, num_ranks, ranks_per_node};
    }
    // What may be lost by that.
    static constexpr uint64_t rounding_bytes(uint64_t num_ranks) {
        return kNumLowLatencyBanks * (num_ranks < kLeast ? kLeast : num_ranks) * 128;
    }
    constexpr uint64_t num_far() const { return num_ranks - ranks_per_node; }
    constexpr uint64_t heap() const {
        return kNumLowLatencyBanks * share_bytes * (ranks_per_node < kLeast ? kLeast : ranks_per_node);
    }
    // Of a bank.
    constexpr uint64_t receive() const { return share_bytes * (num_far() < kLeast ? kLeast : num_far()); }
    constexpr uint64_t staging() const { return share_bytes * (num_far() + kLeast); }
};

// What one rank writes to another in one call: its routing table, then one slot for each token.
struct LowLatencyMessage {
    Field num_tokens;    // i32[4]: only the first is used
    Field num_rows;      // i32[El]: dispatch only: tokens for each expert of the receiver; across nodes i32[E], of all
    Field topk_idx;      // i32[T][K]: -1: none. Combine: global expert ids; dispatch: with places, see routing_table.h
    Field topk_weights;  // f32[T][K]: combine only
    Field slots;         // [T] of slot_bytes
    Field scales;        // f32[hidden / 128], from the start of a slot; dispatch in FP8 only
    uint64_t bytes = 0;

    // `row_bytes`: payload of a token; `num_scales`: behind it.
    static constexpr LowLatencyMessage make(uint64_t num_max_tokens, uint64_t num_topk, uint64_t num_local_experts,
                                            uint64_t row_bytes, uint64_t num_scales) {
        constexpr uint64_t kAlignment = 128;
        LowLatencyMessage layout;
        layout.scales = Field{align_up(row_bytes, 16), 4, num_scales};
        const uint64_t slot_bytes = align_up(layout.scales.end(), kAlignment);
        FieldCursor cursor;
        layout.num_tokens = cursor.take(4, 4, kAlignment);
        layout.num_rows = cursor.take(4, num_local_experts, 16);
        layout.topk_idx = cursor.take(4, num_max_tokens * num_topk, 16);
        layout.topk_weights = cursor.take(4, num_max_tokens * num_topk, 16);
        layout.slots = cursor.take(slot_bytes, num_max_tokens, kAlignment);
        layout.bytes = cursor.total(kAlignment);
        return layout;
    }

    // The smallest data region for messages of this layout.
    constexpr uint64_t region_bytes(uint64_t num_ranks) const { return kNumLowLatencyBanks * num_ranks * bytes; }
};

}  // namespace deep_ep::layout
