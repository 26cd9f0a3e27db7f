// What the engine is asked to carry, against the formula of docs/protocols/internode.md: a token once to each node that needs it.
#include <doctest/doctest.h>

#include "internode/internode_world.h"

namespace deep_ep::test {
namespace {

uint64_t num_chunks(uint64_t num_tokens, const layout::RailWindow& window) {
    const auto chunk = static_cast<uint64_t>(window.chunk_tokens);
    return (num_tokens + chunk - 1) / chunk;
}

// Chunks whose place was used before: each is given back with a message of its own.
uint64_t num_reused(uint64_t num_tokens, const layout::RailWindow& window) {
    const uint64_t chunks = num_chunks(num_tokens, window);
    const auto places = static_cast<uint64_t>(window.num_chunks);
    return chunks > places ? chunks - places : 0;
}

// From `rank` to its rail peer in another node, by a call in which it sends `there` tokens and receives `here`.
rail::Traffic traffic_of(uint64_t there, uint64_t here, const layout::RailWindow& window) {
    const uint64_t entered_and_ended = 2;
    return {entered_and_ended + num_chunks(there, window) + num_reused(here, window), there * window.slot_bytes};
}

struct Sums {
    std::vector<std::vector<rail::Traffic>> of;  // [rank][node]

    Sums(const InternodeWorld& world)
        : of(static_cast<size_t>(world.num_ranks()),
             std::vector<rail::Traffic>(static_cast<size_t>(world.options().num_nodes))) {}
    void add(int rank, int node, const rail::Traffic& traffic) {
        rail::Traffic& sum = of[static_cast<size_t>(rank)][static_cast<size_t>(node)];
        sum.num_messages += traffic.num_messages;
        sum.num_bytes += traffic.num_bytes;
    }
};

// `is_back`: of a combine, in which sums of the tokens that came go back.
void add_call(Sums& sums, const InternodeWorld& world, const InternodeCall& call, const layout::SlotLayout& slot,
              bool is_back) {
    for (int rank = 0; rank < world.num_ranks(); ++rank)
        for (int node = 0; node < world.options().num_nodes; ++node) {
            const layout::Topology place = world.topology(rank);
            if (node == place.node()) continue;
            const auto tokens = [&](int source, int to) {
                return static_cast<uint64_t>(
                    call.rails[static_cast<size_t>(source)].num_tokens_per_node[static_cast<size_t>(to)]);
            };
            const uint64_t sent = tokens(rank, node), came = tokens(place.rail_peer(node), place.node());
            sums.add(rank, node, traffic_of(is_back ? came : sent, is_back ? sent : came, world.rail_window(slot)));
        }
}

void add_counts(Sums& sums, const InternodeWorld& world, const Problem& problem) {
    const auto block = layout::CountsBlock::make(static_cast<uint64_t>(world.options().ranks_per_node),
                                                 static_cast<uint64_t>(problem.num_experts / problem.num_ranks()));
    for (int rank = 0; rank < world.num_ranks(); ++rank)
        for (int node = 0; node < world.options().num_nodes; ++node)
            if (node != world.topology(rank).node()) sums.add(rank, node, {1, block.bytes});
}

void check_traffic(InternodeWorld& world, const Sums& sums) {
    for (int rank = 0; rank < world.num_ranks(); ++rank)
        for (int peer = 0; peer < world.num_ranks(); ++peer) {
            const layout::Topology place = world.topology(rank);
            const bool is_on_rail = place.index_of(peer) == place.index() && !place.is_neighbour(peer);
            const rail::Traffic sent = world.engine(rank).sent_to(peer);
            const rail::Traffic expected =
                is_on_rail ? sums.of[static_cast<size_t>(rank)][static_cast<size_t>(place.node_of(peer))]
                           : rail::Traffic{};
            CAPTURE(rank);
            CAPTURE(peer);
            CHECK_EQ(sent.num_messages, expected.num_messages);
            CHECK_EQ(sent.num_bytes, expected.num_bytes);
        }
}

TEST_CASE("bytes and messages on the rail are those of the formula, and nothing leaves its rail") {
    for (const int way : {0, 1, 2, 3}) {
        InternodeOptions options{.num_nodes = 3, .ranks_per_node = 2};
        options.rail_slots = way % 2 == 0 ? 2 : 64;
        options.is_near = way >= 2;
        options.chunk_tokens = 3;
        Problem problem{
            .num_tokens = {14, 9, 11, 0, 20, 7}, .num_experts = 12, .num_topk = 3, .hidden = 40, .num_scales = 2};
        InternodeWorld world(options, problem);
        InternodeCall call(problem, options);
        Sums sums(world);
        REQUIRE_EQ(world.dispatch(call), "");
        add_counts(sums, world, problem);
        add_call(sums, world, call, world.dispatch_slot(call, false), false);
        check_traffic(world, sums);
        REQUIRE_EQ(world.combine(call), "");
        add_call(sums, world, call, world.combine_slot(call), true);
        check_traffic(world, sums);
        REQUIRE_EQ(world.dispatch_cached(call), "");
        add_call(sums, world, call, world.dispatch_slot(call, true), false);
        check_traffic(world, sums);
    }
}

}  // namespace
}  // namespace deep_ep::test
