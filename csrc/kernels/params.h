// The operations: what each is launched with, the caller's arguments and the runtime's plan, and by what. Parameters are trivially
// copyable. No device code, shared by both back ends.
#pragma once

#include <cstdint>

#include "device/compiler.h"
#include "layout/heap.h"
#include "layout/status.h"

namespace deep_ep::kernels {

// -- What a caller hands to an operation: one record each, and here the only list of its fields ----------------------
// A line gives a field its type, name and meaning. From it come the member of the struct, the keyword that Python fills
// (bindings/record.h), and the entry of the type stub (tools/render_stub.py).

constexpr int kMaxBiases = 2;  // that combine adds

using Biases = const uint8_t* [kMaxBiases];

#define EP_FIELD(type, name, meaning) type name;

// clang-format off
#define EP_LAYOUT_ARGS(FIELD) \
    FIELD(const void*, topk_idx, "[num_tokens, num_topk], -1: none") \
    FIELD(int, idx_bytes, "4 or 8") \
    FIELD(int, num_tokens, "") \
    FIELD(int, num_topk, "") \
    FIELD(int, num_experts, "of all ranks") \
    FIELD(int, num_nodes, "that the ranks are divided into, evenly") \
    FIELD(int*, num_tokens_per_rank, "output, [num_ranks]") \
    FIELD(int*, num_tokens_per_node, "output, [num_nodes]; or none") \
    FIELD(int*, num_tokens_per_expert, "output, [num_experts]") \
    FIELD(uint8_t*, is_token_in_rank, "output, bool [num_tokens, num_ranks]")

#define EP_NOTIFY_ARGS(FIELD) \
    FIELD(const int*, num_tokens_per_rank, "[num_ranks]") \
    FIELD(const int*, num_tokens_per_expert, "[num_experts]") \
    FIELD(int, num_experts, "of all ranks") \
    FIELD(int, expert_alignment, "of the counts that the host learns; 0 (across nodes only): it waits for none") \
    FIELD(int*, rank_prefix_matrix, "output, [num_ranks, num_ranks], [src][dst], inclusive over src") \
    FIELD(int, num_tokens, "of the dispatch that follows, which must not be refused once its counts are out") \
    FIELD(uint32_t, row_bytes, "likewise") \
    FIELD(int, num_topk, "likewise") \
    FIELD(int, num_scales, "likewise")

#define EP_DISPATCH_ARGS(FIELD) \
    FIELD(const uint8_t*, x, "[num_tokens, row_bytes]") \
    FIELD(int, num_tokens, "") \
    FIELD(uint32_t, row_bytes, "a multiple of 16, below 2 GiB") \
    FIELD(const uint32_t*, scales, "any 4-byte type") \
    FIELD(int, num_scales, "of a token; 0: none") \
    FIELD(int64_t, scale_stride_token, "in elements") \
    FIELD(int64_t, scale_stride_scale, "in elements") \
    FIELD(const void*, topk_idx, "[num_tokens, num_topk]") \
    FIELD(const float*, topk_weights, "[num_tokens, num_topk]") \
    FIELD(int, num_topk, "0: none") \
    FIELD(int, idx_bytes, "4 or 8") \
    FIELD(int, num_experts, "of all ranks") \
    FIELD(bool, is_cached, "the routing is that of an earlier call: the next three are none") \
    FIELD(const int*, num_tokens_per_rank, "none: notify_dispatch has exchanged the counts; else this call does") \
    FIELD(const int*, num_tokens_per_expert, "likewise") \
    FIELD(const uint8_t*, is_token_in_rank, "bool [num_tokens, num_ranks]") \
    FIELD(int*, rank_prefix_matrix, "[num_ranks, num_ranks]; output where this call exchanges the counts") \
    FIELD(int*, send_head, "[num_tokens, num_ranks]: place among those sent there, -1: not sent; output unless cached") \
    FIELD(uint8_t*, recv_x, "output, [num_recv_rows, row_bytes]") \
    FIELD(uint32_t*, recv_scales, "output, [num_recv_rows, num_scales]") \
    FIELD(void*, recv_topk_idx, "output, [num_recv_rows, num_topk]") \
    FIELD(float*, recv_topk_weights, "output, [num_recv_rows, num_topk]") \
    FIELD(int*, recv_src_idx, "output, [num_recv_rows]; none: the caller has it already") \
    FIELD(int, num_recv_rows, "that the outputs hold") \
    FIELD(bool, is_worst_case, "fewer rows may arrive: the rest of recv_topk_idx is -1, of recv_topk_weights 0") \
    FIELD(int, expert_alignment, "> 0: this call exchanges counts, num_recv_rows is a guess, wait_counts follows")

// Across nodes: N nodes of L ranks, R in all. What is [num_ranks, num_ranks] inside a node is [R, L] there, [src][index of
// dst in this node]; what is by rank is by all R. These come on top.
#define EP_INTERNODE_NOTIFY_ARGS(FIELD) \
    FIELD(const int*, num_tokens_per_node, "[N], the own node's is not used") \
    FIELD(int*, recv_rank_prefix, "output, [R]: rows that come here, inclusive over the sources") \
    FIELD(int*, rail_prefix, "output, [N]: tokens to forward for the rail peers, inclusive; the own node adds 0")

#define EP_INTERNODE_DISPATCH_ARGS(FIELD) \
    FIELD(const int*, rail_prefix, "[N], of the count exchange") \
    FIELD(int*, send_rail_head, "[num_tokens, N]: place in that stream, -1: none or own node; output unless cached") \
    FIELD(int*, rail_head, "[num_rail_rows, L]: place of a forwarded token at each rank, or -1; output unless cached") \
    FIELD(int, num_rail_rows, "that rail_head holds")

#define EP_INTERNODE_COMBINE_ARGS(FIELD) \
    FIELD(const int*, rail_prefix, "[N], of the count exchange") \
    FIELD(const int*, send_rail_head, "[num_tokens, N], of the dispatch") \
    FIELD(const int*, rail_head, "[num_rail_tokens, L], of the dispatch") \
    FIELD(int, num_rail_tokens, "that rail_head holds")

#define EP_COMBINE_ARGS(FIELD) \
    FIELD(const uint8_t*, x, "bfloat16 [num_rows, hidden]") \
    FIELD(int, num_rows, "") \
    FIELD(int, hidden, "") \
    FIELD(const float*, topk_weights, "[num_rows, num_topk]") \
    FIELD(int, num_topk, "0: no weights") \
    FIELD(Biases, bias, "bfloat16 [num_tokens, hidden] each, or none") \
    FIELD(const int*, rank_prefix_matrix, "of the dispatch") \
    FIELD(const int*, send_head, "of the dispatch") \
    FIELD(int, num_tokens, "") \
    FIELD(uint8_t*, combined_x, "output, bfloat16 [num_tokens, hidden]") \
    FIELD(float*, combined_topk_weights, "output, [num_tokens, num_topk]")

// Low latency: R ranks, El local experts, T = num_max_tokens, K = num_topk. First what every call has.
#define EP_LOW_LATENCY_ARGS(FIELD) \
    FIELD(int, num_max_tokens, "T, of any rank") \
    FIELD(int, num_topk, "K") \
    FIELD(int, num_experts, "of all ranks") \
    FIELD(int, hidden, "") \
    FIELD(int64_t*, wait_stats, "[R], the longest wait for each source is added, in ns; or none") \
    FIELD(uint64_t*, number, "on the device: what a send phase of its own leaves for the receive phase")

#define EP_LOW_LATENCY_DISPATCH_ARGS(FIELD) \
    FIELD(bool, is_fp8, "rows travel as FP8") \
    FIELD(bool, rounds_scales, "to powers of two") \
    FIELD(bool, packs_scales, "four exponents (UE8M0) in a word") \
    FIELD(const uint8_t*, x, "bfloat16 [num_tokens, hidden]") \
    FIELD(const void*, topk_idx, "[num_tokens, K]") \
    FIELD(int, idx_bytes, "4 or 8") \
    FIELD(int, num_tokens, "") \
    FIELD(uint8_t*, recv_x, "output, [El, R * T, hidden] bfloat16 or FP8") \
    FIELD(uint32_t*, recv_scales, "output, memory order [El, hidden/128 (/512 packed), R * T]") \
    FIELD(int*, recv_count, "output, [El]") \
    FIELD(int*, src_info, "output, [El, R * T]: index of the token at its source") \
    FIELD(int64_t*, layout_range, "output, [El, R]: first row << 32 | number of rows, of local expert e from source s") \
    FIELD(int*, row_of_entry, "output, [R, T, K]: row of (source, token, k), -1: not here; for combine") \
    FIELD(int*, cumulative_stats, "[El], counts are added; or none")

#define EP_LOW_LATENCY_COMBINE_ARGS(FIELD) \
    FIELD(bool, uses_logfmt, "on the wire; see device/algo/formats.h") \
    FIELD(const uint8_t*, x, "bfloat16 [El, R * T, hidden]") \
    FIELD(const void*, topk_idx, "[num_tokens, K]") \
    FIELD(int, idx_bytes, "4 or 8") \
    FIELD(const float*, topk_weights, "[num_tokens, K]") \
    FIELD(int, num_tokens, "") \
    FIELD(const int*, row_of_entry, "of the dispatch") \
    FIELD(uint8_t*, combined_x, "output, bfloat16 [num_tokens, hidden]")
// clang-format on

struct LayoutArgs {
    EP_LAYOUT_ARGS(EP_FIELD)
};
struct NotifyArgs {
    EP_NOTIFY_ARGS(EP_FIELD)
};
struct DispatchArgs {
    EP_DISPATCH_ARGS(EP_FIELD)
};
struct CombineArgs {
    EP_COMBINE_ARGS(EP_FIELD)
};

struct InternodeNotifyFields {
    EP_INTERNODE_NOTIFY_ARGS(EP_FIELD)
};
struct InternodeDispatchFields {
    EP_INTERNODE_DISPATCH_ARGS(EP_FIELD)
};
struct InternodeCombineFields {
    EP_INTERNODE_COMBINE_ARGS(EP_FIELD)
};
struct InternodeNotifyArgs : NotifyArgs, InternodeNotifyFields {};
struct InternodeDispatchArgs : DispatchArgs, InternodeDispatchFields {};
struct InternodeCombineArgs : CombineArgs, InternodeCombineFields {};

struct LowLatencyArgs {
    EP_LOW_LATENCY_ARGS(EP_FIELD)
};
struct LowLatencyDispatchFields {
    EP_LOW_LATENCY_DISPATCH_ARGS(EP_FIELD)
};
struct LowLatencyCombineFields {
    EP_LOW_LATENCY_COMBINE_ARGS(EP_FIELD)
};
struct LowLatencyDispatchArgs : LowLatencyArgs, LowLatencyDispatchFields {};
struct LowLatencyCombineArgs : LowLatencyArgs, LowLatencyCombineFields {};

// -- What the runtime adds -------------------------------------------------------------------------------------------
// The parameters of an operation are its plan and its arguments, as bases: neither is copied field by field.

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

struct LayoutGrid {
    int num_blocks, num_threads;
};
struct LayoutPlan {
    int num_ranks;
    int* partials;  // [num_ranks + num_experts + num_nodes, kMaxLayoutBlocks]
    LayoutGrid grid;
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

// -- What launches them ------------------------------------------------------------------------------------------------
// The runtime picks the table of a back end by device; nothing else knows that there are two.

// Each with its parameters, and here the only list of them. An operation is launched by the overload of launch() for its parameters,
// at the end of its file; all are asynchronous, in stream order.
#define EP_OPERATIONS_IN_A_NODE(OPERATION)                    \
    OPERATION(layout, LayoutParams)                           \
    OPERATION(notify_dispatch, NotifyDispatchParams)          \
    OPERATION(dispatch, DispatchParams)                       \
    OPERATION(combine, CombineParams)                         \
    OPERATION(low_latency_dispatch, LowLatencyDispatchParams) \
    OPERATION(low_latency_combine, LowLatencyCombineParams)   \
    OPERATION(low_latency_clean, LowLatencyCall)
// Over the engine that the table was compiled for.
#define EP_OPERATIONS_ACROSS_NODES(OPERATION)              \
    OPERATION(internode_notify, InternodeNotifyParams)     \
    OPERATION(internode_dispatch, InternodeDispatchParams) \
    OPERATION(internode_combine, InternodeCombineParams)
// The same, of kernels that are compiled once more: see device/compiler.h.
#define EP_LOW_LATENCY_ACROSS_NODES(OPERATION)                          \
    OPERATION(internode_low_latency_dispatch, LowLatencyDispatchParams) \
    OPERATION(internode_low_latency_combine, LowLatencyCombineParams)   \
    OPERATION(internode_low_latency_clean, LowLatencyCall)
#define EP_OPERATIONS(OPERATION)          \
    EP_OPERATIONS_IN_A_NODE(OPERATION)    \
    EP_OPERATIONS_ACROSS_NODES(OPERATION) \
    EP_LOW_LATENCY_ACROSS_NODES(OPERATION)

#define EP_PARAMS(name, Params) struct Params;
EP_OPERATIONS(EP_PARAMS)
#undef EP_PARAMS

#define EP_ENTRY(name, Params) void (*name)(const Params& params, dev::Stream stream);
struct KernelTable {
    EP_OPERATIONS(EP_ENTRY)
};
#undef EP_ENTRY

const KernelTable& simt_kernel_table();
const KernelTable& cuda_kernel_table();  // only where EP_WITH_CUDA

#define EP_LAUNCH(name, Params) void launch(const Params& params, dev::Stream stream);
inline namespace EP_BACKEND {
EP_OPERATIONS_IN_A_NODE(EP_LAUNCH)
EP_OPERATIONS_ACROSS_NODES(EP_LAUNCH)
}  // namespace EP_BACKEND
#if !defined(EP_ACROSS_NODES)
namespace EP_NODES_BACKEND {
EP_LOW_LATENCY_ACROSS_NODES(EP_LAUNCH)
}
#endif
#undef EP_LAUNCH

}  // namespace deep_ep::kernels
