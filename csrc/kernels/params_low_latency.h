// What the host hands to the low-latency kernels.
#pragma once

#include <cstdint>

#include "kernels/params.h"
#include "layout/low_latency.h"

namespace deep_ep::kernels {

// With a hook a call is two launches, one per phase, and no SM is held in between; without, one launch is both.
enum class Phase : int { kSend, kReceive, kBoth };

// One block on each SM: 14 warps hold a row of 7168 channels at once and have 144 registers a thread.
constexpr int kMaxLowLatencyThreads = 448;
// Expert ids share a word of the routing table with a token's place among the rows of its source.
constexpr int kPlaceBits = 12;
constexpr int kMaxLowLatencyExperts = 1 << 14;
static_assert(layout::kMaxLowLatencyTokens <= 1 << kPlaceBits);

struct LowLatencyCall {
    HeapParams heap;
    WatchParams watch;
    layout::LowLatencyMessage message;
    bool uses_packets;          // combine: for the weights; parts have slots by entry (see LowLatencyEntrySlots)
    uint64_t entry_slot_bytes;  // combine
    uint64_t data_offset;       // of the low-latency data region in the heap
    layout::LowLatencyRegion region;
    Phase phase;
    // Where a send phase of its own leaves the number of its call for the receive phase. The host cannot know it: a graph
    // that is replayed in between makes calls too.
    uint64_t* number;
    int num_blocks, num_warps;
    int* masked;          // [num_ranks]: not zero: this rank is left out
    bool is_shrinkable;   // a peer that runs into the deadline is masked, and the call goes on
    uint64_t* decisions;  // [num_ranks], device-local: call * 2 + 1: that source counts in this call, + 0: not
    uint64_t* wait_ns;    // [num_ranks] of this call, device-local, zero between calls
    int64_t* wait_stats;  // [num_ranks]: longest wait for each source is added, in ns; may be null
    int num_max_tokens, num_topk, num_experts, num_local_experts;
    int hidden;
};

enum class Payload : int { kBf16, kFp8 };

struct LowLatencyDispatchParams {
    LowLatencyCall call;
    Payload payload;
    bool rounds_scales;  // to powers of two
    bool packs_scales;   // four exponents (UE8M0) in a word

    const uint8_t* x;  // bfloat16 [num_tokens, hidden]
    const void* topk_idx;
    int idx_bytes;
    int num_tokens;

    // Rows of local expert e from source s: layout_range[e][s] = first row << 32 | number of rows.
    uint8_t* recv_x;        // [El, R * T, row bytes]
    uint32_t* recv_scales;  // [El, scale words, R * T]
    int* recv_count;        // [El]
    int* src_info;          // [El, R * T]: token index at the source
    int64_t* layout_range;  // [El, R]
    int* row_of_entry;      // [R, T, K]: the row of (source, token, k), -1: none here; for the combine that follows
    int* cumulative_stats;  // [El], counts are added; may be null

    int num_set_words;  // of each set that the routing table is made from; see routing_table.h
};

struct LowLatencyCombineParams {
    LowLatencyCall call;
    bool uses_logfmt;  // on the wire; see device/algo/logfmt.h
    const uint8_t* x;  // bfloat16 [El, R * T, hidden]
    const void* topk_idx;
    int idx_bytes;
    const float* topk_weights;  // [num_tokens, K]
    int num_tokens;
    const int* row_of_entry;
    uint8_t* combined_x;  // bfloat16 [num_tokens, hidden]
};

}  // namespace deep_ep::kernels
