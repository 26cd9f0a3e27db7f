// Low latency: banks that are used again, two calls open at a time, peers that may be left out.
#include "device/launch.h"
#include "device/prim.h"
#include "mutation/scenarios.h"
#include "mutation/worlds.h"
#include "support/low_latency_world.h"

namespace deep_ep::test {
namespace {

// Few contexts of ThreadSanitizer: bulk copies, which this mode does not use, would double them.
simt::DeviceOptions small_device(uint64_t seed) { return {.num_sms = seed % 2 == 0 ? 2 : 1, .has_bulk_copy = false}; }

World make_world(const LowLatencyProblem& problem, uint64_t seed, bool is_shrinkable = false) {
    simt::SchedulerOptions options;
    options.seed = seed;
    return World(problem.num_ranks(), 0, options, 100, low_latency_bytes(problem), is_shrinkable, {small_device(seed)});
}

LowLatencyProblem small_problem(uint64_t seed) {
    LowLatencyProblem problem{
        .num_tokens = {3, 5}, .num_max_tokens = 6, .num_experts = 4, .num_topk = 2, .hidden = 128};
    problem.is_fp8 = seed % 2 == 0;
    problem.uses_logfmt = seed % 3 == 1;
    problem.seed = seed;
    return problem;
}

std::string three_round_trips(World& world, const LowLatencyProblem& problem) {
    for (int repeat = 0; repeat < 3; ++repeat)
        if (std::string difference =
                low_latency_round_trip(world, problem, repeat == 1 ? Launches::kTwo : Launches::kOne);
            !difference.empty())
            return difference;
    return "";
}

EP_SCENARIO(low_latency, seed) {
    World world = make_world(small_problem(seed), seed);
    return three_round_trips(world, small_problem(seed));
}

// So many experts that a routing table is made in tiles, of two words for each expert; all tokens go to one.
EP_SCENARIO(low_latency_tiles, seed) {
    LowLatencyProblem problem{
        .num_tokens = {66, 2}, .num_max_tokens = 66, .num_experts = 4000, .num_topk = 1, .hidden = 8};
    problem.only_expert = 5;
    problem.seed = seed;
    World world = make_world(problem, seed);
    return low_latency_round_trip(world, problem, Launches::kOne);
}

// Nobody is masked; but every table is decided on.
EP_SCENARIO(low_latency_shrinkable, seed) {
    World world = make_world(small_problem(seed), seed, true);
    return three_round_trips(world, small_problem(seed));
}

// Rows that the counts speak of, and that nobody has written.
std::string rows_not_placed(const LowLatencyProblem& problem, const LowLatencyTensors& tensors) {
    const auto num_rows = static_cast<size_t>(problem.num_rows());
    for (size_t expert = 0; expert < tensors.recv_count.size(); ++expert)
        for (size_t row = 0; row < static_cast<size_t>(tensors.recv_count[expert]); ++row)
            if (tensors.src_info[expert * num_rows + row] < 0) return "a row that was counted was not placed";
    return "";
}

// Two calls are always open, so that a rank sends the next call before it has received the last: only the word that says
// so keeps a peer from writing the bank too early. Every call has rows of its own: a row of a later call is a wrong one.
std::string one_way_calls(uint64_t seed, uint64_t num_calls, bool is_one_warp) {
    LowLatencyProblem problem{
        .num_tokens = {5, 0}, .num_max_tokens = 6, .num_experts = 2, .num_topk = 1, .hidden = 128};
    problem.only_expert = 1;
    problem.drop_probability = 0.0;
    simt::SchedulerOptions options;
    options.seed = seed;
    simt::DeviceOptions device = small_device(seed);
    device.useful_block_threads = is_one_warp ? 64 : 128;  // of one warp or two
    World world(2, 0, options, 100, low_latency_bytes(problem), false, {device});
    std::vector<std::vector<LowLatencyTensors>> calls;
    for (problem.seed = 1; problem.seed <= num_calls; ++problem.seed) calls.push_back(make_low_latency_inputs(problem));
    for (int rank = 0; rank < 2; ++rank)
        for (size_t call = 0; call < calls.size(); call += 2) {
            for (size_t i : {call, call + 1}) send(Call::kDispatch, world, problem, calls[i], rank);
            for (size_t i : {call, call + 1}) receive(Call::kDispatch, world, problem, calls[i], rank);
        }
    world.run();
    world.check_all();
    for (const auto& call : calls)
        if (std::string difference = check_low_latency_dispatch(problem, call); !difference.empty()) return difference;
    return "";
}

EP_SCENARIO(low_latency_one_way, seed) { return one_way_calls(seed, 6, seed % 3 != 0); }

// Many short runs, each with a schedule of its own: among so many there are some in which the lanes of a warp that tells what it
// has received are far apart, whatever the kernels look like.
EP_SCENARIO(low_latency_one_way_schedules, seed) {
    constexpr uint64_t kNumSchedules = 64;
    for (uint64_t i = 1; i <= kNumSchedules; ++i)
        if (std::string difference = one_way_calls(seed * kNumSchedules + i, 4, true); !difference.empty())
            return difference;
    return "";
}

// With a hook, rank 1 enters its combines late: rank 0 sends its rows as they are.
EP_SCENARIO(low_latency_late_weights, seed) {
    const LowLatencyProblem problem = small_problem(seed);
    World world = make_world(problem, seed);
    for (int repeat = 0; repeat < 2; ++repeat) {
        auto ranks = make_low_latency_inputs(problem);
        run_on(Call::kDispatch, world, problem, ranks, {0, 1}, Launches::kOne);
        fill_expert_rows(problem, ranks);
        pass_time(world, 1, 200'000);
        run_on(Call::kCombine, world, problem, ranks, {0, 1});
        if (std::string difference = check_low_latency_combine(problem, ranks); !difference.empty()) return difference;
    }
    return "";
}

// A rank's table comes while the deadline for it passes: either every warp counts its rows, or none does. Its kernels begin
// shortly before that, a little later in each try: they take some microseconds until the table. Rows of rank 0 come before those
// of rank 1, so whoever counts them has another place for these.
EP_SCENARIO(low_latency_late_table, seed) {
    constexpr uint64_t kTimeoutNs = 60'000;
    const simt::DeviceOptions three_small_blocks{.num_sms = 3, .has_bulk_copy = false, .useful_block_threads = 64};
    const LowLatencyProblem problem = small_problem(seed);
    for (uint64_t i = 0; i < 25; ++i) {
        simt::SchedulerOptions options;
        options.seed = seed * 25 + i + 1;
        World world(2, 0, options, kTimeoutNs * 1e-9, low_latency_bytes(problem), true, {three_small_blocks});
        auto ranks = make_low_latency_inputs(problem);
        pass_time(world, i % 2 == 0 ? 1 : 0, kTimeoutNs * 11 / 12 + i * 800);
        run_on(Call::kDispatch, world, problem, ranks, {0, 1});
        for (const LowLatencyTensors& tensors : ranks)
            if (std::string difference = rows_not_placed(problem, tensors); !difference.empty()) return difference;
    }
    return "";
}

// A row that never comes, after its table: the call fails while lists of counts are written, and they must all be void.
EP_SCENARIO(low_latency_lost_row, seed) {
    LowLatencyProblem problem = small_problem(seed);
    problem.drop_probability = 0.0;
    simt::SchedulerOptions options;
    options.seed = seed;
    options.idle = simt::IdlePolicy::kAdvanceClock;
    World world(2, 0, options, 20e-6, low_latency_bytes(problem), false, {small_device(seed)});
    auto ranks = make_low_latency_inputs(problem);
    for (int rank = 0; rank < 2; ++rank) send(Call::kDispatch, world, problem, ranks, rank);
    world.run();
    for (int token = 0; token < problem.num_tokens[1]; ++token) low_latency_token_flag(world, 0, 1, 1, token) = 0;
    receive(Call::kDispatch, world, problem, ranks, 0);
    world.run();
    for (const int count : ranks[0].recv_count)
        if (count != 0) return "a call that failed says that there are rows";
    for (const int64_t range : ranks[0].layout_range)
        if (range != 0) return "a call that failed says where rows are";
    return "";
}

// One thread that writes a word, or reads it.
struct WordKernel {
    struct Params {
        uint64_t* word;
        uint64_t value;
        uint64_t* seen;  // null: write
    };
    struct Shared {};
    static EP_DEVICE void run(const Params& params, Shared&) {
        if (threadIdx.x != 0) return;
        if (params.seen == nullptr)
            *params.word = params.value;
        else
            *params.seen = *params.word;
    }
};

// What ranks did before they clean, all may count on afterwards.
EP_SCENARIO(low_latency_clean, seed) {
    constexpr uint64_t kNumRounds = 3;
    World world = make_world(small_problem(seed), seed);
    uint64_t seen[kNumRounds] = {};
    auto* word = reinterpret_cast<uint64_t*>(world.buffer(1).low_latency().data());
    dev::LaunchConfig config;
    config.name = "word";
    for (uint64_t round = 0; round < kNumRounds; ++round) {
        dev::launch<WordKernel>(config, world.stream(0), {word, round + 1, nullptr});
        for (int rank = 0; rank < 2; ++rank) world.buffer(rank).low_latency().clean(world.stream(rank));
        dev::launch<WordKernel>(config, world.stream(1), {word, 0, &seen[round]});
        for (int rank = 0; rank < 2; ++rank) world.buffer(rank).low_latency().clean(world.stream(rank));
    }
    world.run();
    for (uint64_t round = 0; round < kNumRounds; ++round)
        if (seen[round] != round + 1) return "a rank left the barrier before another had come";
    return "";
}

}  // namespace

}  // namespace deep_ep::test
