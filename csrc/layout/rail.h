// The rail window of a rank: what its rail peers (the ranks with its index in other nodes) put there, and what it puts from.
// Control words, then the data region of dispatch and combine across nodes. Equal on every rank.
//
// Protocol and picture: docs/protocols/internode.md.
#pragma once

#include <cstdint>

#include "layout/heap.h"

namespace deep_ep::layout {

constexpr int kMaxRailChunks = 512;  // of one stream in one bank: each has a flag
constexpr int kMaxNodes = 256;
constexpr int kRailReasonWords = 64;

// What a source tells its forwarder in a node before its tokens come; the forwarder passes it on to its neighbours.
struct CountsBlock {
    Field shapes;         // u64[1]: a hash of what must be equal everywhere (row bytes, top-k, scales, experts)
    Field num_tokens;     // u32[1]: of the source for this node
    Field chunk_tokens;   // u32[1]: how many the source puts into a chunk
    Field rank_counts;    // u32[L]: tokens for each rank of the node
    Field expert_counts;  // u32[L][El]: entries for each expert of the node
    uint64_t bytes = 0;

    static constexpr CountsBlock make(uint64_t ranks_per_node, uint64_t num_local_experts) {
        CountsBlock block;
        FieldCursor cursor;
        block.shapes = cursor.take(8, 1, 8);
        block.num_tokens = cursor.take(4, 1, 4);
        block.chunk_tokens = cursor.take(4, 1, 4);
        block.rank_counts = cursor.take(4, ranks_per_node, 4);
        block.expert_counts = cursor.take(4, ranks_per_node * num_local_experts, 4);
        block.bytes = cursor.total(16);
        return block;
    }
};

// Words and blocks that rail peers put into each other's windows. [x][y] is row-major; N nodes.
struct RailControl {
    Field entered;  // u64[N]: calls that this peer has entered; the peer adds
    Field ended;    // u64[N]: calls in which this peer has done with what we put there; the peer adds
    Field abort;    // u64[2][N]: not zero: this peer gave up (AbortCode); set once by its kernels, once by its host
    Field reason;   // u64[N][kRailReasonWords]: why this peer gave up by itself: length, letters; set once by its host
    Field counts_flags;    // u64[banks][N]: the call whose counts block of this source is there
    Field arrived;         // u64[banks][N][kMaxRailChunks]: the chunk of this source that is there
    Field taken;           // u64[banks][N][kMaxRailChunks]: the chunk of ours that this peer has taken out
    Field counts;          // CountsBlock[banks][N]: by source
    Field counts_staging;  // CountsBlock[banks][N]: by destination
    uint64_t bytes = 0;

    static constexpr RailControl make(uint64_t num_nodes, uint64_t ranks_per_node) {
        RailControl control;
        FieldCursor cursor;
        const uint64_t block_bytes =
            align_up(CountsBlock::make(ranks_per_node, kMaxLocalExperts).bytes, kHeapAlignment);
        control.entered = cursor.take(8, num_nodes, kHeapAlignment);
        control.ended = cursor.take(8, num_nodes, kHeapAlignment);
        control.abort = cursor.take(8, 2 * num_nodes, kHeapAlignment);
        control.reason = cursor.take(8, kRailReasonWords * num_nodes, kHeapAlignment);
        control.counts_flags = cursor.take(8, kNumBanks * num_nodes, kHeapAlignment);
        control.arrived = cursor.take(8, kNumBanks * num_nodes * kMaxRailChunks, kHeapAlignment);
        control.taken = cursor.take(8, kNumBanks * num_nodes * kMaxRailChunks, kHeapAlignment);
        control.counts = cursor.take(block_bytes, kNumBanks * num_nodes, kHeapAlignment);
        control.counts_staging = cursor.take(block_bytes, kNumBanks * num_nodes, kHeapAlignment);
        control.bytes = cursor.total(4096);
        return control;
    }
};

// The same for the low-latency mode, whose far ranks (those of other nodes) all write here; `offset`s are in the window.
// R ranks; [source] is the far rank that writes. See docs/protocols/low_latency_nodes.md.
struct LowLatencyRailControl {
    Field received;    // u64[banks][R]: the last call of the bank whose receive phase this rank has finished; it adds
    Field table_full;  // u64[banks][R]: the call whose table of this rank is there
    Field cleaned;     // u64[R]: the last clean_low_latency_buffer that this rank has entered; it adds
    Field entered;     // u64[R]: the last call that this rank has entered and had to wait for its bank; it adds
    Field token_full;  // u64[banks][R][kMaxLowLatencyTokens]: the call for which the slot of this rank is there
    Field entry_full;  // u64[banks][kMaxLowLatencyPackets / 2]: the same of a slot by entry, of whichever rank fills it
    uint64_t end = 0;

    static constexpr LowLatencyRailControl make(uint64_t begin, uint64_t num_ranks) {
        LowLatencyRailControl control;
        FieldCursor cursor;
        cursor.take(1, begin, 1);
        control.received = cursor.take(8, kNumLowLatencyBanks * num_ranks, kHeapAlignment);
        control.table_full = cursor.take(8, kNumLowLatencyBanks * num_ranks, kHeapAlignment);
        control.cleaned = cursor.take(8, num_ranks, kHeapAlignment);
        control.entered = cursor.take(8, num_ranks, kHeapAlignment);
        control.token_full = cursor.take(8, kNumLowLatencyBanks * num_ranks * kMaxLowLatencyTokens, kHeapAlignment);
        control.entry_full = cursor.take(8, kNumLowLatencyBanks * (kMaxLowLatencyPackets / 2), kHeapAlignment);
        control.end = cursor.total(4096);
        return control;
    }
};

// Its data: banks x (receive, staging). See LowLatencyMessage, and LowLatencyEntrySlots.
struct LowLatencyRailRegion {
    uint64_t offset = 0;                            // in the window
    uint64_t receive_bytes = 0, staging_bytes = 0;  // of a bank
    uint64_t source_bytes = 0;                      // that receive has for a far rank

    constexpr uint64_t bank_bytes() const { return receive_bytes + staging_bytes; }
    constexpr uint64_t end() const { return offset + kNumLowLatencyBanks * bank_bytes(); }

    static constexpr LowLatencyRailRegion make(uint64_t offset, const LowLatencyShares& shares) {
        LowLatencyRailRegion region;
        region.offset = offset;
        region.receive_bytes = shares.receive();
        region.staging_bytes = shares.staging();
        region.source_bytes = region.receive_bytes / shares.num_far() / kHeapAlignment * kHeapAlignment;
        return region;
    }
    constexpr uint64_t receive(uint64_t bank) const { return offset + bank * bank_bytes(); }
    constexpr uint64_t staging(uint64_t bank) const { return receive(bank) + receive_bytes; }
};

// Counters of a rank's own, in its device memory and zero between calls: of each chunk that it fills or empties, how many of
// its tokens are done.
struct RailCounters {
    Field staged;  // u32[N][kMaxRailChunks]: by destination
    Field taken;   // u32[N][kMaxRailChunks]: by source
    uint64_t bytes = 0;

    static constexpr RailCounters make(uint64_t num_nodes) {
        RailCounters counters;
        FieldCursor cursor;
        counters.staged = cursor.take(4, num_nodes * kMaxRailChunks, kHeapAlignment);
        counters.taken = cursor.take(4, num_nodes * kMaxRailChunks, kHeapAlignment);
        counters.bytes = cursor.total(kHeapAlignment);
        return counters;
    }
};

// How the data region of the window is cut for one call: banks x (staging, receive) x (N - 1) nodes x slots. Tokens cross
// the rail in chunks of neighbouring slots.
struct RailWindow {
    uint64_t bank_bytes = 0;
    uint64_t half_bytes = 0;  // of a bank: what is put from there, what is put there
    uint64_t node_bytes = 0;
    uint64_t slot_bytes = 0;
    int chunk_tokens = 0;
    int num_chunks = 0;  // that a stream has room for in a bank; 0: the region is too small

    constexpr int num_slots() const { return chunk_tokens * num_chunks; }

    // `chunk_bytes`: what the engine likes best. A chunk is never more than a quarter of what one stream has, so that taking
    // out, sending and filling go on at the same time; nor so small that there are more chunks than flags.
    static constexpr RailWindow make(uint64_t data_bytes, uint64_t num_nodes, uint64_t slot_bytes,
                                     uint64_t chunk_bytes) {
        RailWindow window;
        window.slot_bytes = slot_bytes;
        if (num_nodes < 2) return window;
        window.bank_bytes = data_bytes / kNumBanks / kHeapAlignment * kHeapAlignment;
        window.half_bytes = window.bank_bytes / 2 / kHeapAlignment * kHeapAlignment;
        const uint64_t num_slots = window.half_bytes / ((num_nodes - 1) * slot_bytes);
        if (num_slots == 0) return window;
        uint64_t chunk = chunk_bytes / slot_bytes;
        if (chunk > num_slots / kChunksWanted) chunk = num_slots / kChunksWanted;
        const uint64_t least = (num_slots + kMaxRailChunks - 1) / kMaxRailChunks;
        if (chunk < least) chunk = least;  // also when it was zero
        window.chunk_tokens = static_cast<int>(chunk);
        window.num_chunks = static_cast<int>(num_slots / chunk);
        window.node_bytes = chunk * static_cast<uint64_t>(window.num_chunks) * slot_bytes;
        return window;
    }
    // Where `owner` keeps what it sends to `node`, from the start of its data region.
    constexpr uint64_t staging_offset(uint64_t bank, uint64_t owner, uint64_t node, uint64_t slot) const {
        return bank * bank_bytes + region_of(owner, node) * node_bytes + slot * slot_bytes;
    }
    // Where `owner` keeps what comes from `node`.
    constexpr uint64_t receive_offset(uint64_t bank, uint64_t owner, uint64_t node, uint64_t slot) const {
        return half_bytes + staging_offset(bank, owner, node, slot);
    }
    // The smallest data region in which a stream has `num_slots` slots.
    static constexpr uint64_t bytes_for(uint64_t num_nodes, uint64_t slot_bytes, uint64_t num_slots) {
        return num_nodes < 2 ? 0 : kNumBanks * 2 * align_up((num_nodes - 1) * slot_bytes * num_slots, kHeapAlignment);
    }

private:
    static constexpr uint64_t kChunksWanted = 4;

    // A rank keeps nothing for its own node.
    static constexpr uint64_t region_of(uint64_t owner, uint64_t node) { return node < owner ? node : node - 1; }
};

}  // namespace deep_ep::layout
