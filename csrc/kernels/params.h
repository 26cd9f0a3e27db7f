// What the host hands to the kernels: trivially copyable, no device code, shared by both back ends. The parameters of an
// operation are the runtime's plan and the caller's arguments, as bases: neither is copied field by field.
#pragma once

#include <cstdint>

#include "kernels/args.h"
#include "layout/heap.h"
#include "layout/status.h"

namespace deep_ep::kernels {

using layout::HeapParams;
using layout::WatchParams;

// Of a block. Fewer threads have more registers: a lane of combine keeps 56 sums.
constexpr int kMaxDispatchWarps = 24;
constexpr int kMaxCombineWarps = 19;        // that move rows; one more sets their flags
constexpr int kMaxStagedCombineWarps = 12;  // the same
constexpr int kMaxLayoutThreads = 256;
constexpr int kMaxNotifyThreads = 256;

// Bytes of static shared memory of the main kernels, besides their stages.
constexpr int kMaxDispatchState = 3712;
constexpr int kMaxCombineState = 640;

// How many threads work, and through what. Chosen by the runtime from the SM budget and the shape.
struct Geometry {
    int num_blocks;
    int num_send_warps;    // in each block
    int num_recv_warps;    // in each block
    layout::Staging send;  // of each send warp
    layout::Staging recv;  // of each receive warp
};
constexpr int staging_bytes(const Geometry& geometry) {
    return geometry.num_send_warps * geometry.send.bytes() + geometry.num_recv_warps * geometry.recv.bytes();
}

constexpr int kMaxLayoutBlocks = 16;

struct LayoutPlan {
    int num_ranks;
    int* partials;    // [num_ranks + num_experts + num_nodes, kMaxLayoutBlocks]
    int num_threads;  // of a block
    WatchParams watch;
};
struct LayoutParams : LayoutPlan, LayoutArgs {};

struct NotifyDispatchPlan {
    HeapParams heap;
    WatchParams watch;
    int num_local_experts;
    layout::HostCounts* counts;
    uint64_t ticket;
    int num_threads;
};
struct NotifyDispatchParams : NotifyDispatchPlan, NotifyArgs {};

struct DispatchPlan {
    HeapParams heap;
    WatchParams watch;
    Geometry geometry;
    layout::SlotLayout slot;
    layout::WindowLayout window;
    bool is_first_kernel;  // of this call (no notify_dispatch before it): announce it to the peers
    bool may_lend;         // some rank may: loans are stated in this call
    layout::Loan loan;     // of the outputs
    int num_local_experts;
    // Not null: the host has guessed the number of rows, and waits for what is exchanged here. Where more come than it has
    // room for, the kernel ends without the rows, and with the call unfinished: the host launches the rest.
    layout::HostCounts* counts;
    uint64_t ticket;
};
struct DispatchParams : DispatchPlan, DispatchArgs {};

struct CombinePlan {
    HeapParams heap;
    WatchParams watch;
    Geometry geometry;
    layout::SlotLayout slot;
    layout::WindowLayout window;
    bool may_lend;        // some rank may: loans are stated in this call
    layout::Loan loan;    // of x, and of lent_weights where there are weights
    float* lent_weights;  // [num_rows, num_topk] in the heap: a copy of topk_weights that peers can read
    uint32_t row_bytes;
};
struct CombineParams : CombinePlan, CombineArgs {};

}  // namespace deep_ep::kernels
