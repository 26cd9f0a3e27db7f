// What the host hands to the kernels: trivially copyable, no device code, shared by both back ends.
#pragma once

#include <cstdint>

#include "layout/intranode.h"
#include "layout/staging.h"
#include "layout/status.h"

namespace deep_ep::kernels {

// The symmetric heap as a kernel sees it. `bases[i]` is where rank i's heap is mapped here: among the launch parameters,
// because the address of every flag and slot begins with one, and a trip to memory for it would come before each of them.
struct HeapParams {
    uint8_t* bases[layout::kMaxRanks];
    int rank;
    int num_ranks;
    layout::ControlLayout control;  // the data region follows at control.bytes
};

// Deadlines, and where a failing wait tells its story.
struct WatchParams {
    layout::LocalState* local;
    layout::HostStatus* status;
    uint64_t timeout_ns;
    uint64_t warn_ns;
};

constexpr int kMaxBiases = 2;  // that combine adds

// Of a block. Fewer threads have more registers: a lane of combine keeps 56 sums.
constexpr int kMaxDispatchThreads = 768;
constexpr int kMaxCombineThreads = 384;
constexpr int kMaxLayoutThreads = 256;
constexpr int kMaxNotifyThreads = 256;

// Bytes of static shared memory of the main kernels, besides their stages.
constexpr int kMaxDispatchState = 3712;
constexpr int kMaxCombineState = 256;

// How many threads work, and through what. Chosen by the runtime from the SM budget and the shape.
struct Geometry {
    int num_blocks;
    int num_send_warps;    // in each block
    int num_recv_warps;    // in each block
    layout::Staging send;  // of each send warp
    layout::Staging recv;  // of each receive warp
};

constexpr int kMaxLayoutBlocks = 16;

struct LayoutParams {
    const void* topk_idx;  // [num_tokens, num_topk], -1: none
    int idx_bytes;         // 4 or 8
    int num_tokens, num_topk, num_experts, num_ranks;
    int* num_tokens_per_rank;    // [num_ranks]
    int* num_tokens_per_expert;  // [num_experts]
    uint8_t* is_token_in_rank;   // [num_tokens, num_ranks]
    int* partials;               // [num_ranks + num_experts, kMaxLayoutBlocks]
    int num_threads;             // of a block
    WatchParams watch;
};

struct NotifyDispatchParams {
    HeapParams heap;
    WatchParams watch;
    const int* num_tokens_per_rank;
    const int* num_tokens_per_expert;
    int num_local_experts, expert_alignment;
    int* rank_prefix_matrix;  // [num_ranks, num_ranks], [src][dst], inclusive over src
    layout::HostCounts* counts;
    uint64_t ticket;
    int num_threads;
};

struct DispatchParams {
    HeapParams heap;
    WatchParams watch;
    Geometry geometry;
    layout::SlotLayout slot;
    layout::WindowLayout window;
    bool is_first_kernel;  // of this call (no notify_dispatch before it): announce it to the peers
    bool may_lend;         // some rank may: loans are stated in this call
    layout::Loan loan;     // of the outputs below

    const uint8_t* x;  // [num_tokens, row_bytes]
    int num_tokens;
    uint32_t row_bytes;
    const uint32_t* scales;  // any 4-byte type, strides in elements
    int num_scales;
    int64_t scale_stride_token, scale_stride_scale;
    const void* topk_idx;
    const float* topk_weights;
    int num_topk, idx_bytes, num_local_experts;
    // Null: the counts have been exchanged before, and rank_prefix_matrix is known.
    const int* num_tokens_per_rank;
    const int* num_tokens_per_expert;
    const uint8_t* is_token_in_rank;  // null: nothing to scan, send_head is known
    int* rank_prefix_matrix;
    int* send_head;

    uint8_t* recv_x;
    uint32_t* recv_scales;  // [rows, num_scales]
    void* recv_topk_idx;
    float* recv_topk_weights;
    int* recv_src_idx;   // null: the caller has it already
    int num_recv_rows;   // that the outputs hold
    bool is_worst_case;  // fewer may arrive: mark the rest
    // Not null: the host has guessed the number of rows, and waits for what is exchanged here. Where more come than it has
    // room for, the kernel ends without the rows, and with the call unfinished: the host launches the rest.
    layout::HostCounts* counts;
    uint64_t ticket;
    int expert_alignment;
};

struct CombineParams {
    HeapParams heap;
    WatchParams watch;
    Geometry geometry;
    layout::SlotLayout slot;
    layout::WindowLayout window;
    bool may_lend;        // some rank may: loans are stated in this call
    layout::Loan loan;    // of x, and of lent_weights where there are weights
    float* lent_weights;  // [num_rows, num_topk] in the heap: a copy of topk_weights that peers can read

    const uint8_t* x;  // bfloat16 [num_rows, hidden]
    uint32_t row_bytes;
    const float* topk_weights;  // [num_rows, num_topk]
    int num_topk;
    const uint8_t* bias[kMaxBiases];  // bfloat16 [num_tokens, hidden]
    const int* rank_prefix_matrix;
    const int* send_head;
    int num_tokens;
    int num_rows;
    uint8_t* combined_x;
    float* combined_topk_weights;
};

}  // namespace deep_ep::kernels
