// Config: what callers pass around, and the size hints made of it.
#include <doctest/doctest.h>

#include "core/error.h"
#include "layout/heap.h"
#include "runtime/config.h"

namespace deep_ep {
namespace {

// What a Buffer of the hint's size makes of it.
layout::DataSplit hinted(const Config& config, int64_t row_bytes, int num_ranks) {
    return layout::DataSplit::make(static_cast<uint64_t>(config.get_nvl_buffer_size_hint(row_bytes, num_ranks)),
                                   static_cast<uint64_t>(num_ranks));
}

TEST_CASE(
    "size hints: slots are half of what callers gave the original, or less; every rank count accepted (pitfall 21)") {
    // What the original asked for: contract 4.2.
    CHECK_LE(hinted(Config(20, 24, 256, 6, 128), 14336, 2).slot_bytes, 83927552 / 2);
    CHECK_LE(hinted(Config(20, 6, 256, 6, 128), 14336, 8).slot_bytes, 335709824 / 2);
    for (int num_ranks = 1; num_ranks <= 160; ++num_ranks) {
        const Config config(20, 6, 256, 6, 128);
        CHECK_EQ(config.get_nvl_buffer_size_hint(5760, num_ranks) % 128, 0);
        CHECK_EQ(config.get_rdma_buffer_size_hint(5760, num_ranks), 0);
    }
}

TEST_CASE("a Buffer of the hint's size has its slots, and lends the outputs of 4096 tokens from each rank") {
    for (int num_ranks : {2, 3, 4, 8, 16, 72, 128})
        for (int64_t row_bytes : {1024, 4096, 14336, 32768})
            for (const Config& config :
                 {Config(20, 24, 256, 6, 128), Config(24, 36, 288, 20, 128), Config(8, 6, 256, 6, 128)}) {
                CAPTURE(num_ranks);
                CAPTURE(row_bytes);
                const auto ranks = static_cast<uint64_t>(num_ranks);
                const layout::DataSplit split = hinted(config, row_bytes, num_ranks);
                const auto slot = layout::SlotLayout::for_dispatch(static_cast<uint64_t>(row_bytes), 8, 0);
                const auto window = layout::WindowLayout::make(split.slot_bytes, ranks, slot.bytes);
                CHECK_GE(window.window, config.window());
                CHECK_GE(split.lend_bytes,
                         layout::DataSplit::num_rows(ranks) * (static_cast<uint64_t>(row_bytes) + 8 * 12 + 4));
                // And not much more than either asks for.
                CHECK_LE(config.get_nvl_buffer_size_hint(row_bytes, num_ranks),
                         static_cast<int64_t>((split.slot_bytes + split.lend_bytes + split.weight_bytes) * 101 / 100));
            }
}

TEST_CASE("Config refuses what makes no sense, naming the argument") {
    CHECK_THROWS_WITH_AS(Config(-1, 6, 256, 6, 256), doctest::Contains("num_sms"), InvalidArgument);
    CHECK_THROWS_WITH_AS(Config(20, 256, 256, 6, 256), doctest::Contains("nvl_chunked_send"), InvalidArgument);
    CHECK_THROWS_WITH_AS(Config(20, 6, 256, 6, 6), doctest::Contains("rdma_chunked_send"), InvalidArgument);
    CHECK_THROWS_WITH_AS(Config(20, 0, 256, 6, 256), doctest::Contains("positive"), InvalidArgument);
}

}  // namespace
}  // namespace deep_ep
