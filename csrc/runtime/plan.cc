#include "runtime/plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"
#include "kernels/params_internode.h"

namespace deep_ep::runtime {

namespace {

// A lane stands for each rank and each bias.
constexpr int kMaxStagedRanks = 32 - kernels::kMaxBiases;
constexpr int kMaxStages = 4;
constexpr int kReduceWarps = 8;

// Of a combine that sends through stages and sums by ordinary loads, which has few stages: ordinary loads are under way in what
// stages leave of the SM's memory.
constexpr int kMixedBlocks = 20;
constexpr int kMixedSendWarps = 5;
constexpr int kMixedReduceWarps = 12;
constexpr int kMixedTokens = 4;  // of each reduce warp

// Of a combine whose rows are added where they are: the blocks that send, in 16ths, and the most that are of use
// (docs/performance/intranode.md, step 39).
constexpr int kAddingSendShare = 8;
constexpr int kMaxAddingSendBlocks = 9;

// Of a combine between two ranks: so many bytes of slots in a bank are still in the L2 when they are summed. More are slower
// (docs/performance/intranode.md, step 46).
constexpr uint64_t kCachedSlotBytes = 9 << 20;

// Of a dispatch to lenders. More blocks are slower, from here on to twice as many: own stores queue behind remote ones.
constexpr int kLentSendWarps = 20;
constexpr uint64_t kLongRowBytes = 8192;
constexpr int kBlocksOfLongRows = 14;
constexpr int kBlocksOfRows = 15;

constexpr int kStreamsOfWarp = 32;  // a lane stands for each
constexpr int kUsualTopk = 8;       // where a call across nodes does not say

constexpr int kMinLowLatencyWarps = 4;
constexpr int kSetBytes = 32 * 1024;  // of shared memory, for a tile of the routing table

// Of a rail window where the caller names no size: for each other node at least so much.
constexpr uint64_t kLeastRailBytes = 16 << 20;

// A NIC of 400 Gb/s, and between what chunks are worth having.
constexpr double kUsualRailGbPerS = 50.0;
constexpr double kLeastChunkBytes = 32 << 10;
constexpr double kMostChunkBytes = 4 << 20;

int divide_up(int count, int by) { return (count + by - 1) / by; }

kernels::Geometry without_stages(int num_blocks, int num_send_warps, int num_recv_warps) {
    return {.num_blocks = num_blocks,
            .num_send_warps = num_send_warps,
            .num_recv_warps = num_recv_warps,
            .send = {},
            .recv = {}};
}

// Rows through registers: enough warps for the streams, and enough warps to have many loads under way.
kernels::Geometry plan_plain(const Machine& machine, int num_sms, int max_threads) {
    const int warps = std::min(max_threads, machine.useful_block_threads) / 32 / 2;
    const int least = divide_up(machine.num_ranks - 1, warps * kStreamsOfWarp);
    return without_stages(std::max(least, std::clamp(num_sms, 1, machine.num_sms)), warps, warps);
}

// Whether staged kernels can run this geometry: lanes stand for ranks, and a warp has one peer at most.
bool can_stage(const Machine& machine, const kernels::Geometry& geometry) {
    const auto has_enough = [&](int num_warps) {
        return num_warps == 0 || geometry.num_blocks * num_warps >= machine.num_ranks - 1;
    };
    return machine.has_bulk_copy && machine.num_ranks <= kMaxStagedRanks && has_enough(geometry.num_send_warps) &&
           has_enough(geometry.num_recv_warps);
}

// As DataSplit counts them: a rank without neighbours has nobody to lend to.
uint64_t num_lending_ranks(const layout::Topology& topology) {
    return static_cast<uint64_t>(topology.ranks_per_node > 1 ? topology.num_ranks : 1);
}

// The smallest data region with which calls of such slots work.
uint64_t data_bytes_for(const HeapPlan& heap, const layout::SlotLayout& slot) {
    const uint64_t slots =
        layout::WindowLayout::bytes_for(static_cast<uint64_t>(heap.topology.ranks_per_node), slot.bytes, 1,
                                        static_cast<uint64_t>(heap.topology.num_nodes()));
    return heap.lends_part_of_data() ? layout::DataSplit::bytes_for(slots, 0, num_lending_ranks(heap.topology)) : slots;
}

// Rows that the roles of a call across nodes read and write, for each token of a rank. Of a dispatch, whose rows a combine takes
// the other way: `own` sends tokens, `forward` passes them on from the rail, `streams` takes them out of slots.
struct RoleRows {
    double own, forward, streams;
};

// As if each of a token's entries chose among the ranks by lot. What a combine's forwarders put onto the rail counts twice, since
// they are the slower ones (2 x H200, two nodes of one: 9 warps that reduce and 7 that forward 451 us, 8 and 8 416).
RoleRows count_role_rows(const layout::Topology& topology, int num_topk, bool has_streams, bool is_combine) {
    const int num_entries = num_topk > 0 ? num_topk : kUsualTopk;
    const auto num_chosen = [&](int count) { return count * (1 - std::pow(1 - 1.0 / count, num_entries)); };
    const double own_share = 1.0 / topology.num_nodes();
    const double ranks = num_chosen(topology.num_ranks);
    const double other_nodes = num_chosen(topology.num_nodes()) * (1 - own_share);
    const double from_neighbours = ranks * (topology.ranks_per_node - 1) / topology.ranks_per_node;
    return {1 + ranks * own_share + other_nodes, other_nodes * (is_combine ? 2 : 1) + ranks * (1 - own_share),
            has_streams ? 2 * from_neighbours : 0};
}

// Shares the warps of a block between the roles by their rows. Each role that has work gets the warps that its streams need.
struct RoleWarps {
    int own, forward, streams;
};
RoleWarps share_warps(int num_warps, const RoleRows& rows, const RoleWarps& least) {
    const int num_free = num_warps - least.own - least.forward - least.streams;
    const double all = rows.own + rows.forward + rows.streams;
    const int forward = static_cast<int>(std::lround(num_free * rows.forward / all));
    const int streams = std::min(num_free - forward, static_cast<int>(std::lround(num_free * rows.streams / all)));
    return {least.own + num_free - forward - streams, least.forward + forward, least.streams + streams};
}

struct RolePlan {
    int num_blocks;
    RoleWarps warps;
};
RolePlan plan_roles(const Machine& machine, const layout::Topology& topology, int num_sms, int max_threads,
                    const RoleRows& rows) {
    const int num_warps = std::max(3, std::min(max_threads, machine.useful_block_threads) / 32);
    const int num_streams = topology.num_nodes() * (topology.ranks_per_node - 1);
    int num_blocks = std::clamp(num_sms, 1, machine.num_sms);
    const auto least = [&] {
        const int served = num_blocks * kStreamsOfWarp;
        return RoleWarps{1, divide_up(topology.num_nodes() - 1, served),
                         rows.streams > 0 ? divide_up(num_streams, served) : 0};
    };
    const auto fits = [&] { return least().own + least().forward + least().streams <= num_warps; };
    while (!fits() && num_blocks < machine.num_sms) ++num_blocks;
    EP_CHECK(fits(), "a group of ", topology.num_ranks, " ranks on ", topology.num_nodes(),
             " nodes has more streams than a device with ", machine.num_sms, " SMs can serve");
    return {num_blocks, share_warps(num_warps, rows, least())};
}

}  // namespace

Machine Machine::of(const dev::Device& device, int num_ranks, dev::Placement heap) {
    return {.is_gpu = device.kind() == dev::DeviceKind::kCuda,
            .num_sms = device.num_sms(),
            .useful_block_threads = device.useful_block_threads(),
            .max_shared_bytes = device.max_shared_bytes(),
            .has_bulk_copy = device.has_bulk_copy() && heap == dev::Placement::kDevice,
            .num_ranks = num_ranks};
}

layout::LowLatencyShares low_latency_shares(const BufferOptions& options) {
    const layout::Topology topology = options.topology();
    return layout::LowLatencyShares::make(static_cast<uint64_t>(options.num_low_latency_bytes),
                                          static_cast<uint64_t>(topology.num_ranks),
                                          static_cast<uint64_t>(topology.ranks_per_node));
}

HeapPlan plan_heap(const BufferOptions& options) {
    HeapPlan heap{};
    heap.topology = options.topology();
    heap.control = layout::ControlLayout::make(static_cast<uint64_t>(heap.topology.ranks_per_node),
                                               static_cast<uint64_t>(heap.topology.num_nodes()));
    heap.num_data_bytes = static_cast<uint64_t>(options.num_data_bytes);
    heap.num_low_latency_bytes = heap.topology.num_nodes() == 1 ? static_cast<uint64_t>(options.num_low_latency_bytes)
                                                                : low_latency_shares(options).heap();
    heap.low_latency_offset = heap.control.bytes + heap.num_data_bytes;
    const uint64_t end = heap.low_latency_offset + heap.num_low_latency_bytes;
    layout::DataSplit split{heap.num_data_bytes, 0, 0};
    heap.weights_offset = heap.num_bytes = end;
    if (options.num_lend_bytes == kLendPartOfData) {
        split = layout::DataSplit::make(heap.num_data_bytes, num_lending_ranks(heap.topology));
        heap.weights_offset = heap.control.bytes + split.slot_bytes;
    } else if (options.num_lend_bytes > 0) {
        split.lend_bytes = static_cast<uint64_t>(options.num_lend_bytes);
        split.weight_bytes =
            layout::align_up(split.lend_bytes / layout::DataSplit::kWeightShare, layout::DataSplit::kAlignment);
        heap.weights_offset = layout::align_up(end, layout::DataSplit::kAlignment);
        heap.num_bytes = heap.weights_offset + split.weight_bytes + split.lend_bytes;
    }
    heap.num_slot_bytes = split.slot_bytes;
    heap.num_weight_bytes = split.weight_bytes;
    heap.lend_offset = heap.weights_offset + split.weight_bytes;
    heap.num_lend_bytes = split.lend_bytes;
    return heap;
}

// Where the caller leaves it to us, rows get as much room on the rail as they have between neighbours. What is asked for with the
// low-latency mode is meant for that, and most callers need less for the other one.
RailRegion plan_rail(const BufferOptions& options) {
    const layout::Topology topology = options.topology();
    if (topology.num_nodes() == 1) return {};
    const auto num_nodes = static_cast<uint64_t>(topology.num_nodes());
    const uint64_t own = std::max(static_cast<uint64_t>(options.num_data_bytes), (num_nodes - 1) * kLeastRailBytes);
    const bool has_low_latency = options.num_low_latency_bytes > 0;
    const auto asked = static_cast<uint64_t>(options.num_rail_bytes);
    RailRegion region{layout::RailControl::make(num_nodes, static_cast<uint64_t>(topology.ranks_per_node)),
                      asked == 0        ? own
                      : has_low_latency ? std::min(asked, own)
                                        : asked,
                      {},
                      {}};
    if (has_low_latency) {
        const uint64_t begin = layout::align_up(region.control.bytes + region.num_data_bytes, 4096);
        region.low_latency_control =
            layout::LowLatencyRailControl::make(begin, static_cast<uint64_t>(topology.num_ranks));
        region.low_latency =
            layout::LowLatencyRailRegion::make(region.low_latency_control.end, low_latency_shares(options));
    }
    return region;
}

layout::RailWindow plan_rail_window(const RailRegion& rail, int num_nodes, const layout::SlotLayout& slot,
                                    size_t chunk_bytes, const char* operation) {
    const auto nodes = static_cast<uint64_t>(num_nodes);
    const auto window = layout::RailWindow::make(rail.num_data_bytes, nodes, slot.bytes, chunk_bytes);
    EP_CHECK(window.num_chunks > 0, "num_rdma_bytes is too small for this ", operation, ": expected at least ",
             layout::RailWindow::bytes_for(nodes, slot.bytes, 1), ", got ", rail.num_data_bytes,
             " (see Config.get_rdma_buffer_size_hint)");
    return window;
}

size_t plan_chunk_bytes(size_t engine_bytes, double rail_gb_per_s) {
    if (rail_gb_per_s <= 0) return engine_bytes;
    const double scaled = static_cast<double>(engine_bytes) * std::sqrt(rail_gb_per_s / kUsualRailGbPerS);
    const double rounded = std::exp2(std::round(std::log2(scaled)));
    return static_cast<size_t>(std::clamp(rounded, kLeastChunkBytes, kMostChunkBytes));
}

void check_num_tokens(int num_tokens) {
    EP_CHECK(num_tokens >= 0 && num_tokens < layout::kMaxTokens - 1, "number of tokens must be below ",
             layout::kMaxTokens - 1, ", got ", num_tokens);
}

void check_dispatch_rows(int num_tokens, int64_t row_bytes) {
    check_num_tokens(num_tokens);
    EP_CHECK(row_bytes > 0 && row_bytes % 16 == 0, "a row must be a positive multiple of 16 bytes, got ", row_bytes);
    EP_CHECK(row_bytes < int64_t{1} << 31, "a row must be below 2 GiB, got ", row_bytes, " bytes");
}

uint32_t check_combine_rows(int num_tokens, int hidden) {
    const int64_t row_bytes = int64_t{hidden} * 2;
    check_dispatch_rows(num_tokens, row_bytes);
    return static_cast<uint32_t>(row_bytes);
}

void check_num_experts(int num_experts, int num_ranks) {
    EP_CHECK(num_experts > 0 && num_experts % num_ranks == 0,
             "num_experts must be a positive multiple of the number of ranks (", num_ranks, "), got ", num_experts);
}

int max_layout_counts(const Machine& machine) {
    const int fitting = machine.max_shared_bytes / static_cast<int>(sizeof(int));
    return std::min(fitting, machine.num_ranks * (2 + layout::kMaxLocalExperts));
}

kernels::LayoutGrid plan_layout(const Machine& machine, int num_tokens) {
    const int max_blocks = std::min(kernels::kMaxLayoutBlocks, machine.num_sms);
    const int num_threads = std::min(kernels::kMaxLayoutThreads, machine.useful_block_threads);
    return {std::clamp((num_tokens + num_threads - 1) / num_threads, 1, max_blocks), num_threads};
}

// Send warps have stages where each of them gets two; fewer warps would move less than registers do. A rank that lends
// its outputs receives nothing by itself: all warps send, through registers, in no more blocks than are of use
// (docs/performance/intranode.md, steps 9 and 27).
kernels::Geometry plan_dispatch(const Machine& machine, int num_sms, const layout::SlotLayout& slot, bool is_lent) {
    kernels::Geometry plain = plan_plain(machine, num_sms, 32 * kernels::kMaxDispatchWarps);
    if (is_lent) {
        plain.num_send_warps = std::min(kLentSendWarps, machine.useful_block_threads / 32);
        plain.num_recv_warps = 0;
        plain.num_blocks =
            std::min(plain.num_blocks, slot.row.bytes() > kLongRowBytes ? kBlocksOfLongRows : kBlocksOfRows);
        return plain;
    }
    const layout::Staging stage{1, static_cast<int>(layout::bulk_bytes(slot.scales.end())) + layout::kPositionBytes};
    kernels::Geometry staged = plain;
    const int room = machine.max_shared_bytes - kernels::kMaxDispatchState;
    staged.send = {std::min(room / (plain.num_send_warps * stage.bytes()), kMaxStages), stage.stage_bytes};
    return staged.send.num_stages >= 2 && can_stage(machine, staged) ? staged : plain;
}

// Reduce warps have stages of a fixed size; send warps get the rest. A rank that lends its input sends nothing, and reduces by
// ordinary loads, unless each warp has one token only, or biases are further rows of each token
// (docs/performance/intranode.md, step 28).
kernels::Geometry plan_combine(const Machine& machine, int num_sms, const layout::SlotLayout& slot, bool is_lent,
                               bool has_bias, int num_tokens) {
    kernels::Geometry plain = plan_plain(machine, num_sms, 32 * kernels::kMaxCombineWarps);
    plain.num_recv_warps =
        std::min(kernels::kMaxCombineWarps, machine.useful_block_threads / 32) - plain.num_send_warps;
    kernels::Geometry staged = plan_plain(machine, num_sms, 32 * kernels::kMaxStagedCombineWarps);
    const int room = machine.max_shared_bytes - kernels::kMaxCombineState;
    staged.recv = {layout::kReduceStages, layout::kReduceStageBytes};
    if (is_lent) {
        plain.num_recv_warps += std::exchange(plain.num_send_warps, 0);
        staged.num_recv_warps += std::exchange(staged.num_send_warps, 0);
        const bool fits = staged.num_recv_warps * staged.recv.bytes() <= room && can_stage(machine, staged);
        const bool is_small = num_tokens <= staged.num_recv_warps * staged.num_blocks;
        return fits && (has_bias || is_small) ? staged : plain;
    }
    if (machine.is_gpu) staged.num_recv_warps = kReduceWarps;
    const layout::Staging send{1, static_cast<int>(layout::bulk_bytes(slot.topk_weights.end()))};
    const int fitting = (room - staged.num_recv_warps * staged.recv.bytes()) / send.bytes();
    const int max_warps = std::min(kernels::kMaxStagedCombineWarps, machine.useful_block_threads / 32);
    staged.num_send_warps = std::min(max_warps - staged.num_recv_warps, fitting / 2);
    if (staged.num_send_warps <= 0) return plain;
    staged.send = {std::min(fitting / staged.num_send_warps, kMaxStages), send.stage_bytes};
    if (!can_stage(machine, staged)) return plain;
    // Between two ranks that have many tokens and blocks rows are staged on their way out alone (step 33).
    const int num_warps = std::min(kernels::kMaxCombineWarps, machine.useful_block_threads / 32);
    plain.num_send_warps = std::min({kMixedSendWarps, num_warps / 2, room / (2 * send.bytes())});
    plain.num_recv_warps = std::min(kMixedReduceWarps, num_warps - plain.num_send_warps);
    plain.send = {2, send.stage_bytes};
    const bool is_large = num_tokens >= kMixedTokens * plain.num_recv_warps * plain.num_blocks;
    return machine.num_ranks == 2 && plain.num_blocks >= kMixedBlocks && is_large && !has_bias ? plain : staged;
}

std::optional<kernels::Geometry> plan_adding_combine(const Machine& machine, int num_sms) {
    const int num_blocks = std::clamp(num_sms, 1, machine.num_sms);
    if (machine.num_ranks != 2 || !machine.has_bulk_copy || num_blocks < 2) return std::nullopt;
    const int num_warps = std::min(kernels::kMaxAddingCombineWarps, machine.useful_block_threads / 32);
    const int num_send_blocks = std::clamp(num_blocks * kAddingSendShare / 16, 1, kMaxAddingSendBlocks);
    return kernels::Geometry{.num_blocks = num_blocks,
                             .num_send_warps = num_warps,
                             .num_recv_warps = num_warps,
                             .send = {},
                             .recv = {},
                             .num_send_blocks = num_send_blocks};
}

InternodeGeometry plan_internode_dispatch(const Machine& machine, const layout::Topology& topology, int num_topk,
                                          int num_sms, bool receives_nothing) {
    const RolePlan plan = plan_roles(machine, topology, num_sms, kernels::kMaxInternodeDispatchThreads,
                                     count_role_rows(topology, num_topk, !receives_nothing, false));
    return {without_stages(plan.num_blocks, plan.warps.own, plan.warps.streams), plan.warps.forward};
}

InternodeGeometry plan_internode_combine(const Machine& machine, const layout::Topology& topology, int num_topk,
                                         int num_sms, bool sends_nothing) {
    const RolePlan plan = plan_roles(machine, topology, num_sms, kernels::kMaxInternodeCombineThreads,
                                     count_role_rows(topology, num_topk, !sends_nothing, true));
    return {without_stages(plan.num_blocks, plan.warps.streams, plan.warps.own), plan.warps.forward};
}

int plan_notify_threads(const Machine& machine) {
    return std::min(kernels::kMaxNotifyThreads, machine.useful_block_threads);
}

layout::WindowLayout plan_window(const HeapPlan& heap, const layout::SlotLayout& slot, const char* operation) {
    const auto num_ranks = static_cast<uint64_t>(heap.topology.ranks_per_node);
    const auto window = layout::WindowLayout::make(heap.num_slot_bytes, num_ranks, slot.bytes,
                                                   static_cast<uint64_t>(heap.topology.num_nodes()));
    EP_CHECK(num_ranks == 1 || window.window > 0, "num_nvl_bytes is too small for this ", operation,
             ": expected at least ", data_bytes_for(heap, slot), ", got ", heap.num_data_bytes,
             " (see Config.get_nvl_buffer_size_hint)");
    return window;
}

layout::WindowLayout plan_combine_window(const Machine& machine, const HeapPlan& heap, const layout::SlotLayout& slot) {
    layout::WindowLayout window = plan_window(heap, slot, "combine");
    if (machine.num_ranks == 2 && machine.has_bulk_copy)
        window.window = std::min(window.window, std::max(1, static_cast<int>(kCachedSlotBytes / slot.bytes)));
    return window;
}

// A warp for every chunk of a row, and one block on an SM. Kernels of ranks that share a GPU wait for each other, so all of
// them have to fit.
LowLatencyGrid plan_low_latency(const Machine& machine, int num_ranks_here, int hidden) {
    const int most = std::min(kernels::kMaxLowLatencyThreads / 32, machine.useful_block_threads / 64);
    const int num_warps =
        std::clamp((hidden + kLowLatencyChunk - 1) / kLowLatencyChunk, std::min(kMinLowLatencyWarps, most), most);
    return {std::max(1, machine.num_sms / num_ranks_here), num_warps};
}

int plan_parts(const kernels::LowLatencyCall& call, int num_tokens, int most) {
    return std::clamp(call.num_blocks * call.num_warps / std::max(1, num_tokens), 1, most);
}

// For each expert a bit for every token, where that is not too much: else the table is made tile by tile.
int plan_set_words(const kernels::LowLatencyArgs& args, int num_tokens) {
    const int fitting = kSetBytes / static_cast<int>(sizeof(uint32_t)) / (args.num_experts + 32 * args.num_topk);
    return std::clamp(std::min((num_tokens + 31) / 32, fitting), 1, layout::kMaxLowLatencyTokens / 32);
}

}  // namespace deep_ep::runtime
