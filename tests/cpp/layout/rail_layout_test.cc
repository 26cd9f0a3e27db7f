// The rail window: fields and slots do not overlap, what V1's callers pass suffices, and little memory works.
#include <doctest/doctest.h>

#include <vector>

#include "layout/disjoint.h"
#include "layout/rail.h"
#include "layout/topology.h"

namespace deep_ep::layout {
namespace {

TEST_CASE("rail control fields do not overlap, for any topology") {
    for (uint64_t num_nodes : {1, 2, 3, 16, 1024})
        for (uint64_t ranks_per_node : {1, 2, 8, 72}) {
            const auto control = RailControl::make(num_nodes, ranks_per_node);
            const std::vector<Field> fields{control.entered, control.ended, control.abort,  control.counts_flags,
                                            control.arrived, control.taken, control.counts, control.counts_staging};
            check_disjoint(fields, control.bytes);
            for (const Field& field : fields) CHECK_EQ(field.offset % kHeapAlignment, 0);
            for (uint64_t num_local_experts : {1, 32, kMaxLocalExperts})
                CHECK_LE(CountsBlock::make(ranks_per_node, num_local_experts).bytes, control.counts.element_bytes);
        }
}

TEST_CASE("a counts block holds a count of each rank and each expert of the node") {
    const auto block = CountsBlock::make(8, 32);
    check_disjoint({block.shapes, block.num_tokens, block.chunk_tokens, block.rank_counts, block.expert_counts},
                   block.bytes);
    CHECK_EQ(block.rank_counts.count, 8);
    CHECK_EQ(block.expert_counts.count, 256);
    CHECK_EQ(block.bytes % 16, 0);
}

TEST_CASE("a rail slot holds its row and its metadata, whatever their sizes") {
    for (uint64_t row_bytes : {16, 5760, 14336})
        for (uint64_t num_topk : {0, 1, 7, 64})
            for (uint64_t num_scales : {0, 1, 56}) {
                const auto slot = SlotLayout::for_dispatch(row_bytes, num_topk, num_scales, 8);
                check_disjoint({slot.row, slot.src_idx, slot.topk_idx, slot.topk_weights, slot.positions, slot.scales},
                               slot.bytes);
                CHECK_EQ(slot.bytes % kHeapAlignment, 0);
                CHECK_GE(slot.bytes, row_bytes + 4 * (1 + 2 * num_topk + 8 + num_scales));
                const auto sum = SlotLayout::for_combine(row_bytes, num_topk);
                CHECK_EQ(sum.positions.bytes() + sum.topk_idx.bytes() + sum.scales.bytes(), 0);
                CHECK_GE(sum.bytes, row_bytes + 4 * num_topk);
            }
}

TEST_CASE("what is staged and what is received of different nodes and banks do not overlap and stay in the region") {
    const uint64_t num_nodes = 4, slot_bytes = 384, data_bytes = 100'000;
    const auto window = RailWindow::make(data_bytes, num_nodes, slot_bytes, 4 * slot_bytes);
    REQUIRE_GT(window.num_chunks, 1);
    for (uint64_t owner = 0; owner < num_nodes; ++owner) {
        std::vector<Field> slots;
        for (uint64_t bank = 0; bank < kNumBanks; ++bank)
            for (uint64_t node = 0; node < num_nodes; ++node)
                for (uint64_t slot = 0; node != owner && slot < static_cast<uint64_t>(window.num_slots()); ++slot) {
                    slots.push_back({window.staging_offset(bank, owner, node, slot), 1, slot_bytes});
                    slots.push_back({window.receive_offset(bank, owner, node, slot), 1, slot_bytes});
                }
        check_disjoint(slots, data_bytes);
    }
}

// num_rdma_bytes as V1's callers compute it from V1's default configurations (hidden 7168, BF16), and the slots of one
// stream that follow: docs/protocols/internode.md has the table.
struct Hint {
    uint64_t num_ranks, bytes, bf16_slots, fp8_slots;
};
constexpr Hint kHints[] = {{16, 91'887'744, 1588, 3041},
                           {24, 126'017'792, 1089, 2085},
                           {32, 168'023'680, 968, 1854},
                           {64, 336'047'360, 829, 1589},
                           {128, 693'096'960, 798, 1529}};

TEST_CASE("what V1's callers pass is room for hundreds of tokens of each node, in many chunks") {
    const uint64_t chunk_bytes = 256 << 10;
    for (const Hint& hint : kHints) {
        CAPTURE(hint.num_ranks);
        const uint64_t num_nodes = hint.num_ranks / 8;
        const auto bf16 = SlotLayout::for_dispatch(14336, 8, 0, 8), fp8 = SlotLayout::for_dispatch(7168, 8, 56, 8);
        CHECK_EQ(bf16.bytes, 14464);
        CHECK_EQ(fp8.bytes, 7552);
        for (const auto& [slot_bytes, wanted] :
             {std::pair{bf16.bytes, hint.bf16_slots}, std::pair{fp8.bytes, hint.fp8_slots}}) {
            const auto window = RailWindow::make(hint.bytes, num_nodes, slot_bytes, chunk_bytes);
            CHECK_LE(window.num_slots(), wanted);
            CHECK_GT(window.num_slots() + window.chunk_tokens, wanted);  // less than a chunk is lost
            CHECK_GE(window.num_chunks, 16);
            CHECK_LE(window.num_chunks, kMaxRailChunks);
        }
    }
}

TEST_CASE("a stream needs one slot, and bytes_for is the least region that has so many") {
    for (uint64_t num_nodes : {2, 3, 16})
        for (uint64_t slot_bytes : {128, 14464})
            for (uint64_t wanted : {1, 2, 3, 4, 100}) {
                const uint64_t bytes = RailWindow::bytes_for(num_nodes, slot_bytes, wanted);
                CHECK_EQ(RailWindow::make(bytes, num_nodes, slot_bytes, slot_bytes).num_slots(), wanted);
                CHECK_LT(RailWindow::make(bytes - 1, num_nodes, slot_bytes, slot_bytes).num_slots(), wanted);
            }
    CHECK_EQ(RailWindow::make(1 << 30, 1, 128, 128).num_slots(), 0);
    CHECK_EQ(RailWindow::make(256, 2, 14464, 1 << 20).num_slots(), 0);
    CHECK_EQ(RailWindow::bytes_for(1, 128, 10), 0);
}

TEST_CASE("chunks: no more than flags, no larger than a quarter of the stream") {
    for (uint64_t num_slots : {1, 3, 4, 5, 511, 512, 513, 100'000})
        for (uint64_t chunk_bytes : {1, 128, 4096, 1 << 20, 1 << 30}) {
            const auto window = RailWindow::make(RailWindow::bytes_for(2, 128, num_slots), 2, 128, chunk_bytes);
            CAPTURE(num_slots);
            CAPTURE(chunk_bytes);
            CHECK_GE(window.chunk_tokens, 1);
            CHECK_LE(window.num_chunks, kMaxRailChunks);
            CHECK_GE(window.num_chunks, std::min<uint64_t>(num_slots, 4));
            CHECK_LE(window.num_slots(), num_slots);
        }
}

TEST_CASE("offsets beyond 32 GiB (pitfall 15)") {
    const uint64_t gib = uint64_t{1} << 30;
    const auto window = RailWindow::make(128 * gib, 2, 1 << 20, 1 << 20);
    CHECK_EQ(window.receive_offset(1, 0, 1, 5), 96 * gib + 5 * (1 << 20));
}

TEST_CASE("a topology names nodes, neighbours, rails and forwarders") {
    constexpr Topology topology{.num_ranks = 12, .ranks_per_node = 4, .rank = 6};
    CHECK_EQ(topology.num_nodes(), 3);
    CHECK_EQ(topology.node(), 1);
    CHECK_EQ(topology.index(), 2);
    CHECK(topology.is_neighbour(4));
    CHECK_FALSE(topology.is_neighbour(3));
    CHECK_EQ(topology.neighbour(3), 7);
    CHECK_EQ(topology.rail_peer(2), 10);
    CHECK_EQ(topology.forwarder(0, 2), 8);
}

}  // namespace
}  // namespace deep_ep::layout
