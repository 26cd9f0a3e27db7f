// High throughput: windows that wrap, banks that are used again by traffic in one direction only (nothing but the
// protocol's own flags orders it), stages that are used again, ranks that do not come.
#include <functional>

#include "core/error.h"
#include "device/algo/ring.h"
#include "device/launch.h"
#include "layout/heap.h"
#include "mutation/scenarios.h"
#include "mutation/worlds.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

World make_world(int num_ranks, int64_t data_bytes, uint64_t seed) {
    return World(num_ranks, data_bytes, varied(seed), 100, 0, false, {small_device(seed)});
}

int64_t region_for(const Problem& problem, uint64_t window) {
    const auto slot = layout::SlotLayout::for_dispatch(static_cast<uint64_t>(problem.hidden) * 2,
                                                       static_cast<uint64_t>(problem.num_topk), 0);
    return static_cast<int64_t>(
        layout::WindowLayout::bytes_for(static_cast<uint64_t>(problem.num_ranks()), slot.bytes, window));
}

std::string two_round_trips(World& world, const Problem& problem) {
    std::string difference = round_trip(world, problem);
    return difference.empty() ? round_trip(world, problem) : difference;
}

// Every slot is waited for.
EP_SCENARIO(narrow_windows, seed) {
    const Problem problem{
        .num_tokens = {11, 7}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    World world = make_world(2, region_for(problem, 2), seed);
    return two_round_trips(world, problem);
}

// So many blocks and tokens that rows of a combine are staged on their way out alone. By one seed: these are many threads.
EP_SCENARIO(mixed_combine, seed) {
    if (seed != 0) return "";
    Problem problem{
        .num_tokens = {80, 80}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    simt::DeviceOptions device = small_device(seed);
    device.num_sms = 20;
    World world(2, region_for(problem, 8), varied(1), 100, 0, false, {device});
    auto ranks = world.dispatched(problem);
    problem.num_sms = device.num_sms;
    world.combine(problem, ranks);
    return check_combine(problem, ranks);
}

// Several slots come free before they are looked at.
EP_SCENARIO(wide_windows, seed) {
    const Problem problem{
        .num_tokens = {40, 31}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    World world = make_world(2, region_for(problem, 7), seed);
    return two_round_trips(world, problem);
}

// Only rank 1 receives, call after call: its reads must end before rank 0 writes the bank again.
EP_SCENARIO(one_way_traffic, seed) {
    Problem problem{
        .num_tokens = {6, 0}, .num_experts = 2, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .only_rank = 1};
    problem.seed = seed;
    World world = make_world(2, 1 << 14, seed);
    auto ranks = world.dispatched(problem);
    for (int repeat = 0; repeat < 4; ++repeat)
        for (int rank = 0; rank < 2; ++rank)
            world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kKnown);
    world.run();
    world.check_all();
    return check_dispatch(problem, ranks, true);
}

// Nothing but counts is exchanged, every other call, and no host waits between the calls.
std::string exchange_alone(uint64_t seed, Counts counts) {
    const Problem problem{.num_tokens = {0, counts == Counts::kUnknown ? 200 : 0},  // long between counts told and read
                          .num_experts = 600,
                          .hidden = 16,
                          .num_sms = 1,
                          .drop_probability = 1.0,
                          .seed = seed};
    World world = make_world(2, 1 << 14, seed);
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    for (int rank = 0; rank < 2; ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        prepare_combine(problem, tensors, rank);
        for (int repeat = 0; repeat < 4; ++repeat) {
            if (counts == Counts::kExchanged) world.launch_notify(problem, tensors, rank);
            world.launch_dispatch(problem, tensors, rank, counts);
            if (counts == Counts::kUnknown)  // the shortest call there is
                world.launch_dispatch(problem, tensors, rank, Counts::kKnown);
            else
                world.launch_combine(problem, tensors, rank);
        }
        world.launch_combine(problem, tensors, rank);
    }
    world.run();
    world.check_all();
    return check_combine(problem, ranks);
}

EP_SCENARIO(counts_alone, seed) { return exchange_alone(seed, Counts::kExchanged); }

// Rank 0 must be two calls ahead of rank 1, between its counts told and read: one seed of a hundred. `kSeedOfOne` is one, found
// by a search; a change of the kernels may ask for another one.
EP_SCENARIO(counts_alone_in_dispatch, seed) {
    constexpr uint64_t kSeedOfOne = 95;
    for (const uint64_t each : {seed, kSeedOfOne})
        if (std::string found = exchange_alone(each, Counts::kUnknown); !found.empty()) return found;
    return "";
}

// Dispatch exchanges the counts by itself, call after call, and routing changes from call to call.
EP_SCENARIO(worst_cases, seed) {
    World world = make_world(2, 1 << 14, seed);
    std::vector<std::pair<Problem, std::vector<RankTensors>>> calls;
    for (uint64_t i = 0; i < 4; ++i) {
        Problem problem{.num_tokens = {i % 2 == 0 ? 5 : 2, 3}, .num_experts = 2, .hidden = 16, .num_sms = 1};
        problem.num_extra_rows = 1;
        problem.seed = 10 * seed + i;
        calls.emplace_back(problem, make_inputs(problem));
        world.layout(problem, calls.back().second);
    }
    for (auto& [problem, ranks] : calls) world.launch_worst_case(problem, ranks);
    world.run();
    world.check_all();
    for (auto& [problem, ranks] : calls)
        if (std::string difference = check_dispatch(problem, ranks); !difference.empty()) return difference;
    return "";
}

// Several warps and blocks scan, several columns.
EP_SCENARIO(worst_case_of_three, seed) {
    const Problem problem{.num_tokens = {70, 0, 3},
                          .num_experts = 3,
                          .num_topk = 2,
                          .hidden = 16,
                          .num_sms = 1,
                          .num_extra_rows = 2,
                          .seed = seed};
    simt::DeviceOptions device = small_device(seed);
    World world(3, 1 << 14, varied(seed), 100, 0, false, {device});
    return round_trip(world, problem);
}

// Tokens in several pieces, rows from more than one peer.
EP_SCENARIO(three_ranks, seed) {
    const Problem problem{.num_tokens = {5, 0, 9}, .num_experts = 3, .hidden = 16, .num_scales = 1, .seed = seed};
    World world = make_world(3, 1 << 14, seed);
    return round_trip(world, problem);
}

EP_SCENARIO(rows_in_pieces, seed) {
    const Problem problem{
        .num_tokens = {4, 5}, .num_experts = 2, .hidden = 3600, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    World world = make_world(2, 1 << 18, seed);
    return round_trip(world, problem);
}

// Several blocks and warps count, scan and report: more tokens than one tile, more experts than a block has threads.
EP_SCENARIO(many_tokens_and_experts, seed) {
    Problem problem{.num_tokens = {200, 2}, .num_experts = 200, .num_topk = 1, .hidden = 8, .num_sms = 1, .seed = seed};
    World world = make_world(2, 1 << 20, seed);
    return round_trip(world, problem);
}

// Shared memory for two stages of dispatch, and none of combine's.
EP_SCENARIO(two_stages_in_dispatch, seed) {
    const Problem problem{
        .num_tokens = {14, 9}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    simt::DeviceOptions device = small_device(seed);
    device.max_shared_bytes = kernels::kMaxDispatchState + 2 * 216;
    World world(2, region_for(problem, 3), varied(seed), 100, 0, false, {device});
    return two_round_trips(world, problem);
}

// Shared memory for the stages of combine's reduce warp, and two of its send warp.
EP_SCENARIO(two_stages_in_combine, seed) {
    const Problem problem{
        .num_tokens = {14, 9}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    const layout::Staging reduce{layout::kReduceStages, layout::kReduceStageBytes};
    simt::DeviceOptions device = small_device(seed);
    device.max_shared_bytes = kernels::kMaxCombineState + reduce.bytes() + 2 * 70;
    World world(2, region_for(problem, 3), varied(seed), 100, 0, false, {device});
    return two_round_trips(world, problem);
}

// One rank moves rows with bulk copies and the other one without: each reads what the other proxy has written.
EP_SCENARIO(two_kinds_of_device, seed) {
    const Problem problem{
        .num_tokens = {11, 13}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    World world(2, region_for(problem, 5), varied(seed), 100, 0, false, {small_device(seed), small_device(seed + 1)});
    return two_round_trips(world, problem);
}

// Two warps of each kind in a block.
EP_SCENARIO(two_warps, seed) {
    const Problem problem{
        .num_tokens = {13, 9}, .num_experts = 70, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    simt::DeviceOptions device = small_device(seed);
    device.useful_block_threads = 128;
    World world(2, region_for(problem, 4), varied(seed), 100, 0, false, {device});
    return round_trip(world, problem);
}

// -- What the host reads while kernels run --------------------------------------------------------------------------------

EP_SCENARIO(absent_in_counts, seed) {
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 4, .hidden = 16, .seed = seed};
    World world(2, 1 << 14, impatient(seed), 2, 0, false, {small_device(seed)});
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    world.launch_notify(problem, ranks[0], 0);
    std::string found = expect_failure("never entered this call: rank 1", [&] { world.wait_counts(0); });
    world.run();
    return found;
}

// Rank 1 does not come to a call whose windows wrap: rank 0 gives up with rows under way.
EP_SCENARIO(absent_in_dispatch, seed) {
    const Problem problem{
        .num_tokens = {9, 9}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    World world(2, region_for(problem, 2), impatient(seed), 2, 0, false, {small_device(seed)});
    return call_alone(world, problem,
                      [&](RankTensors& mine) { world.launch_dispatch(problem, mine, 0, Counts::kKnown); });
}

EP_SCENARIO(absent_in_worst_case, seed) {
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 4, .hidden = 16, .num_sms = 1, .seed = seed};
    World world(2, 1 << 14, impatient(seed), 2, 0, false, {small_device(seed)});
    return call_alone(world, problem,
                      [&](RankTensors& mine) { world.launch_dispatch(problem, mine, 0, Counts::kUnknown); });
}

EP_SCENARIO(absent_in_combine, seed) {
    const Problem problem{
        .num_tokens = {9, 9}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    World world(2, region_for(problem, 2), impatient(seed), 2, 0, false, {small_device(seed)});
    return call_alone(world, problem, [&](RankTensors& mine) {
        prepare_combine(problem, mine, 0);
        world.launch_combine(problem, mine, 0);
    });
}

// The same by a warp whose first row has no slot, while other work goes on: its loads, which are late, are under way when it
// gives up.
EP_SCENARIO(absent_in_busy_combine, seed) {
    constexpr uint64_t kTimeoutNs = 800'000;
    const Problem problem{
        .num_tokens = {9, 9}, .num_experts = 4, .hidden = 16, .num_sms = 3, .drop_probability = 0.0, .seed = seed};
    simt::DeviceOptions device = small_device(seed);
    device.num_sms = problem.num_sms;
    World world(2, region_for(problem, 2), impatient(seed), kTimeoutNs * 1e-9, 0, false, {device});
    return call_alone(world, problem, [&](RankTensors& mine) {
        prepare_combine(problem, mine, 0);
        world.launch_combine(problem, mine, 0);
        pass_time(world, 1, 2 * kTimeoutNs);
    });
}

// Rank 1 has no room for its rows and says so to rank 0, which stops wherever it is: nothing of it may land later.
std::string refused(uint64_t seed, const std::function<void(World&, const Problem&, std::vector<RankTensors>&)>& call) {
    const Problem problem{
        .num_tokens = {9, 9}, .num_experts = 4, .hidden = 16, .num_sms = 1, .drop_probability = 0.0, .seed = seed};
    for (uint64_t i = 0; i < 8; ++i) {
        simt::SchedulerOptions options{.seed = 100 * seed + i + 1, .bulk = simt::BulkMode::kRandom};
        options.idle = simt::IdlePolicy::kAdvanceClock;  // a wait looks for refusals now and then only
        World world(2, region_for(problem, 2), options, 100, 0, false, {small_device(seed)});
        auto ranks = world.dispatched(problem);
        call(world, problem, ranks);
        world.run();
        if (std::string found = expect_refusal_of_rank_1(world); !found.empty()) return found;
    }
    return "";
}

EP_SCENARIO(refused_dispatch, seed) {
    return refused(seed, [](World& world, const Problem& problem, std::vector<RankTensors>& ranks) {
        ranks[1].recv_src_idx.pop_back();
        for (int rank = 0; rank < 2; ++rank)
            world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kKnown);
    });
}

EP_SCENARIO(refused_worst_case, seed) {
    return refused(seed, [](World& world, const Problem& problem, std::vector<RankTensors>& ranks) {
        ranks[1].recv_src_idx.pop_back();
        for (int rank = 0; rank < 2; ++rank)
            world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kUnknown);
    });
}

EP_SCENARIO(refused_combine, seed) {
    return refused(seed, [](World& world, const Problem& problem, std::vector<RankTensors>& ranks) {
        prepare_combine(problem, ranks);
        --ranks[1].num_recv_tokens;
        for (int rank = 0; rank < 2; ++rank) world.launch_combine(problem, ranks[static_cast<size_t>(rank)], rank);
    });
}

EP_SCENARIO(bad_expert, seed) {
    const Problem problem{.num_tokens = {4, 4}, .num_experts = 4, .hidden = 16, .seed = seed};
    World world = make_world(2, 1 << 14, seed);
    auto ranks = make_inputs(problem);
    ranks[0].topk_idx[3] = 1000;
    for (int rank = 0; rank < 2; ++rank) {
        world.launch_layout(problem, ranks[static_cast<size_t>(rank)], rank);
        world.launch_notify(problem, ranks[static_cast<size_t>(rank)], rank);
    }
    std::string found = expect_failure("1000", [&] { world.wait_counts(0); });
    world.run();
    return found;
}

// -- Parts of the protocol, alone -----------------------------------------------------------------------------------------

// One warp: every lane reads what lane 0 has loaded, and nothing else brings the lanes together.
struct StagesKernel {
    struct Params {
        const uint32_t* input;
        uint32_t* output;  // [2, 32]
    };
    struct Shared {
        alignas(128) uint8_t memory[2 * (128 + layout::Staging::kBarrierBytes)];
    };
    static EP_DEVICE void run(const Params& params, Shared& shared) {
        const algo::Stages stages(shared.memory, {2, 128});
        stages.init(algo::Warp{});
        if (prim::lane_idx() == 0) stages.load(0, params.input, 128);
        stages.wait(0);
        params.output[prim::lane_idx()] = reinterpret_cast<const uint32_t*>(stages.at(0))[prim::lane_idx()];
    }
};

EP_SCENARIO(stages_alone, seed) {
    simt::Scheduler scheduler(varied(seed));
    simt::SimtDevice device(scheduler, 0, {});
    const dev::Stream stream = device.create_stream();
    alignas(16) uint32_t input[32];
    uint32_t output[32] = {};
    for (uint32_t i = 0; i < 32; ++i) input[i] = i + 1;
    dev::LaunchConfig config;
    config.name = "stages";
    dev::launch<StagesKernel>(config, stream, {input, output});
    device.synchronize_stream(stream);
    device.destroy_stream(stream);
    for (uint32_t i = 0; i < 32; ++i)
        if (output[i] != i + 1) return "stages: wrong data";
    return "";
}

}  // namespace

}  // namespace deep_ep::test
