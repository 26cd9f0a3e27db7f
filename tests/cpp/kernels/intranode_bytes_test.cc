// docs/protocols/intranode.md states what crosses each link. Here it is measured: the same call runs over regions filled
// with 0x00 and with 0xff; a byte that reads the same after both was written.
#include <doctest/doctest.h>

#include <cstring>

#include "layout/heap.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

constexpr int64_t kDataBytes = 1 << 18;

std::vector<uint8_t> region_of(World& world, int rank) {
    const uint8_t* data = world.buffer(rank).data();
    return std::vector<uint8_t>(data, data + kDataBytes);
}

std::vector<std::vector<uint8_t>> regions_after(const Problem& problem, Call call, int fill) {
    World world(problem.num_ranks(), kDataBytes, {});
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    auto poison = [&] {
        for (int rank = 0; rank < problem.num_ranks(); ++rank)
            std::memset(world.buffer(rank).data(), fill, static_cast<size_t>(kDataBytes));
    };
    if (call == Call::kDispatch) poison();
    world.dispatch(problem, ranks);
    if (call == Call::kCombine) {
        poison();
        world.combine(problem, ranks);
    }
    std::vector<std::vector<uint8_t>> regions;
    for (int rank = 0; rank < problem.num_ranks(); ++rank) regions.push_back(region_of(world, rank));
    return regions;
}

int64_t bytes_into(const Problem& problem, Call call, int rank) {
    const auto zeros = regions_after(problem, call, 0x00)[static_cast<size_t>(rank)];
    const auto ones = regions_after(problem, call, 0xff)[static_cast<size_t>(rank)];
    int64_t num_bytes = 0;
    for (size_t i = 0; i < zeros.size(); ++i) num_bytes += zeros[i] == ones[i] ? 1 : 0;
    return num_bytes;
}

// Rows that `source` sends to `destination`, straight from the routing.
int64_t rows_between(const Problem& problem, const std::vector<RankTensors>& ranks, int source, int destination) {
    const int experts_per_rank = problem.num_experts / problem.num_ranks();
    int64_t num_rows = 0;
    for (int token = 0; token < problem.num_tokens[static_cast<size_t>(source)]; ++token) {
        bool is_sent = false;
        for (int k = 0; k < problem.num_topk; ++k) {
            const auto expert =
                ranks[static_cast<size_t>(source)].topk_idx[static_cast<size_t>(token * problem.num_topk + k)];
            is_sent |= expert >= 0 && expert / experts_per_rank == destination;
        }
        num_rows += is_sent ? 1 : 0;
    }
    return num_rows;
}

TEST_CASE("the bytes that enter a rank are the stated ones: one copy per token and destination rank") {
    const Problem problem{.num_tokens = {17, 30, 8}, .num_experts = 6, .num_topk = 4, .hidden = 72, .num_scales = 5};
    const auto ranks = make_inputs(problem);
    for (int rank = 0; rank < problem.num_ranks(); ++rank) {
        int64_t rows_in = 0;    // dispatch
        int64_t rows_back = 0;  // combine
        for (int peer = 0; peer < problem.num_ranks(); ++peer) {
            if (peer == rank) continue;
            rows_in += rows_between(problem, ranks, peer, rank);
            rows_back += rows_between(problem, ranks, rank, peer);
        }
        const auto row_bytes = static_cast<uint64_t>(problem.hidden) * 2;
        CHECK_EQ(bytes_into(problem, Call::kDispatch, rank),
                 rows_in * layout::bulk_bytes(row_bytes + 4 * (1 + 2 * problem.num_topk + problem.num_scales)));
        CHECK_EQ(bytes_into(problem, Call::kCombine, rank),
                 rows_back * layout::bulk_bytes(row_bytes + 4 * problem.num_topk));
    }
}

}  // namespace
}  // namespace deep_ep::test
