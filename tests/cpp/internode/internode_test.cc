// The protocol across nodes on the executor, over a network that keeps no promise: many topologies, shapes and schedules, compared
// bit for bit.
#include <doctest/doctest.h>

#include <chrono>
#include <cstdio>

#include "device/simt/happens_before.h"
#include "internode/internode_world.h"

namespace deep_ep::test {
namespace {

struct Nodes {
    int num_nodes, ranks_per_node;
};
constexpr Nodes kTopologies[] = {{2, 1}, {2, 2}, {2, 4}, {3, 2}, {4, 2}, {8, 1}, {16, 2}};

InternodeOptions options_for(const Nodes& nodes, uint64_t seed = 0) {
    InternodeOptions options{.num_nodes = nodes.num_nodes, .ranks_per_node = nodes.ranks_per_node};
    options.scheduler = seeded(seed);
    options.network_seed = seed + 1;
    return options;
}

Problem problem_for(const InternodeOptions& options, int num_tokens = 9) {
    Problem problem{.num_tokens = {}, .num_experts = 2 * options.num_ranks(), .num_topk = 4, .hidden = 24};
    for (int rank = 0; rank < options.num_ranks(); ++rank)
        problem.num_tokens.push_back(num_tokens - rank % 3 * (num_tokens / 4));
    return problem;
}

TEST_CASE("every topology: fresh, combined, cached, combined") {
    for (const Nodes& nodes : kTopologies) {
        CAPTURE(nodes.num_nodes);
        CAPTURE(nodes.ranks_per_node);
        const InternodeOptions options = options_for(nodes);
        const Problem problem = problem_for(options);
        InternodeWorld world(options, problem);
        const auto t0 = std::chrono::steady_clock::now();
        CHECK_EQ(world.round_trip(problem), "");
        std::printf("%dx%d %.2f\n", nodes.num_nodes, nodes.ranks_per_node, std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count()); fflush(stdout);
    }
}

}  // namespace
}  // namespace deep_ep::test
