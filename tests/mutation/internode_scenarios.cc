// High throughput across nodes: credits of one chunk, chunks that several warps fill and empty, banks that are used again by
// traffic in one direction only, ranks that do not come.
#include "internode/internode_world.h"
#include "mutation/scenarios.h"
#include "mutation/worlds.h"

namespace deep_ep::test {
namespace {

// One block a rank, unless a test needs warps that know nothing of each other: see small_device.
InternodeOptions small_options(int num_nodes, int ranks_per_node, uint64_t seed) {
    InternodeOptions options{.num_nodes = num_nodes, .ranks_per_node = ranks_per_node, .num_blocks = 1};
    options.scheduler = varied(seed);
    options.network_seed = seed;
    options.device = {.num_sms = 2, .has_bulk_copy = false, .useful_block_threads = 64};
    return options;
}

InternodeOptions impatient_options(int num_nodes, int ranks_per_node, uint64_t seed) {
    InternodeOptions options = small_options(num_nodes, ranks_per_node, seed);
    options.scheduler = impatient(seed);
    options.timeout_s = 2;
    return options;
}

// Every chunk of a stream waits for the one before.
InternodeOptions one_chunk(int num_nodes, int ranks_per_node, uint64_t seed) {
    InternodeOptions options = small_options(num_nodes, ranks_per_node, seed);
    options.rail_slots = 2;
    options.chunk_tokens = 1;
    return options;
}

// Chunks are filled and emptied by warps of two blocks, and several stand free before they are looked at.
InternodeOptions several_chunks(uint64_t seed) {
    InternodeOptions options = small_options(2, 1, seed);
    options.num_blocks = 2;
    options.rail_slots = 8;
    options.chunk_tokens = 2;
    return options;
}

Problem small_problem(const InternodeOptions& options, uint64_t seed) {
    Problem problem{.num_tokens = {}, .num_experts = options.num_ranks(), .num_topk = 2, .hidden = 16, .seed = seed};
    for (int rank = 0; rank < options.num_ranks(); ++rank) problem.num_tokens.push_back(11 - 4 * (rank % 2));
    return problem;
}

std::string run_twice(const InternodeOptions& options, const Problem& problem) {
    InternodeWorld world(options, problem);
    std::string difference = world.round_trip(problem);
    return difference.empty() ? world.round_trip(problem) : difference;
}

std::string run_twice(const InternodeOptions& options) {
    return run_twice(options, small_problem(options, options.network_seed));
}

// Stores reach the peer's window, without an engine that carries bytes.
InternodeOptions near(InternodeOptions options) {
    options.is_near = true;
    return options;
}

EP_SCENARIO(rail_credits, seed) { return run_twice(one_chunk(2, 1, seed)); }

EP_SCENARIO(rail_chunks, seed) { return run_twice(several_chunks(seed)); }

EP_SCENARIO(near_credits, seed) { return run_twice(near(one_chunk(2, 1, seed))); }

EP_SCENARIO(near_chunks, seed) { return run_twice(near(several_chunks(seed))); }

EP_SCENARIO(rail_and_slots, seed) {
    InternodeOptions options = one_chunk(2, 2, seed);
    options.window = 1;
    return run_twice(options);
}

// Streams that one warp serves by turns.
EP_SCENARIO(three_nodes, seed) { return run_twice(one_chunk(3, 1, seed)); }

EP_SCENARIO(lent_across, seed) {
    InternodeOptions options = one_chunk(2, 2, seed);
    options.lend_bytes = 1 << 14;
    Problem problem = small_problem(options, seed);
    problem.lending_ranks = 5;
    return run_twice(options, problem);
}

// Nothing but the rail's own words orders a bank's uses: rank 1 only receives, call after call.
EP_SCENARIO(one_way_rail, seed) {
    InternodeOptions options = small_options(2, 1, seed);
    Problem problem = small_problem(options, seed);
    problem.num_tokens = {6, 0};
    problem.only_rank = 1;
    InternodeWorld world(options, problem);
    InternodeCall call(problem, options);
    if (std::string difference = world.dispatch(call); !difference.empty()) return difference;
    world.run([&] {
        for (int repeat = 0; repeat < 4; ++repeat)
            for (int rank = 0; rank < 2; ++rank) world.launch_dispatch(call, rank, Counts::kKnown);
    });
    if (std::string difference = check_dispatch(problem, call.ranks, true); !difference.empty()) return difference;
    // Back again: now rank 0 only receives.
    prepare_combine(call.problem, call.ranks);
    world.run([&] {
        for (int repeat = 0; repeat < 4; ++repeat)
            for (int rank = 0; rank < 2; ++rank) world.launch_combine(call, rank);
    });
    return check_combine(call.problem, call.ranks);
}

// Nothing but counts is exchanged, every other call, with no host between the calls.
std::string exchange_counts(const InternodeOptions& options, Problem problem) {
    problem.num_tokens = {0, 0, 0, 0};
    problem.num_extra_rows = 1;
    InternodeWorld world(options, problem);
    InternodeCall call(problem, options);
    for (int rank = 0; rank < 4; ++rank) world.prepare_dispatch(call, rank, false);
    world.run([&] {
        for (int repeat = 0; repeat < 4; ++repeat)
            for (int rank = 0; rank < 4; ++rank) {
                world.launch_notify(call, rank);
                world.launch_dispatch(call, rank, Counts::kExchanged);
                world.launch_combine(call, rank);
            }
    });
    for (int rank = 0; rank < 4; ++rank)
        if (failure_of(world, rank) != layout::FailureKind::kNone) return "a call without tokens has failed";
    return check_dispatch(call.problem, call.ranks);
}

EP_SCENARIO(counts_on_rail, seed) {
    const InternodeOptions options = small_options(2, 2, seed);
    return exchange_counts(options, small_problem(options, seed));
}

// Rank 1 has passed on what its neighbour waits for, and is slow to read what the neighbour has told.
EP_SCENARIO(counts_of_a_slow_rank, seed) {
    InternodeOptions options = small_options(2, 2, seed);
    options.scheduler = {.slow_device = 1};
    return exchange_counts(options, small_problem(options, seed));
}

// Rank 3 does not come to the exchange. Rank 2, to which it would pass on the counts of rank 1, must not blame rank 1.
EP_SCENARIO(absent_forwarder, seed) {
    const InternodeOptions options = impatient_options(2, 2, seed);
    const Problem problem = small_problem(options, seed);
    InternodeWorld world(options, problem);
    InternodeCall call(problem, options);
    world.run([&] {
        for (const int rank : {2, 0, 1}) world.launch_notify(call, rank);
    });
    for (int rank = 0; rank < 3; ++rank) {
        const layout::WaitRecord& record = world.status(rank).failure;
        const int missing =
            record.kind == layout::FailureKind::kAborted ? layout::abort_missing(record.seen) : record.peer;
        if (record.state == 0 || missing != 3) return "a rank does not blame the one that is absent";
    }
    return "";
}

// Posters wait for the engine.
EP_SCENARIO(full_engine, seed) {
    InternodeOptions options = small_options(2, 1, seed);
    options.max_posted = 1;
    options.chunk_tokens = 1;
    return run_twice(options);
}

// Rank 1 does not come to a combine; rank 0 gives up in time and leaves nothing that passes for a result.
EP_SCENARIO(absent_across, seed) {
    const InternodeOptions options = impatient_options(2, 1, seed);
    const Problem problem = small_problem(options, seed);
    InternodeWorld world(options, problem);
    InternodeCall call(problem, options);
    if (std::string difference = world.dispatch(call); !difference.empty()) return difference;
    prepare_combine(call.problem, call.ranks[0], 0);
    world.run([&] { world.launch_combine(call, 0); });
    if (failure_of(world, 0) != layout::FailureKind::kTimeout) return "rank 0 has not given up";
    if (world.status(0).failure.peer != 1) return "rank 0 names another rank";
    return check_void_combine(call.ranks[0]);
}

// Rank 1 does not come to the exchange.
EP_SCENARIO(absent_in_exchange, seed) {
    const InternodeOptions options = impatient_options(2, 1, seed);
    const Problem problem = small_problem(options, seed);
    InternodeWorld world(options, problem);
    InternodeCall call(problem, options);
    world.run([&] { world.launch_notify(call, 0); });
    if (failure_of(world, 0) != layout::FailureKind::kTimeout) return "rank 0 has not given up";
    return world.status(0).failure.peer == 1 ? "" : "rank 0 names another rank";
}

// Rank 1 refuses; rank 0 hears of it over the rail, long before its own deadline.
EP_SCENARIO(refused_across, seed) {
    InternodeOptions options = small_options(2, 1, seed);
    options.scheduler = impatient(seed);
    const Problem problem = small_problem(options, seed);
    InternodeWorld world(options, problem);
    InternodeCall call(problem, options);
    for (int rank = 0; rank < 2; ++rank) world.prepare_dispatch(call, rank, false);
    call.rails[1].rail_head.clear();
    world.run([&] {
        for (int rank = 0; rank < 2; ++rank) {
            world.launch_notify(call, rank);
            world.launch_dispatch(call, rank, Counts::kExchanged);
        }
    });
    if (failure_of(world, 1) != layout::FailureKind::kBadInput) return "rank 1 has not refused";
    return failure_of(world, 0) == layout::FailureKind::kAborted ? "" : "rank 0 has not heard of it";
}

}  // namespace

}  // namespace deep_ep::test
