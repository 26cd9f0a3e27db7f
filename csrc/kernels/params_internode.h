// What the host hands to the kernels across nodes: the parameters of the same operation inside a node, whose heap, ranks and
// windows are the node's, and the rail.
#pragma once

#include "kernels/params.h"
#include "layout/rail.h"
#include "layout/topology.h"
#include "rail/engine.h"

namespace deep_ep::kernels {

// Of a block.
constexpr int kMaxInternodeDispatchThreads = 768;
constexpr int kMaxInternodeCombineThreads = 512;

// The rail window and how a call uses it. All of it but the parameters, the rank and the counters is equal on every rank.
struct RailPlan {
    rail::Params params;  // Engine::params()
    layout::Topology topology;
    layout::RailControl control;  // at the start of the window; its data region follows at control.bytes
    layout::RailWindow window;    // of slots of this kind (dispatch or combine)
    layout::SlotLayout slot;
    uint8_t* counters;      // layout::RailCounters of device memory, zeroed when it was allocated
    int num_forward_warps;  // in each block, beside those of Geometry; not used by the count exchange
};

// The first launch of every call that is not cached. `counts` is null where the host waits for none (expert_alignment = 0).
struct InternodeNotifyParams : NotifyDispatchParams, InternodeNotifyFields {
    RailPlan rail;
};

// `is_first_kernel`: it is cached. `counts` is null: it never tells the host. `geometry` has no stages.
struct InternodeDispatchParams : DispatchParams, InternodeDispatchFields {
    RailPlan rail;
};

struct InternodeCombineParams : CombineParams, InternodeCombineFields {
    RailPlan rail;
};

// A lane stands for each stream that a warp serves, so the warps of a role must be that many: streams inside the node (receive
// warps of dispatch, send warps of combine), and streams on the rail (forward warps). Of a role that has nothing to do: any.
constexpr bool has_enough_warps(const Geometry& geometry, int num_warps, int num_streams) {
    return geometry.num_blocks * num_warps * 32 >= num_streams;
}
constexpr bool can_serve(const HeapParams& heap, const Geometry& geometry, const RailPlan& rail, int num_stream_warps,
                         bool is_lent) {
    return has_enough_warps(geometry, rail.num_forward_warps, heap.num_nodes - 1) &&
           (is_lent || has_enough_warps(geometry, num_stream_warps, heap.num_nodes * (heap.num_ranks - 1)));
}

}  // namespace deep_ep::kernels
