// How the heap is divided, and who works on a call through what: decisions of sizes alone.
#include "runtime/plan.h"
#include "kernels/params_internode.h"

#include <doctest/doctest.h>

#include <algorithm>

#include "core/error.h"
#include "device/simt/device.h"

namespace deep_ep::runtime {
namespace {

Machine gpu(int num_ranks) {
    return {.is_gpu = true,
            .num_sms = 132,
            .useful_block_threads = 1024,
            .max_shared_bytes = 227 * 1024,
            .has_bulk_copy = true,
            .num_ranks = num_ranks};
}

Machine cpu(int num_ranks) {
    Machine machine = gpu(num_ranks);
    machine.is_gpu = false;
    machine.num_sms = 4;
    machine.useful_block_threads = 128;
    return machine;
}

TEST_CASE("plan: rows to and from a heap in host memory go through registers") {
    simt::Scheduler scheduler;
    const simt::SimtDevice device(scheduler, 0);
    CHECK(Machine::of(device, 2, dev::Placement::kDevice).has_bulk_copy);
    CHECK_FALSE(Machine::of(device, 2, dev::Placement::kHost).has_bulk_copy);
}

layout::SlotLayout dispatch_slot(uint64_t row_bytes) { return layout::SlotLayout::for_dispatch(row_bytes, 8, 56); }
layout::SlotLayout combine_slot(uint64_t row_bytes) { return layout::SlotLayout::for_combine(row_bytes, 8); }

BufferOptions options(int64_t num_lend_bytes) {
    return {.rank = 0,
            .num_ranks = 4,
            .num_data_bytes = 1 << 26,
            .num_low_latency_bytes = 1 << 16,
            .timeout_s = 1,
            .warn_s = 1,
            .is_shrinkable = false,
            .num_lend_bytes = num_lend_bytes};
}

int shared_bytes(const kernels::Geometry& geometry) {
    return geometry.num_send_warps * geometry.send.bytes() + geometry.num_recv_warps * geometry.recv.bytes();
}

bool is_staged(const kernels::Geometry& geometry) {
    return geometry.send.num_stages > 0 || geometry.recv.num_stages > 0;
}

TEST_CASE("the regions of the heap follow one another without overlap") {
    for (int64_t num_lend_bytes : {int64_t{0}, int64_t{1} << 18, kLendPartOfData}) {
        CAPTURE(num_lend_bytes);
        const HeapPlan heap = plan_heap(options(num_lend_bytes));
        CHECK_EQ(heap.low_latency_offset, heap.control.bytes + heap.num_data_bytes);
        const uint64_t end = heap.low_latency_offset + heap.num_low_latency_bytes;
        CHECK_EQ(heap.lend_offset, heap.weights_offset + heap.num_weight_bytes);
        CHECK_GE(heap.num_bytes, end);
        if (num_lend_bytes == kLendPartOfData) {
            CHECK(heap.lends_part_of_data());
            CHECK_GE(heap.weights_offset, heap.control.bytes + heap.num_slot_bytes);
            CHECK_LE(heap.lend_offset + heap.num_lend_bytes, heap.low_latency_offset);
            CHECK_EQ(heap.num_bytes, end);
        } else {
            CHECK_FALSE(heap.lends_part_of_data());
            CHECK_EQ(heap.num_slot_bytes, heap.num_data_bytes);
            CHECK_EQ(heap.num_lend_bytes, static_cast<uint64_t>(num_lend_bytes));
            CHECK_GE(heap.weights_offset, end);
            CHECK_EQ(heap.num_bytes, heap.lend_offset + heap.num_lend_bytes);
        }
    }
}

TEST_CASE("the SM budget is at least one and at most what the device has") {
    for (const auto& [asked, given] : {std::pair{-3, 1}, {0, 1}, {20, 20}, {132, 132}, {500, 132}}) {
        CHECK_EQ(plan_dispatch(gpu(8), asked, dispatch_slot(7168), false).num_blocks, given);
        CHECK_EQ(plan_combine(gpu(8), asked, combine_slot(14336), false, false, 4096).num_blocks, given);
    }
}

TEST_CASE("no geometry takes more threads or shared memory than a block has") {
    for (const Machine& machine : {gpu(2), gpu(8), gpu(30), cpu(2), cpu(8)}) {
        for (uint64_t row_bytes : {16, 256, 7168, 14336, 65536, 1 << 20}) {
            for (bool is_lent : {false, true}) {
                CAPTURE(row_bytes);
                CAPTURE(is_lent);
                const auto dispatch = plan_dispatch(machine, 20, dispatch_slot(row_bytes), is_lent);
                CHECK_LE(shared_bytes(dispatch) + kernels::kMaxDispatchState, machine.max_shared_bytes);
                CHECK_LE(dispatch.num_send_warps + dispatch.num_recv_warps, kernels::kMaxDispatchWarps);
                CHECK_GT(dispatch.num_send_warps, 0);
                for (bool has_bias : {false, true}) {
                    const auto combine = plan_combine(machine, 20, combine_slot(row_bytes), is_lent, has_bias, 4096);
                    CHECK_LE(shared_bytes(combine) + kernels::kMaxCombineState, machine.max_shared_bytes);
                    CHECK_LE(combine.num_send_warps + combine.num_recv_warps,
                             combine.recv.num_stages > 0 ? kernels::kMaxStagedCombineWarps : kernels::kMaxCombineWarps);
                    CHECK_GT(combine.num_recv_warps, 0);
                }
            }
        }
    }
}

TEST_CASE("who lends has no warps for what peers do themselves") {
    CHECK_EQ(plan_dispatch(gpu(8), 20, dispatch_slot(7168), true).num_recv_warps, 0);
    CHECK_EQ(plan_combine(gpu(8), 20, combine_slot(14336), true, false, 4096).num_send_warps, 0);
    CHECK_GT(plan_dispatch(gpu(8), 20, dispatch_slot(7168), false).num_recv_warps, 0);
    CHECK_GT(plan_combine(gpu(8), 20, combine_slot(14336), false, false, 4096).num_send_warps, 0);
}

TEST_CASE("lent rows are summed by ordinary loads, but for few tokens or biases") {
    const auto is_combine_staged = [](bool has_bias, int num_tokens) {
        return is_staged(plan_combine(gpu(2), 16, combine_slot(14336), true, has_bias, num_tokens));
    };
    CHECK_FALSE(is_combine_staged(false, 4096));
    CHECK(is_combine_staged(true, 4096));
    CHECK(is_combine_staged(false, 64));
}

TEST_CASE("between two ranks, with many blocks and tokens, rows are staged to be sent and not to be summed") {
    const auto sums_staged = [](int num_ranks, int num_sms, bool has_bias, int num_tokens) {
        const auto plan = plan_combine(gpu(num_ranks), num_sms, combine_slot(14336), false, has_bias, num_tokens);
        CHECK_GT(plan.send.num_stages, 0);
        return plan.recv.num_stages > 0;
    };
    CHECK_FALSE(sums_staged(2, 20, false, 4096));
    CHECK(sums_staged(2, 16, false, 4096));
    CHECK(sums_staged(2, 20, true, 4096));
    CHECK(sums_staged(2, 20, false, 256));
    CHECK(sums_staged(8, 20, false, 4096));
}

TEST_CASE("a dispatch to lenders takes no more blocks than are of use") {
    CHECK_EQ(plan_dispatch(gpu(2), 24, dispatch_slot(14336), true).num_blocks, 14);
    CHECK_EQ(plan_dispatch(gpu(2), 24, dispatch_slot(7168), true).num_blocks, 15);
    CHECK_EQ(plan_dispatch(gpu(2), 8, dispatch_slot(14336), true).num_blocks, 8);
    CHECK_EQ(plan_dispatch(gpu(2), 24, dispatch_slot(14336), false).num_blocks, 24);
}

TEST_CASE("rows go through registers where stages cannot be") {
    const auto staged = [](const Machine& machine, uint64_t row_bytes, int num_sms = 20) {
        const bool is_dispatch_staged = is_staged(plan_dispatch(machine, num_sms, dispatch_slot(row_bytes), false));
        CHECK_EQ(is_staged(plan_combine(machine, num_sms, combine_slot(row_bytes), false, false, 4096)),
                 is_dispatch_staged);
        return is_dispatch_staged;
    };
    CHECK(staged(gpu(8), 7168));
    CHECK_FALSE(staged(gpu(8), 1 << 20));  // two of them are more than a block's memory
    CHECK_FALSE(staged(gpu(31), 7168));    // a lane stands for each rank and each bias
    Machine old = gpu(8);
    old.has_bulk_copy = false;
    CHECK_FALSE(staged(old, 7168));
    // A warp has one peer at most.
    CHECK(staged(cpu(3), 256, 1));
    CHECK_FALSE(staged(cpu(4), 256, 1));
    CHECK_FALSE(staged(cpu(8), 256, 1));
    CHECK(staged(cpu(8), 256, 4));
}

TEST_CASE("send warps of a dispatch have two stages each, or none") {
    CHECK_GE(plan_dispatch(gpu(8), 20, dispatch_slot(7168), false).send.num_stages, 2);
    CHECK_EQ(plan_dispatch(gpu(8), 20, dispatch_slot(14336), false).send.num_stages, 0);  // there is room for one
}

layout::Topology nodes_of(int num_nodes, int ranks_per_node) { return {num_nodes * ranks_per_node, ranks_per_node, 0}; }

int num_warps(const InternodeGeometry& geometry) {
    return geometry.node.num_send_warps + geometry.node.num_recv_warps + geometry.num_forward_warps;
}

TEST_CASE("across nodes every role has a warp, or none where it has nothing to do") {
    for (const Machine& machine : {gpu(16), cpu(16)})
        for (bool is_idle : {false, true}) {
            CAPTURE(machine.is_gpu);
            CAPTURE(is_idle);
            const auto dispatch = plan_internode_dispatch(machine, nodes_of(2, 8), 8, 20, is_idle);
            const auto combine = plan_internode_combine(machine, nodes_of(2, 8), 8, 20, is_idle);
            CHECK_EQ(dispatch.node.num_recv_warps == 0, is_idle);
            CHECK_EQ(combine.node.num_send_warps == 0, is_idle);
            CHECK_GT(dispatch.node.num_send_warps, 0);
            CHECK_GT(combine.node.num_recv_warps, 0);
            for (const auto& [geometry, most] : {std::pair{dispatch, kernels::kMaxInternodeDispatchThreads},
                                                 {combine, kernels::kMaxInternodeCombineThreads}}) {
                CHECK_GT(geometry.num_forward_warps, 0);
                CHECK_FALSE(is_staged(geometry.node));
                CHECK_LE(32 * num_warps(geometry), std::min(most, std::max(96, machine.useful_block_threads)));
            }
        }
}

TEST_CASE("across nodes the roles share the warps by their rows") {
    // A token of two nodes of one rank stays in one of them, or goes once over the rail: read twice, written to three places.
    const auto pair = plan_internode_dispatch(gpu(2), nodes_of(2, 1), 8, 20, true);
    CHECK_GT(pair.node.num_send_warps, pair.num_forward_warps);
    // Its way back: summed there, and here with what this rank has itself.
    const auto back = plan_internode_combine(gpu(2), nodes_of(2, 1), 8, 20, true);
    CHECK_EQ(back.node.num_recv_warps, back.num_forward_warps);
    // With more nodes a token is forwarded more often than it is sent.
    const auto many = plan_internode_dispatch(gpu(64), nodes_of(8, 8), 8, 20, true);
    CHECK_LT(many.node.num_send_warps, many.num_forward_warps);
    CHECK_EQ(plan_internode_dispatch(gpu(64), nodes_of(8, 8), 0, 20, true).num_forward_warps, many.num_forward_warps);
    CHECK_GT(many.num_forward_warps, plan_internode_dispatch(gpu(64), nodes_of(8, 8), 1, 20, true).num_forward_warps);
}

TEST_CASE("a warp serves 32 streams at most: of many ranks more warps or blocks do") {
    for (const Machine& machine : {gpu(128), cpu(128)})
        for (const auto& topology : {nodes_of(2, 72), nodes_of(2, 34), nodes_of(16, 8), nodes_of(256, 1)}) {
            CAPTURE(topology.num_ranks);
            const int num_streams = topology.num_nodes() * (topology.ranks_per_node - 1);
            const auto dispatch = plan_internode_dispatch(machine, topology, 8, 1, false);
            const auto combine = plan_internode_combine(machine, topology, 8, 1, false);
            CHECK(kernels::has_enough_warps(dispatch.node, dispatch.node.num_recv_warps, num_streams));
            CHECK(kernels::has_enough_warps(combine.node, combine.node.num_send_warps, num_streams));
            CHECK(kernels::has_enough_warps(dispatch.node, dispatch.num_forward_warps, topology.num_nodes() - 1));
            CHECK(kernels::has_enough_warps(combine.node, combine.num_forward_warps, topology.num_nodes() - 1));
            CHECK_GT(num_warps(combine), 0);
        }
    CHECK_THROWS_WITH_AS(plan_internode_dispatch(cpu(4096), nodes_of(64, 64), 8, 4, false),
                         doctest::Contains("has more streams than a device with 4 SMs can serve"), InvalidArgument);
    for (const int num_ranks : {66, 128}) {
        const auto dispatch = plan_dispatch(cpu(num_ranks), 1, dispatch_slot(256), false);
        const auto combine = plan_combine(cpu(num_ranks), 1, combine_slot(256), false, false, 4);
        CHECK(kernels::has_enough_warps(dispatch, dispatch.num_recv_warps, num_ranks - 1));
        CHECK(kernels::has_enough_warps(combine, combine.num_send_warps, num_ranks - 1));
    }
}

BufferOptions across(int num_nodes, int ranks_per_node) {
    BufferOptions found = options(0);
    found.num_ranks = num_nodes * ranks_per_node;
    found.ranks_per_node = ranks_per_node;
    return found;
}

TEST_CASE("the rail window has what was asked for, or as much as the data and 16 MiB for each other node") {
    CHECK_EQ(plan_rail(options(0)).num_bytes(), 0);
    BufferOptions wanted = across(3, 2);
    CHECK_EQ(plan_rail(wanted).num_data_bytes, 1 << 26);
    wanted.num_data_bytes = 128;
    CHECK_EQ(plan_rail(wanted).num_data_bytes, 2 << 24);
    wanted.num_rail_bytes = 1 << 12;
    CHECK_EQ(plan_rail(wanted).num_data_bytes, 1 << 12);
    wanted.num_low_latency_bytes = 0;
    CHECK_EQ(plan_rail(wanted).num_bytes(), layout::RailControl::make(3, 2).bytes + (1 << 12));
    wanted.num_low_latency_bytes = 1 << 20;
    CHECK_GT(plan_rail(wanted).num_bytes(), layout::RailControl::make(3, 2).bytes + (1 << 12) + (1 << 20));
}

TEST_CASE("a rail window needs room for a slot of each stream") {
    const auto slot = layout::SlotLayout::for_combine(14336, 8);
    BufferOptions small = across(3, 2);
    const auto enough = static_cast<int64_t>(layout::RailWindow::bytes_for(3, slot.bytes, 1));
    small.num_rail_bytes = enough;
    CHECK_EQ(plan_rail_window(plan_rail(small), 3, slot, 1 << 18, "combine").num_slots(), 1);
    small.num_rail_bytes -= 128;
    CHECK_THROWS_WITH_AS(plan_rail_window(plan_rail(small), 3, slot, 1 << 18, "combine"),
                         doctest::Contains(concat("num_rdma_bytes is too small for this combine: expected at least ",
                                                  enough, ", got ", small.num_rail_bytes)
                                               .c_str()),
                         InvalidArgument);
}

TEST_CASE("across nodes the heap has slots for each source of the group, and one rank a node needs none") {
    const auto slot = dispatch_slot(7168);
    BufferOptions small = across(3, 2);
    small.num_data_bytes = static_cast<int64_t>(layout::WindowLayout::bytes_for(2, slot.bytes, 1, 3));
    CHECK_EQ(plan_window(plan_heap(small), slot, "dispatch").window, 1);
    small.num_data_bytes -= 128;
    CHECK_THROWS_AS(plan_window(plan_heap(small), slot, "dispatch"), InvalidArgument);
    BufferOptions alone = across(3, 1);
    alone.num_data_bytes = 0;
    alone.num_lend_bytes = kLendPartOfData;
    CHECK_NOTHROW(plan_window(plan_heap(alone), slot, "dispatch"));
    alone.num_data_bytes = 1 << 26;
    CHECK_EQ(plan_heap(alone).num_lend_bytes, 0);  // to nobody
}

TEST_CASE("a window needs room for a slot of each peer") {
    const auto slot = dispatch_slot(7168);
    BufferOptions small = options(0);
    small.num_data_bytes = static_cast<int64_t>(layout::WindowLayout::bytes_for(4, slot.bytes, 1));
    CHECK_GT(plan_window(plan_heap(small), slot, "dispatch").window, 0);
    const int64_t enough = small.num_data_bytes;
    small.num_data_bytes -= 128;
    CHECK_THROWS_WITH_AS(plan_window(plan_heap(small), slot, "dispatch"),
                         doctest::Contains(concat("num_nvl_bytes is too small for this dispatch: expected at least ",
                                                  enough, ", got ", small.num_data_bytes)
                                               .c_str()),
                         InvalidArgument);
    small.num_ranks = 1;
    CHECK_NOTHROW(plan_window(plan_heap(small), slot, "dispatch"));  // it sends nothing
}

TEST_CASE("between two ranks combine uses no more slots than stay in the L2") {
    BufferOptions large = options(0);
    large.num_ranks = 2;
    large.num_data_bytes = 1 << 28;
    const HeapPlan heap = plan_heap(large);
    const auto slot = combine_slot(14336);
    const auto all = plan_window(heap, slot, "combine"), used = plan_combine_window(gpu(2), heap, slot);
    CHECK_EQ(all.window, layout::kMaxWindow);
    CHECK_GE(used.window, 640);  // what was measured
    CHECK_LT(used.window, 700);
    CHECK_EQ(used.slot_offset(1, 0, 1, 0), all.slot_offset(1, 0, 1, 0));
    CHECK_EQ(plan_combine_window(gpu(2), heap, combine_slot(1 << 24)).window, 1);
}

TEST_CASE("of a rank that lends its sums half of the blocks send, and no more than are of use") {
    for (const auto& [num_sms, num_send] : {std::pair{2, 1}, {3, 1}, {14, 7}, {16, 8}, {18, 9}, {24, 9}, {64, 9}}) {
        const auto plan = plan_adding_combine(gpu(2), num_sms);
        REQUIRE(plan.has_value());
        CHECK_EQ(plan->num_blocks, num_sms);
        CHECK_EQ(plan->num_send_blocks, num_send);
    }
    CHECK_FALSE(plan_adding_combine(gpu(2), 1).has_value());
    CHECK_FALSE(plan_adding_combine(gpu(4), 16).has_value());
}

TEST_CASE("what the message of a window asks for is enough, lent part or not") {
    const auto slot = combine_slot(1 << 25);  // more than the data, which is divided where a part is lent
    for (int64_t num_lend_bytes : {int64_t{0}, kLendPartOfData}) {
        BufferOptions wanted = options(num_lend_bytes);
        CHECK_EQ(plan_heap(wanted).lends_part_of_data(), num_lend_bytes == kLendPartOfData);
        std::string message;
        try {
            plan_window(plan_heap(wanted), slot, "combine");
        } catch (const InvalidArgument& error) {
            message = error.what();
        }
        const std::string before = "expected at least ";
        REQUIRE_NE(message.find(before), std::string::npos);
        wanted.num_data_bytes = std::stoll(message.substr(message.find(before) + before.size()));
        CHECK_GT(plan_window(plan_heap(wanted), slot, "combine").window, 0);
    }
}

TEST_CASE("a layout kernel has threads for its tokens, up to its limits") {
    CHECK_EQ(plan_layout(gpu(8), 0).num_blocks, 1);
    CHECK_EQ(plan_layout(gpu(8), 1).num_blocks, 1);
    CHECK_EQ(plan_layout(gpu(8), kernels::kMaxLayoutThreads + 1).num_blocks, 2);
    CHECK_EQ(plan_layout(gpu(8), 1 << 20).num_blocks, kernels::kMaxLayoutBlocks);
    CHECK_EQ(plan_layout(cpu(8), 1 << 20).num_blocks, 4);
    CHECK_EQ(plan_layout(cpu(8), 1).num_threads, 128);
    CHECK_EQ(max_layout_counts(gpu(8)), 8 * (2 + layout::kMaxLocalExperts));
    Machine narrow = gpu(8);
    narrow.max_shared_bytes = 400;
    CHECK_EQ(max_layout_counts(narrow), 100);
}

TEST_CASE("the low-latency kernels of ranks that share a GPU fit on it together") {
    CHECK_EQ(plan_low_latency(gpu(8), 1, 7168).num_blocks, 132);
    CHECK_EQ(plan_low_latency(gpu(8), 8, 7168).num_blocks, 16);
    CHECK_EQ(plan_low_latency(cpu(8), 8, 7168).num_blocks, 1);
    CHECK_EQ(plan_low_latency(gpu(8), 1, 7168).num_warps, 14);
    CHECK_EQ(plan_low_latency(gpu(8), 1, 16384).num_warps, kernels::kMaxLowLatencyThreads / 32);
    CHECK_EQ(plan_low_latency(gpu(8), 1, 8).num_warps, 4);
    CHECK_EQ(plan_low_latency(cpu(8), 1, 16384).num_warps, 2);
}

TEST_CASE("the sets of a routing table have a bit for each token, where that is not too much") {
    kernels::LowLatencyArgs args{};
    args.num_experts = 64;
    args.num_topk = 8;
    CHECK_EQ(plan_set_words(args, 0), 1);
    CHECK_EQ(plan_set_words(args, 33), 2);
    CHECK_EQ(plan_set_words(args, 4096), 32 * 1024 / 4 / (64 + 32 * 8));
    args.num_experts = kernels::kMaxLowLatencyExperts;
    CHECK_EQ(plan_set_words(args, 4096), 1);
}

TEST_CASE("experts are the same number on every rank") {
    CHECK_NOTHROW(check_num_experts(8, 4));
    for (int wrong : {-4, 0, 6}) CHECK_THROWS_AS(check_num_experts(wrong, 4), InvalidArgument);
}

}  // namespace
}  // namespace deep_ep::runtime
