// Config: what callers pass around, and the size hints made of it.
#include <doctest/doctest.h>

#include "core/error.h"
#include "runtime/config.h"

namespace deep_ep {
namespace {

TEST_CASE("size hints: half of what callers gave the original, or less; every rank count accepted (pitfall 21)") {
    // What the original asked for: contract 4.2.
    CHECK_LE(Config(20, 24, 256, 6, 128).get_nvl_buffer_size_hint(14336, 2), 83927552 / 2);
    CHECK_LE(Config(20, 6, 256, 6, 128).get_nvl_buffer_size_hint(14336, 8), 335709824 / 2);
    for (int num_ranks = 1; num_ranks <= 160; ++num_ranks) {
        const Config config(20, 6, 256, 6, 128);
        CHECK_EQ(config.get_nvl_buffer_size_hint(5760, num_ranks) % 128, 0);
        CHECK_EQ(config.get_rdma_buffer_size_hint(5760, num_ranks), 0);
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
