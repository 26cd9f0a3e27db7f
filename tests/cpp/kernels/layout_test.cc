// get_dispatch_layout on the executor: counts for ranks, experts and nodes, against the obvious loops.
#include <doctest/doctest.h>

#include <random>
#include <set>

#include "core/error.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

struct Sizes {
    int num_ranks, num_nodes, num_tokens, num_topk, experts_per_rank;
};

struct Found {
    std::vector<int> per_rank, per_node, per_expert;
    std::vector<uint8_t> in_rank;
    bool operator==(const Found&) const = default;
};

std::vector<int64_t> random_ids(const Sizes& sizes) {
    std::mt19937_64 rng(static_cast<uint64_t>(sizes.num_ranks * 1000 + sizes.num_nodes));
    std::uniform_int_distribution<int64_t> any(-1, sizes.num_ranks * sizes.experts_per_rank - 1);
    std::vector<int64_t> ids(static_cast<size_t>(sizes.num_tokens * sizes.num_topk));
    for (auto& id : ids) id = any(rng);
    return ids;
}

// A value that no count has, so that what was not written shows.
Found empty(const Sizes& sizes, int value) {
    const auto num_ranks = static_cast<size_t>(sizes.num_ranks);
    return {std::vector<int>(num_ranks, value), std::vector<int>(static_cast<size_t>(sizes.num_nodes), value),
            std::vector<int>(num_ranks * static_cast<size_t>(sizes.experts_per_rank), value),
            std::vector<uint8_t>(num_ranks * static_cast<size_t>(sizes.num_tokens), value == 0 ? 0 : 9)};
}

Found expected(const Sizes& sizes, const std::vector<int64_t>& ids) {
    Found found = empty(sizes, 0);
    for (int token = 0; token < sizes.num_tokens; ++token) {
        std::set<int64_t> nodes;
        for (int k = 0; k < sizes.num_topk; ++k) {
            const int64_t id = ids[static_cast<size_t>(token * sizes.num_topk + k)];
            if (id < 0) continue;
            const int64_t rank = id / sizes.experts_per_rank;
            ++found.per_expert[static_cast<size_t>(id)];
            nodes.insert(rank / (sizes.num_ranks / sizes.num_nodes));
            uint8_t& is_sent = found.in_rank[static_cast<size_t>(token * sizes.num_ranks + rank)];
            if (is_sent == 0) ++found.per_rank[static_cast<size_t>(rank)];
            is_sent = 1;
        }
        for (const int64_t node : nodes) ++found.per_node[static_cast<size_t>(node)];
    }
    return found;
}

Found counted(World& world, const Sizes& sizes, const std::vector<int64_t>& ids, bool counts_nodes) {
    Found found = empty(sizes, -5);
    world.buffer(0).high_throughput().get_dispatch_layout(
        {.topk_idx = ids.data(),
         .idx_bytes = 8,
         .num_tokens = sizes.num_tokens,
         .num_topk = sizes.num_topk,
         .num_experts = sizes.num_ranks * sizes.experts_per_rank,
         .num_nodes = sizes.num_nodes,
         .num_tokens_per_rank = found.per_rank.data(),
         .num_tokens_per_node = counts_nodes ? found.per_node.data() : nullptr,
         .num_tokens_per_expert = found.per_expert.data(),
         .is_token_in_rank = found.in_rank.data()},
        world.stream(0));
    world.run();
    return found;
}

TEST_CASE("a token counts once for each rank and once for each node that has one of its experts") {
    for (const Sizes& sizes :
         {Sizes{2, 2, 9, 3, 2}, Sizes{4, 2, 33, 5, 1}, Sizes{8, 4, 300, 8, 4}, Sizes{6, 2, 0, 4, 1},
          Sizes{6, 3, 1, 1, 2}, Sizes{96, 12, 40, 9, 1}, Sizes{5, 1, 20, 2, 3}}) {
        CAPTURE(sizes.num_ranks);
        CAPTURE(sizes.num_nodes);
        World world(sizes.num_ranks, 1 << 14, {});
        const auto ids = random_ids(sizes);
        CHECK(counted(world, sizes, ids, true) == expected(sizes, ids));
    }
}

TEST_CASE("who does not ask for the counts of nodes gets the same others") {
    const Sizes sizes{6, 3, 50, 4, 2};
    World world(sizes.num_ranks, 1 << 14, {});
    const auto ids = random_ids(sizes);
    Found want = expected(sizes, ids);
    want.per_node.assign(3, -5);
    CHECK(counted(world, sizes, ids, false) == want);
}

TEST_CASE("nodes that do not divide the ranks are refused") {
    World world(6, 1 << 14, {});
    for (const int num_nodes : {0, 4, 7})
        CHECK_THROWS_WITH_AS(counted(world, {6, num_nodes, 1, 1, 1}, {0}, false),
                             doctest::Contains("num_nodes must divide the 6 ranks"), Error);
}

}  // namespace
}  // namespace deep_ep::test
