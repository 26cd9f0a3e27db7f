// Layouts are declared once; these tests look at the declarations: no overlap, alignment, 64-bit offsets.
#include <doctest/doctest.h>

#include <vector>

#include "layout/disjoint.h"
#include "layout/heap.h"

namespace deep_ep::layout {
namespace {

TEST_CASE("control fields do not overlap, for any number of ranks") {
    for (uint64_t num_ranks : {1, 2, 7, 8, 72, 1024}) {
        const auto control = ControlLayout::make(num_ranks);
        const std::vector<Field> fields{control.started,       control.abort, control.rank_counts,
                                        control.expert_counts, control.full,  control.empty};
        check_disjoint(fields, control.bytes);
        for (const Field& field : fields) CHECK_EQ(field.offset % kHeapAlignment, 0);
    }
}

TEST_CASE("a slot holds its row and its metadata, whatever their sizes") {
    for (uint64_t row_bytes : {16, 5760, 14336})
        for (uint64_t num_topk : {0, 1, 7, 64})
            for (uint64_t num_scales : {0, 1, 56}) {
                const auto slot = SlotLayout::for_dispatch(row_bytes, num_topk, num_scales);
                check_disjoint({slot.row, slot.src_idx, slot.topk_idx, slot.topk_weights, slot.scales}, slot.bytes);
                CHECK_EQ(slot.bytes % kHeapAlignment, 0);
                CHECK_GE(slot.bytes, row_bytes + 4 * (1 + 2 * num_topk + num_scales));
            }
}

TEST_CASE("slots of different sources and banks do not overlap and stay in the region") {
    const uint64_t num_ranks = 5, slot_bytes = 384, data_bytes = 100'000;
    const auto window = WindowLayout::make(data_bytes, num_ranks, slot_bytes);
    REQUIRE_GT(window.window, 1);
    std::vector<Field> slots;
    for (uint64_t bank = 0; bank < kNumBanks; ++bank)
        for (uint64_t source = 0; source < num_ranks; ++source)
            for (uint64_t slot = 0; slot < static_cast<uint64_t>(window.window); ++slot)
                if (source != 2) slots.push_back({window.slot_offset(bank, 2, source, slot), 1, slot_bytes});
    check_disjoint(slots, data_bytes);
}

TEST_CASE("slots of the streams of several nodes do not overlap and stay in the region") {
    const uint64_t num_ranks = 3, num_nodes = 4, slot_bytes = 384;
    const uint64_t data_bytes = WindowLayout::bytes_for(num_ranks, slot_bytes, 5, num_nodes);
    const auto window = WindowLayout::make(data_bytes, num_ranks, slot_bytes, num_nodes);
    REQUIRE_EQ(window.window, 5);
    std::vector<Field> slots;
    for (uint64_t bank = 0; bank < kNumBanks; ++bank)
        for (uint64_t node = 0; node < num_nodes; ++node)
            for (uint64_t writer = 0; writer < num_ranks; ++writer)
                for (uint64_t slot = 0; writer != 1 && slot < 5; ++slot)
                    slots.push_back({window.slot_offset(bank, 1, writer, slot, node), 1, slot_bytes});
    check_disjoint(slots, data_bytes);
}

// What peers, and calls recorded in a CUDA graph, have agreed on: one node's offsets as they have always been.
TEST_CASE("with one node, places are those of ranks alone") {
    const auto alone = ControlLayout::make(8), of_one = ControlLayout::make(8, 1);
    CHECK_EQ(alone.bytes, of_one.bytes);
    CHECK_EQ(alone.started.offset, 0);
    CHECK_EQ(alone.expert_counts.offset, alone.rank_counts.offset + 8 * kNumBanks * 8 * 8);
    CHECK_EQ(alone.full.offset, alone.expert_counts.offset + 8 * kNumBanks * 8 * kMaxLocalExperts);
    CHECK_EQ(alone.empty.offset, alone.full.offset + 8 * kNumBanks * 8 * kMaxWindow);
    CHECK_EQ(alone.loan_flags.offset, alone.empty.offset + 8 * kNumBanks * 8 * kMaxWindow);
    const auto across = ControlLayout::make(8, 4);
    CHECK_EQ(across.full.count, 4 * alone.full.count);
    CHECK_EQ(across.rank_counts.count, 4 * alone.rank_counts.count);
    CHECK_EQ(across.started.count, alone.started.count);
    const auto window = WindowLayout::make(1 << 20, 8, 384);
    CHECK_EQ(window.slot_offset(1, 2, 5, 3), (1 << 19) + 4 * window.source_bytes + 3 * 384);
}

TEST_CASE("bytes_for is the least region with that window (pitfall 19)") {
    for (uint64_t num_ranks : {2, 3, 8})
        for (uint64_t slot_bytes : {128, 14720})
            for (uint64_t wanted : {1, 2, 640}) {
                const uint64_t bytes = WindowLayout::bytes_for(num_ranks, slot_bytes, wanted);
                CHECK_EQ(WindowLayout::make(bytes, num_ranks, slot_bytes).window, wanted);
                CHECK_LT(WindowLayout::make(bytes - 1, num_ranks, slot_bytes).window, wanted);
            }
}

TEST_CASE("offsets beyond 2 and 32 GiB (pitfall 15)") {
    const uint64_t gib = uint64_t{1} << 30;
    const uint64_t slot_bytes = 1 << 20;
    const auto window = WindowLayout::make(100 * gib, 8, slot_bytes);
    REQUIRE_EQ(window.window, kMaxWindow);
    CHECK_EQ(window.slot_offset(1, 7, 6, kMaxWindow - 1), 50 * gib + 6 * (4 * gib) + (kMaxWindow - 1) * slot_bytes);
    CHECK_GT(window.slot_offset(1, 7, 6, kMaxWindow - 1), 72 * gib);
    const auto control = ControlLayout::make(4096);
    CHECK_EQ(control.rank_counts.bytes(), uint64_t{8} * kNumBanks * 4096 * 4096);
}

TEST_CASE("tags grow from use to use of a slot") {
    CHECK_LT(make_tag(1, 0), make_tag(1, 1));
    CHECK_LT(make_tag(1, kMaxTokens - 2), make_tag(2, 0));
    CHECK_GT(make_tag(1, 0), uint64_t{0});
}

TEST_CASE("the data region: slots, copies of weights and what is lent fill it, aligned, for any size") {
    for (uint64_t num_ranks : {2, 3, 8, 72, 128})
        for (uint64_t bytes = 128; bytes < uint64_t{1} << 40; bytes = bytes * 3 + 128) {
            const auto split = DataSplit::make(bytes, num_ranks);
            const uint64_t all = split.slot_bytes + split.weight_bytes + split.lend_bytes;
            CHECK_LE(all, bytes);
            if (split.lend_bytes == 0) {
                CHECK_EQ(split.slot_bytes, bytes);
                continue;
            }
            CHECK_LT(bytes - all, DataSplit::kAlignment);
            CHECK_GE(split.slot_bytes, (num_ranks - 1) * DataSplit::kMinSlotBytes);
            CHECK_EQ(split.slot_bytes % DataSplit::kAlignment, 0);
            CHECK_EQ(split.weight_bytes % DataSplit::kAlignment, 0);
            CHECK_GE(split.weight_bytes * DataSplit::kWeightShare, split.lend_bytes);
        }
    CHECK_EQ(DataSplit::make(1 << 30, 1).slot_bytes, 1 << 30);
    // vLLM's region, two ranks: windows of 4096 slots, and most of it to lend.
    const auto split = DataSplit::make(1 << 30, 2);
    CHECK_GE(split.slot_bytes, WindowLayout::bytes_for(2, SlotLayout::for_dispatch(14336, 8, 0).bytes, kMaxWindow));
    CHECK_GT(split.lend_bytes, 900'000'000);
}

}  // namespace
}  // namespace deep_ep::layout
