// Low-latency calls of all ranks of a World, with inputs, outputs and the obvious check.
#pragma once

#include <string>
#include <vector>

#include "device/simt/graph.h"
#include "support/world.h"

namespace deep_ep::test {

struct LowLatencyProblem {
    std::vector<int> num_tokens;  // of each rank
    int num_max_tokens = 16;
    int num_experts = 8;
    int num_topk = 3;
    int hidden = 256;
    bool is_fp8 = false, rounds_scales = false, packs_scales = false;
    bool uses_logfmt = false;  // combine
    double drop_probability = 0.1;
    int only_expert = -1;  // all entries go to this expert
    uint64_t seed = 1;

    int num_ranks() const { return static_cast<int>(num_tokens.size()); }
    int num_local_experts() const { return num_experts / num_ranks(); }
    int num_rows() const { return num_ranks() * num_max_tokens; }  // of one expert
    int row_bytes() const { return is_fp8 ? hidden : 2 * hidden; }
    int num_scale_words() const { return !is_fp8 ? 0 : packs_scales ? hidden / 512 : hidden / 128; }
    // What both calls begin with; `number` is on the device.
    runtime::LowLatencyArgs args(int64_t* wait_stats, uint64_t* number) const {
        return {num_max_tokens, num_topk, num_experts, hidden, wait_stats, number};
    }
};

struct LowLatencyTensors {
    std::vector<uint16_t> x;
    std::vector<int64_t> topk_idx;
    std::vector<float> topk_weights;
    std::vector<uint8_t> recv_x;
    std::vector<uint32_t> recv_scales;
    std::vector<int> recv_count, src_info, row_of_entry, cumulative_stats;
    std::vector<int64_t> layout_range, wait_stats;
    std::vector<uint16_t> y, combined_x;
    uint64_t ticket = 0;                                       // of the open call
    std::vector<uint64_t> numbers = std::vector<uint64_t>(2);  // of the open dispatch and combine; on the device
};

std::vector<LowLatencyTensors> make_low_latency_inputs(const LowLatencyProblem& problem);
int64_t low_latency_bytes(const LowLatencyProblem& problem);

// The phases of a call on one rank.
void send(Call call, World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks, int rank);
void receive(Call call, World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks,
             int rank);
// The whole call: in one launch for both phases, or one for each.
enum class Launches { kOne, kTwo };
void launch(Call call, World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks, int rank,
            Launches launches);
// The same of all these ranks, run to the end.
void run_on(Call call, World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks,
            const std::vector<int>& callers, Launches launches = Launches::kTwo);
std::vector<int> all_ranks(const LowLatencyProblem& problem);
// The experts: fresh random rows.
void fill_expert_rows(const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks);

// The flag of a token of `source`, in the memory of `owner`.
uint64_t& low_latency_token_flag(World& world, int owner, int bank, int source, int token);

// The first difference from what the contract says, or "": in what one rank has received, and in what all have.
std::string check_low_latency_dispatch_of(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks,
                                          int rank);
std::string check_low_latency_dispatch(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks);
std::string check_low_latency_combine(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks);

// Dispatch, check, combine, check; the whole of each launched at once on every rank.
std::string low_latency_round_trip(World& world, const LowLatencyProblem& problem, Launches launches);

// Rank 0 gives a dispatch up whose kernel has been launched, and which no other rank has entered.
void abandon_dispatch_of_rank_0(World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks);

// A layer's tokens on their way to the experts and back in phases, beside those of other micro-batches.
struct MicroBatch {
    World& world;
    const LowLatencyProblem& problem;
    std::vector<LowLatencyTensors> ranks = make_low_latency_inputs(problem);

    void send(Call call, int rank) { test::send(call, world, problem, ranks, rank); }
    void receive(Call call, int rank) { test::receive(call, world, problem, ranks, rank); }
    std::string check(Call call) const {
        return call == Call::kDispatch ? check_low_latency_dispatch(problem, ranks)
                                       : check_low_latency_combine(problem, ranks);
    }
};

// All ranks, run to the end: both micro-batches are sent, and `receive(rank)` receives them. A combine is of fresh rows.
template <class Receive> std::string run_both(Call call, MicroBatch& a, MicroBatch& b, const Receive& receive) {
    if (call == Call::kCombine)
        for (MicroBatch* batch : {&a, &b}) fill_expert_rows(batch->problem, batch->ranks);
    a.world.run_on_all([&](int rank) {
        a.send(call, rank);
        b.send(call, rank);
        receive(rank);
    });
    return a.check(call) + b.check(call);
}

// What `launch` launches for a rank, recorded.
template <class Launch> simt::Graph captured(World& world, int rank, const Launch& launch) {
    simt::Graph graph;
    graph.begin_capture(world.stream(rank));
    launch();
    graph.end_capture();
    return graph;
}

}  // namespace deep_ep::test
