// Decisions that follow from sizes alone: how the heap is divided, and how many threads work on a call through what. Free
// functions of plain values; nothing here launches, allocates or remembers.
#pragma once

#include <cstdint>
#include <optional>

#include "device/runtime.h"
#include "kernels/params.h"
#include "kernels/params_low_latency.h"
#include "layout/rail.h"
#include "layout/topology.h"
#include "runtime/options.h"

namespace deep_ep::runtime {

// What plans depend on beside the call.
struct Machine {
    bool is_gpu;
    int num_sms;
    int useful_block_threads;
    int max_shared_bytes;  // dynamic, of a block
    bool has_bulk_copy;    // that pays: to and from host memory none does
    int num_ranks;

    static Machine of(const dev::Device& device, int num_ranks, dev::Placement heap);
};

// Where things are in the heap of a rank: control words, data of the high-throughput mode, data of the low-latency mode;
// and either at the end of the first data or behind everything: a copy of combine's weights, then what is lent.
struct HeapPlan {
    layout::Topology topology;
    layout::ControlLayout control;
    uint64_t num_bytes;
    uint64_t num_data_bytes;
    uint64_t num_slot_bytes;  // of the data, from its start
    uint64_t low_latency_offset, num_low_latency_bytes;
    uint64_t weights_offset, num_weight_bytes;
    uint64_t lend_offset, num_lend_bytes;

    bool lends_part_of_data() const { return num_slot_bytes < num_data_bytes; }
};
HeapPlan plan_heap(const BufferOptions& options);
// Of num_low_latency_bytes, where there are several nodes.
layout::LowLatencyShares low_latency_shares(const BufferOptions& options);

// The rail window of a rank, where there are several nodes: control words, then data; then the same of the low-latency mode.
struct RailRegion {
    layout::RailControl control;
    uint64_t num_data_bytes;
    layout::LowLatencyRailControl low_latency_control;
    layout::LowLatencyRailRegion low_latency;

    bool has_low_latency() const { return low_latency.receive_bytes > 0; }
    uint64_t num_bytes() const { return has_low_latency() ? low_latency.end() : control.bytes + num_data_bytes; }
};
RailRegion plan_rail(const BufferOptions& options);

// Throws where not even one slot of each stream has room. `chunk_bytes`: what the engine likes best.
layout::RailWindow plan_rail_window(const RailRegion& rail, int num_nodes, const layout::SlotLayout& slot,
                                    size_t chunk_bytes, const char* operation);

// What a put should have, where the engine likes `engine_bytes` best on a NIC of 50 GB/s and this one has another rate (0: not
// known). The first chunk and the last have the rail for themselves, and each message costs the same time whatever it carries:
// the sum of both is least at the square root of the rate.
size_t plan_chunk_bytes(size_t engine_bytes, double rail_gb_per_s);

// Throws where a call cannot have so many tokens, or such rows. A combine's rows, in bytes.
void check_num_tokens(int num_tokens);
void check_dispatch_rows(int num_tokens, int64_t row_bytes);
uint32_t check_combine_rows(int num_tokens, int hidden);

// The slots of a call, from its arguments.
template <class Args> layout::SlotLayout dispatch_slot(const Args& args) {
    return layout::SlotLayout::for_dispatch(args.row_bytes, static_cast<uint64_t>(args.num_topk),
                                            static_cast<uint64_t>(args.num_scales));
}
template <class Args> layout::SlotLayout combine_slot(const Args& args) {
    return layout::SlotLayout::for_combine(uint64_t{2} * static_cast<uint64_t>(args.hidden),
                                           static_cast<uint64_t>(args.num_topk));
}

// Throws unless every rank can have the same number of experts.
void check_num_experts(int num_experts, int num_ranks);

// Ranks, experts and nodes that one layout kernel can count: a block keeps all counts in shared memory.
int max_layout_counts(const Machine& machine);

kernels::LayoutGrid plan_layout(const Machine& machine, int num_tokens);

// `is_lent`: this rank lends what peers would send to it (dispatch), or fetch from it (combine).
kernels::Geometry plan_dispatch(const Machine& machine, int num_sms, const layout::SlotLayout& slot, bool is_lent);
kernels::Geometry plan_combine(const Machine& machine, int num_sms, const layout::SlotLayout& slot, bool is_lent,
                               bool has_bias, int num_tokens);
// Of a rank that lends its sums; nothing: here the peer's rows cannot be added where they are.
std::optional<kernels::Geometry> plan_adding_combine(const Machine& machine, int num_sms);

// Across nodes no warp has stages; others forward between the rail and the neighbours. The roles share the warps by the rows that
// each would move for even routing. Ranks that lend, and those without neighbours, leave out the role that has nothing to do.
struct InternodeGeometry {
    kernels::Geometry node;
    int num_forward_warps;  // in each block
};
InternodeGeometry plan_internode_dispatch(const Machine& machine, const layout::Topology& topology, int num_topk,
                                          int num_sms, bool receives_nothing);
InternodeGeometry plan_internode_combine(const Machine& machine, const layout::Topology& topology, int num_topk,
                                         int num_sms, bool sends_nothing);

// Of the one block that exchanges counts.
int plan_notify_threads(const Machine& machine);

// Throws where not even one slot of each stream has room.
layout::WindowLayout plan_window(const HeapPlan& heap, const layout::SlotLayout& slot, const char* operation);
// The same for combine inside a node, which may use fewer slots than there are.
layout::WindowLayout plan_combine_window(const Machine& machine, const HeapPlan& heap, const layout::SlotLayout& slot);

struct LowLatencyGrid {
    int num_blocks, num_warps;
};
LowLatencyGrid plan_low_latency(const Machine& machine, int num_ranks_here, int hidden);
// Warps that share each of `num_tokens` in a receive phase, so that all warps of the grid have work; at most `most`.
int plan_parts(const kernels::LowLatencyCall& call, int num_tokens, int most);
// Channels that a warp works on at once.
constexpr int kLowLatencyChunk = 512;

// Words of each set that a low-latency dispatch makes its routing table from.
int plan_set_words(const kernels::LowLatencyArgs& args, int num_tokens);

}  // namespace deep_ep::runtime
