// What the host hands to the low-latency kernels.
#pragma once

#include <cstdint>

#include "kernels/divisor.h"
#include "kernels/params.h"
#include "layout/heap.h"
#include "layout/rail.h"
#include "layout/topology.h"
#include "rail/engine.h"

namespace deep_ep::kernels {

// With a hook a call is two launches, one per phase, and no SM is held in between; without, one launch is both.
enum class Phase : int { kSend, kReceive, kBoth };

// One block on each SM: 14 warps hold a row of 7168 channels at once and have 144 registers a thread.
constexpr int kMaxLowLatencyThreads = 448;
// Expert ids share a word of the routing table with a token's place among the rows of its source.
constexpr int kPlaceBits = 12;
constexpr int kMaxLowLatencyExperts = 1 << 14;
static_assert(layout::kMaxLowLatencyTokens <= 1 << kPlaceBits);

// How the kernels for several nodes reach far ranks, those of other nodes.
struct LowLatencyRail {
    rail::Params params;  // Engine::params()
    layout::Topology topology;
    layout::Field abort;  // RailControl::abort
    layout::LowLatencyRailControl control;
    layout::LowLatencyRailRegion region;
    // [ranks_per_node], device-local: the windows of this node. A row of a dispatch crosses once for each node, to the rank on its
    // source's rail, and its neighbours load it from there. Null: once for each rank.
    const uint8_t* const* node_windows;
    // [kNumTold][num_ranks], device-local: what this rank has told each far rank: the last call that it has received in each
    // bank, then how often it has entered clean_low_latency_buffer, then LowLatencyRailControl::entered.
    uint64_t* told;
    static constexpr int kToldCleans = layout::kNumLowLatencyBanks, kToldEntered = kToldCleans + 1;
    static constexpr int kNumTold = kToldEntered + 1;
};

struct LowLatencyPlan {
    HeapParams heap;
    WatchParams watch;
    layout::LowLatencyMessage message;
    bool uses_packets;          // combine: for the weights; parts have slots by entry (see LowLatencyEntrySlots)
    uint64_t entry_slot_bytes;  // combine
    uint64_t data_offset;       // of the low-latency data region in the heap
    layout::LowLatencyRegion region;
    Phase phase;
    int num_blocks, num_warps;
    int* masked;          // [num_ranks]: not zero: this rank is left out
    bool is_shrinkable;   // a peer that runs into the deadline is masked, and the call goes on
    uint64_t* decisions;  // [num_ranks], device-local: call * 2 + 1: that source counts in this call, + 0: not
    uint64_t* wait_ns;    // [num_ranks] of this call, device-local, zero between calls
    int num_local_experts;
    Divisor by_ranks, by_other_ranks, by_local_experts, by_topk;
    Divisor by_parts;  // of a token in the receive phase, a warp for each
    LowLatencyRail rail;
};
// What all kernels of the mode need.
struct LowLatencyCall : LowLatencyPlan, LowLatencyArgs {};

enum class Payload : int { kBf16, kFp8 };

struct LowLatencyDispatchPlan {
    LowLatencyCall call;
    Payload payload;
    int num_set_words;                // of each set that the routing table is made from; see routing_table.h
    int num_scale_words;              // of a row, as the caller gets them
    int part_vecs, part_scale_words;  // of a part of a token
};
struct LowLatencyDispatchParams : LowLatencyDispatchPlan, LowLatencyDispatchFields {};

struct LowLatencyCombinePlan {
    LowLatencyCall call;
    int part_chunks;  // of a part of a token
};
struct LowLatencyCombineParams : LowLatencyCombinePlan, LowLatencyCombineFields {};

}  // namespace deep_ep::kernels
