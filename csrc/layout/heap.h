// The symmetric heap of one node of L ranks, among N nodes with R = N L ranks in all: control words, then the data regions of
// the high-throughput mode and of the low-latency mode. Equal on every rank.
//
// Protocols and pictures: docs/protocols/intranode.md, docs/protocols/low_latency.md.
#pragma once

#include <cstdint>

namespace deep_ep::layout {

// -- Regions of bytes, declared as lists of fields. Offsets are 64-bit and exist nowhere else. -----------------------

constexpr uint64_t align_up(uint64_t value, uint64_t alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

// `count` elements of `element_bytes` each, `offset` bytes from the start of the region.
struct Field {
    uint64_t offset = 0;
    uint64_t element_bytes = 0;
    uint64_t count = 0;

    constexpr uint64_t bytes() const { return element_bytes * count; }
    constexpr uint64_t end() const { return offset + bytes(); }
    constexpr uint64_t at(uint64_t index) const { return offset + index * element_bytes; }
};

// Hands out fields one after the other.
class FieldCursor {
public:
    constexpr Field take(uint64_t element_bytes, uint64_t count, uint64_t alignment) {
        Field field{align_up(next_, alignment), element_bytes, count};
        next_ = field.end();
        return field;
    }
    constexpr uint64_t total(uint64_t alignment) const { return align_up(next_, alignment); }

private:
    uint64_t next_ = 0;
};

// -- The shared memory of one block in the high-throughput kernels: for each warp a ring of stages for bulk copies ---

// What a bulk copy moves for `bytes` bytes.
constexpr uint32_t bulk_bytes(uint64_t bytes) { return static_cast<uint32_t>(align_up(bytes, 16)); }

constexpr int kReduceStages = 4;         // of a reduce warp of combine
constexpr int kReduceStageBytes = 3584;  // a piece of one row
constexpr int kPositionBytes = 4 * 32;   // at the end of a send stage: each lane's note of where the row goes

// The ring of one warp: its mbarriers, then its stages. No stages: rows go through registers.
struct Staging {
    static constexpr int kBarrierBytes = 16;  // of each stage, so that stages stay aligned

    int num_stages = 0;
    int stage_bytes = 0;  // a multiple of 16

    constexpr int bytes() const { return num_stages * (stage_bytes + kBarrierBytes); }
    constexpr int barrier_offset(int stage) const { return stage * kBarrierBytes; }
    constexpr int stage_offset(int stage) const { return num_stages * kBarrierBytes + stage * stage_bytes; }
};

// -- The low-latency mode: control words at fixed places, and the data region as one call cuts it --------------------
// Flags stand at places that do not depend on any shape, so that calls of different shapes may alternate on one Buffer.

constexpr int kNumLowLatencyBanks = 2;
constexpr int kMaxLowLatencyTokens = 4096;  // of one rank in one call
// Of one source in one call: two for each top-k entry of its tokens. With more, weights are data with a flag.
constexpr int kMaxLowLatencyPackets = 4096;

struct LowLatencyControl {
    Field started;     // u64[L]: the last call that this rank has entered
    Field received;    // u64[banks][L]: the last call of the bank whose receive phase this rank has finished
    Field table_full;  // u64[banks][L]: the call whose routing table this rank has written
    Field cleaned;     // u64[L]: the last clean_low_latency_buffer that this rank has entered
    Field token_full;  // u64[banks][L][kMaxLowLatencyTokens]: the call for which this rank has written the slot
    Field
        packets;  // Packet[banks][L][kMaxLowLatencyPackets]: [T][K][2]: experts and weights of this rank's combine. Nothing
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

// A row of combine in the logarithmic format, ten bits a channel, in planes (see device/algo/formats.h).
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

// -- All control words, and the data region of the high-throughput mode ----------------------------------------------

constexpr int kNumBanks = 2;            // calls alternate between the banks
constexpr int kMaxWindow = 4096;        // slots of one source in one bank, at most
constexpr int kMaxLocalExperts = 1024;  // experts of one rank, at most
constexpr int kMaxTokens = 1 << 24;     // tokens of one rank in one call, less one: see make_tag
constexpr uint64_t kHeapAlignment = 128;
constexpr int kMaxRanks = 128;  // whose heaps are mapped here: their addresses travel with every launch

// A flag says which row of which call it speaks of, so that it never needs clearing: flags only grow.
constexpr uint64_t make_tag(uint64_t call, uint64_t position) { return call << 24 | (position + 1); }
constexpr uint64_t call_of_tag(uint64_t tag) { return tag >> 24; }
constexpr int64_t position_of_tag(uint64_t tag) { return static_cast<int64_t>(tag & ((1u << 24) - 1)) - 1; }

// A count on its way to a peer. The call that it belongs to stands in the same word, so that it needs no flag and no order.
constexpr uint64_t make_count(uint64_t call, int count) { return call << 32 | static_cast<uint32_t>(count); }
constexpr bool is_count_of(uint64_t word, uint64_t call) { return word >> 32 == (call & 0xffffffffu); }
constexpr uint64_t call_of_count(uint64_t word) { return word >> 32; }
constexpr int count_in(uint64_t word) { return static_cast<int>(static_cast<uint32_t>(word)); }

// What a rank lends to its peers for one call, as offsets into its heap (0: not lent). A dispatch lends its outputs, and
// peers write rows where they stay; a combine lends its input, and peers read rows where they stand, or its output, and the peer
// writes each row where it is summed.
struct Loan {
    uint64_t x = 0;
    uint64_t scales = 0;
    uint64_t topk_idx = 0;
    uint64_t topk_weights = 0;
    uint64_t src_idx = 0;
    uint64_t num_rows = 0;  // that the memory at each of these has room for
    uint64_t sums = 0;      // of a combine: its output, and topk_weights then has room for a peer's weights, by token

    constexpr bool is_any() const { return x != 0 || sums != 0; }
};

// Words that ranks write into each other's memory to coordinate. [x][y] is row-major.
struct ControlLayout {
    Field started;        // u64[L]: the last call that this source has entered; written by the source
    Field abort;          // u64[1]: not zero: some rank gave up (AbortCode)
    Field rank_counts;    // u64[banks][R][L]: tokens that source i sends to each rank here, as make_count writes them
    Field expert_counts;  // u64[banks][R][kMaxLocalExperts]: entries that source i has for our experts, likewise
    Field full;           // u64[banks][N][L][kMaxWindow]: the row that rank i has put into this slot of ours
    Field empty;          // u64[banks][N][L][kMaxWindow]: the row of ours that rank i has taken out of this slot of its
    Field loan_flags;     // u64[banks][L]: the call whose loan this lender has stated
    Field loans;          // Loan[banks][L]: by lender
    Field weight_flags;   // u64[L]: the last call of which this lender's weights can be read
    Field returned;       // u64[L]: the last call in which this borrower has done with our loan
    LowLatencyControl low_latency;
    uint64_t bytes = 0;

    static constexpr ControlLayout make(uint64_t num_ranks, uint64_t num_nodes = 1) {
        const uint64_t num_sources = num_nodes * num_ranks;
        ControlLayout layout;
        FieldCursor cursor;
        layout.started = cursor.take(8, num_ranks, kHeapAlignment);
        layout.abort = cursor.take(8, 1, kHeapAlignment);
        layout.rank_counts = cursor.take(8, kNumBanks * num_sources * num_ranks, kHeapAlignment);
        layout.expert_counts = cursor.take(8, kNumBanks * num_sources * kMaxLocalExperts, kHeapAlignment);
        layout.full = cursor.take(8, kNumBanks * num_sources * kMaxWindow, kHeapAlignment);
        layout.empty = cursor.take(8, kNumBanks * num_sources * kMaxWindow, kHeapAlignment);
        layout.loan_flags = cursor.take(8, kNumBanks * num_ranks, kHeapAlignment);
        layout.loans = cursor.take(sizeof(Loan), kNumBanks * num_ranks, kHeapAlignment);
        layout.weight_flags = cursor.take(8, num_ranks, kHeapAlignment);
        layout.returned = cursor.take(8, num_ranks, kHeapAlignment);
        layout.low_latency = LowLatencyControl::make(cursor, num_ranks);
        layout.bytes = cursor.total(4096);
        return layout;
    }
};

// One token on its way, within a node or over the rail: its row, then 4-byte metadata words.
struct SlotLayout {
    Field row;           // bytes
    Field src_idx;       // i32[0..1]: index of the token at its source
    Field topk_idx;      // i32[K]: within a node local expert ids, -1: not here; over the rail global ones, -1: none
    Field topk_weights;  // f32[K]
    Field positions;     // i32[L or 0], over the rail: place among its source's tokens at each rank there; -1: nowhere
    Field scales;        // any 4-byte type [num_scales]
    uint64_t bytes = 0;

    // `num_positions`: ranks of a node; 0 within one, and in a cached call, whose forwarders know the positions.
    static constexpr SlotLayout for_dispatch(uint64_t row_bytes, uint64_t num_topk, uint64_t num_scales,
                                             uint64_t num_positions = 0) {
        return make(row_bytes, num_topk, true, num_scales, num_positions);
    }
    // Over the rail, the sum of one node's rows of a token, and of their weights.
    static constexpr SlotLayout for_combine(uint64_t row_bytes, uint64_t num_topk) {
        return make(row_bytes, num_topk, false, 0, 0);
    }

private:
    static constexpr SlotLayout make(uint64_t row_bytes, uint64_t num_topk, bool has_routing, uint64_t num_scales,
                                     uint64_t num_positions) {
        SlotLayout layout;
        FieldCursor cursor;
        layout.row = cursor.take(1, row_bytes, 16);
        layout.src_idx = cursor.take(4, has_routing ? 1 : 0, 4);
        layout.topk_idx = cursor.take(4, has_routing ? num_topk : 0, 4);
        layout.topk_weights = cursor.take(4, num_topk, 4);
        layout.positions = cursor.take(4, num_positions, 4);
        layout.scales = cursor.take(4, num_scales, 4);
        layout.bytes = cursor.total(kHeapAlignment);
        return layout;
    }
};

// How the data region is cut for one call: banks x N nodes x (L - 1) writers x window slots. A rank keeps no slots for itself.
// The slots of (n, i) hold, in a dispatch, rows of source (n, i), written by its forwarder here; in a combine, rows of rank i
// here for owner (n, this rank's index).
struct WindowLayout {
    uint64_t bank_bytes = 0;
    uint64_t node_bytes = 0;
    uint64_t source_bytes = 0;
    uint64_t slot_bytes = 0;
    int window = 0;  // slots of one source in one bank; 0: the region is too small

    static constexpr WindowLayout make(uint64_t data_bytes, uint64_t num_ranks, uint64_t slot_bytes,
                                       uint64_t num_nodes = 1) {
        WindowLayout layout;
        layout.slot_bytes = slot_bytes;
        if (num_ranks < 2) return layout;
        layout.bank_bytes = data_bytes / kNumBanks / kHeapAlignment * kHeapAlignment;
        const uint64_t fitting = layout.bank_bytes / (num_nodes * (num_ranks - 1) * slot_bytes);
        layout.window = static_cast<int>(fitting < kMaxWindow ? fitting : kMaxWindow);
        layout.source_bytes = static_cast<uint64_t>(layout.window) * slot_bytes;
        layout.node_bytes = (num_ranks - 1) * layout.source_bytes;
        return layout;
    }
    // Where `owner` keeps the slots that `writer` fills, from the start of its data region.
    constexpr uint64_t slot_offset(uint64_t bank, uint64_t owner, uint64_t writer, uint64_t slot,
                                   uint64_t node = 0) const {
        const uint64_t region = writer < owner ? writer : writer - 1;
        return bank * bank_bytes + node * node_bytes + region * source_bytes + slot * slot_bytes;
    }
    // The smallest data region with `window` slots a source.
    static constexpr uint64_t bytes_for(uint64_t num_ranks, uint64_t slot_bytes, uint64_t window,
                                        uint64_t num_nodes = 1) {
        const uint64_t num_streams = num_nodes * (num_ranks - 1);
        return num_ranks < 2 ? 0 : kNumBanks * align_up(num_streams * slot_bytes * window, kHeapAlignment);
    }
};

// How num_nvl_bytes is divided where nobody says what is lent: slots, copies of combine's weights, and what is lent. Equal on
// every rank, and nothing is known yet of the rows that will come.
struct DataSplit {
    static constexpr uint64_t kAlignment = 512;
    static constexpr uint64_t kWeightShare = 64;          // of the lent bytes, one in so many holds copies of weights
    static constexpr uint64_t kMinSlotBytes = 512 << 10;  // for each peer; a region with fewer is slots throughout
    // The calls that the proportion is made for: so many slots for each source, so many tokens of each rank.
    static constexpr uint64_t kWindow = 640;
    static constexpr uint64_t kTokens = 4096;
    static constexpr int kTopk = 8;

    uint64_t slot_bytes = 0, weight_bytes = 0, lend_bytes = 0;

    // Rows that a rank receives in such a call when experts are drawn evenly, and an eighth more.
    static constexpr uint64_t num_rows(uint64_t num_ranks) {
        double missed = 1;  // the chance that none of a token's experts is on a given rank
        for (int k = 0; k < kTopk; ++k) missed *= 1 - 1 / static_cast<double>(num_ranks);
        return static_cast<uint64_t>(static_cast<double>(kTokens * num_ranks) * (1 - missed) * 9 / 8);
    }
    // Of a combine's output: it is lent between two ranks, which add their rows there.
    static constexpr uint64_t num_sums(uint64_t num_ranks) { return num_ranks == 2 ? kTokens : 0; }
    // The slots' share of the region, in 65536ths.
    static constexpr uint64_t slot_share(uint64_t num_ranks) {
        const uint64_t slots = kNumBanks * (num_ranks - 1) * kWindow;
        return (slots << 16) / (slots + num_rows(num_ranks));
    }
    static constexpr DataSplit make(uint64_t data_bytes, uint64_t num_ranks) {
        if (num_ranks < 2) return {data_bytes, 0, 0};
        const uint64_t share = slot_share(num_ranks);
        const uint64_t slots = align_up((data_bytes >> 16) * share + ((data_bytes & 0xffff) * share >> 16), kAlignment);
        if (slots < (num_ranks - 1) * kMinSlotBytes) return {data_bytes, 0, 0};
        const uint64_t rest = (data_bytes - slots) / kAlignment * kAlignment;
        const uint64_t weights = align_up(rest / (kWeightShare + 1), kAlignment);
        return {slots, weights, rest - weights};
    }
    // The smallest region with so many bytes of slots, and room to lend `lend_bytes`.
    static constexpr uint64_t bytes_for(uint64_t slot_bytes, uint64_t lend_bytes, uint64_t num_ranks) {
        if (num_ranks < 2) return slot_bytes;
        const uint64_t share = slot_share(num_ranks);
        const uint64_t lent = lend_bytes + lend_bytes / kWeightShare + 4 * kAlignment;
        const uint64_t for_slots = (slot_bytes << 16) / share, for_lending = (lent << 16) / ((1 << 16) - share);
        return align_up((for_slots > for_lending ? for_slots : for_lending) + kAlignment, kAlignment);
    }
};

// The symmetric heap as a kernel sees it. `bases[i]` is where rank i's heap is mapped here: among the launch parameters,
// because the address of every flag and slot begins with one, and a trip to memory for it would come before each of them.
struct HeapParams {
    uint8_t* bases[kMaxRanks];
    int rank;               // index in the node
    int num_ranks;          // of the node
    ControlLayout control;  // the data region follows at control.bytes
    int first_rank = 0;     // of the node, among all
    int num_nodes = 1;
};

}  // namespace deep_ep::layout
