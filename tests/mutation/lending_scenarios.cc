// Rows that peers write and read in place. Two blocks where the last one speaks for both; one where everything else counts.
#include "device/launch.h"
#include "mutation/scenarios.h"
#include "mutation/worlds.h"

namespace deep_ep::test {
namespace {

constexpr int64_t kLendBytes = 1 << 18;

World make_world(int num_ranks, const simt::SchedulerOptions& options, const simt::DeviceOptions& device,
                 double timeout_s = 100) {
    return World(num_ranks, 1 << 14, options, timeout_s, 0, false, {device}, kLendBytes);
}

Problem small_problem(uint64_t seed, uint32_t lending_ranks) {
    return {.num_tokens = {9, 7},
            .num_experts = 4,
            .hidden = 16,
            .num_sms = 1,
            .drop_probability = 0.0,
            .seed = seed,
            .lending_ranks = lending_ranks};
}

EP_SCENARIO(both_lend, seed) {
    World world = make_world(2, varied(seed), small_device(seed));
    const Problem problem = small_problem(seed, 0b11);
    std::string difference = round_trip(world, problem);
    return difference.empty() ? round_trip(world, problem) : difference;
}

EP_SCENARIO(one_lends, seed) {
    World world = make_world(2, varied(seed), small_device(seed));
    return round_trip(world, small_problem(seed, 0b01));
}

// A caller's kernel: reads and writes every word.
struct TouchKernel {
    struct Params {
        uint32_t* words;
        int num_words;
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        for (int i = static_cast<int>(threadIdx.x); i < params.num_words; i += static_cast<int>(blockDim.x))
            params.words[i] = params.words[i] * 3 + 1;
    }
};

void launch_touch(World& world, const RankTensors::Lent& lent, int rank) {
    dev::LaunchConfig config;
    config.name = "touch";
    dev::launch<TouchKernel>(
        config, world.stream(rank),
        {reinterpret_cast<uint32_t*>(lent.memory->address()), static_cast<int>(lent.num_bytes / 4)});
}

constexpr simt::DeviceOptions kDeviceOfSums{.num_sms = 2, .useful_block_threads = 64};

Problem problem_of_sums(uint64_t seed, uint32_t lending_ranks) {
    Problem problem = small_problem(seed, lending_ranks);
    problem.sums_ranks = 0b11;
    problem.num_sms = 2;  // a block that sends, and one that adds
    problem.drop_probability = 0.3;
    return problem;
}

// Each adds its own rows to what the other writes into its sums, again and again in the same memory.
std::string sums(uint64_t seed, uint32_t lending_ranks) {
    const Problem problem = problem_of_sums(seed, lending_ranks);
    World world = make_world(2, varied(seed), kDeviceOfSums);
    auto ranks = world.dispatched(problem);
    prepare_combine(problem, ranks);
    for (int repeat = 0; repeat < 3; ++repeat)
        for (int rank = 0; rank < 2; ++rank) {
            RankTensors& tensors = ranks[static_cast<size_t>(rank)];
            world.launch_combine(problem, tensors, rank);
            if (repeat < 2)
                for (const RankTensors::Lent& lent : tensors.lent)
                    if (lent.data == tensors.combined_x.data()) launch_touch(world, lent, rank);
        }
    world.run();
    World::collect(ranks);
    world.check_all();
    return check_combine(problem, ranks);
}

EP_SCENARIO(both_lend_sums, seed) { return sums(seed, 0); }

EP_SCENARIO(sums_beside_an_input, seed) { return sums(seed, 0b10); }

// The weights alone are waited for: there are rows of one rank only.
EP_SCENARIO(weights_of_a_lender, seed) {
    Problem problem = small_problem(seed, 0b10);
    problem.num_tokens = {4, 0};
    problem.only_rank = 1;
    World world = make_world(2, varied(seed), small_device(seed));
    return round_trip(world, problem);
}

// What was received is worked on, combined where it lies, worked on, and received there again, with no host in between:
// the kernels of a rank must end when its peers have written, and when they have read.
std::string use_at_once(const Problem& problem, World& world) {
    auto ranks = world.dispatched(problem);
    prepare_combine(problem, ranks);
    for (int repeat = 0; repeat < 3; ++repeat) {
        for (int rank = 0; rank < 2; ++rank) {
            RankTensors& tensors = ranks[static_cast<size_t>(rank)];
            world.launch_dispatch(problem, tensors, rank, Counts::kKnown);
            const bool has_rows = problem.lends(rank) && !tensors.y.empty();
            if (has_rows && repeat == 0) {
                RankTensors::Lent rows = tensors.lent.front();
                rows.data = tensors.y.data();
                tensors.lent.push_back(rows);
            }
            if (has_rows) launch_touch(world, tensors.lent.front(), rank);
            world.launch_combine(problem, tensors, rank);
            if (has_rows) launch_touch(world, tensors.lent.front(), rank);
        }
    }
    for (int rank = 0; rank < 2; ++rank)
        world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kKnown);
    world.run();
    World::collect(ranks);
    world.check_all();
    return check_dispatch(problem, ranks, true);
}

EP_SCENARIO(used_at_once, seed) {
    World world = make_world(2, varied(seed), small_device(seed));
    return use_at_once(small_problem(seed, 0b11), world);
}

// Only the block that comes last tells the lender; rank 0 is the only borrower, and rank 1 the only lender.
EP_SCENARIO(two_blocks, seed) {
    Problem problem = small_problem(seed, 0b10);
    problem.num_tokens = {8, 0};
    problem.num_sms = 2;
    problem.only_rank = 1;
    World world = make_world(2, varied(seed), small_device(seed));
    return use_at_once(problem, world);
}

// The lender moves rows without bulk copies and the borrower with them: each reaches what the other proxy has touched.
EP_SCENARIO(borrower_with_bulk_copies, seed) {
    World world(2, 1 << 14, varied(seed), 100, 0, false, {small_device(seed), small_device(seed + 1)}, kLendBytes);
    return use_at_once(small_problem(seed, seed % 2 == 0 ? 0b10 : 0b01), world);
}

// Counts and loans are exchanged at once.
EP_SCENARIO(worst_cases_lent, seed) {
    Problem problem = small_problem(seed, 0b11);
    problem.num_extra_rows = 1;
    World world = make_world(2, varied(seed), small_device(seed));
    return round_trip(world, problem);
}

// The hosts guess how many rows come: both have room, or rank 1 has not and goes on in a second kernel.
std::string guess(uint64_t seed, int num_spare_rows) {
    Problem problem = small_problem(seed, 0b11);
    problem.num_sms = 2;
    World world = make_world(2, varied(seed), small_device(seed));
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    for (int i = 0; i < 2; ++i) {
        world.dispatch_guessed(problem, ranks, {1, num_spare_rows}, i == 0);
        if (std::string difference = check_dispatch(problem, ranks); !difference.empty()) return difference;
        world.combine(problem, ranks);
        if (std::string difference = check_combine(problem, ranks); !difference.empty()) return difference;
    }
    return "";
}

EP_SCENARIO(guess_with_room, seed) { return guess(seed, 2); }

EP_SCENARIO(guess_too_small, seed) { return guess(seed, -1); }

// Rank 1 lends too few rows: rank 0 must not begin.
EP_SCENARIO(refused_loan, seed) {
    const Problem problem = small_problem(seed, 0b11);
    World world = make_world(2, impatient(seed), small_device(seed));
    auto ranks = world.dispatched(problem);
    for (int rank = 0; rank < 2; ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        prepare_recv(problem, tensors, tensors.num_recv_tokens - rank);
        world.launch_dispatch(problem, tensors, rank, Counts::kUnknown);
    }
    world.run();
    return expect_refusal_of_rank_1(world);
}

// Rank 1 finds in the middle of its work that it has stated a row too few, when other blocks and rank 0 have written rows
// into its outputs: nothing of them may be left.
EP_SCENARIO(failed_lender, seed) {
    Problem problem = small_problem(seed, 0b11);
    problem.num_sms = 2;
    World world = make_world(2, impatient(seed), small_device(seed));
    auto ranks = world.dispatched(problem);
    --ranks[1].num_tokens_per_rank[0];
    for (int rank = 0; rank < 2; ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        prepare_recv(problem, tensors, tensors.num_recv_tokens);
        world.launch_dispatch(problem, tensors, rank, Counts::kUnknown);
    }
    world.run();
    World::collect(ranks);
    if (std::string left = check_void_dispatch(ranks[1], false); !left.empty()) return left + " is not void";
    return expect_failure("are stated", [&] { world.buffer(1).check(); });
}

// The same in combine: rank 0 has a position beyond the rows that rank 1 has for it.
EP_SCENARIO(failed_combine, seed) {
    Problem problem = small_problem(seed, seed % 3 == 0 ? 0b11 : 0);
    problem.num_sms = 2;
    World world = make_world(2, impatient(seed), small_device(seed));
    auto ranks = world.dispatched(problem);
    for (size_t token = ranks[0].send_head.size() / 2; token-- > 0;)
        if (ranks[0].send_head[token * 2 + 1] >= 0) {
            ranks[0].send_head[token * 2 + 1] += 1000;
            break;
        }
    for (int rank = 0; rank < 2; ++rank) {
        prepare_combine(problem, ranks[static_cast<size_t>(rank)], rank);
        world.launch_combine(problem, ranks[static_cast<size_t>(rank)], rank);
    }
    world.run();
    if (std::string left = check_void_combine(ranks[0]); !left.empty()) return left + " is not void";
    return expect_failure("are stated", [&] { world.buffer(0).check(); });
}

// Rank 1 has a row of a token that rank 0 does not have, when others have been written into the sums of both: each makes its
// own void only when the other writes there no more.
EP_SCENARIO(failed_sums, seed) {
    const Problem problem = problem_of_sums(seed, 0);
    World world = make_world(2, impatient(seed), kDeviceOfSums);
    auto ranks = world.dispatched(problem);
    ranks[1].recv_src_idx[0] = 1000;
    prepare_combine(problem, ranks);
    for (int rank = 0; rank < 2; ++rank) world.launch_combine(problem, ranks[static_cast<size_t>(rank)], rank);
    world.run();
    World::collect(ranks);
    for (const RankTensors& tensors : ranks)
        if (std::string left = check_void_combine(tensors); !left.empty()) return left + " is not void";
    return expect_refusal_of_rank_1(world);
}

// Rank 1 never comes, and rank 0, which lends, says so.
EP_SCENARIO(absent_borrower, seed) {
    const Problem problem = small_problem(seed, 0b11);
    World world = make_world(2, impatient(seed), small_device(seed), 2);
    return call_alone(world, problem,
                      [&](RankTensors& mine) { world.launch_dispatch(problem, mine, 0, Counts::kKnown); });
}

}  // namespace

}  // namespace deep_ep::test
