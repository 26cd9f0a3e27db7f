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
    uint64_t dispatch_ticket = 0, combine_ticket = 0;
    std::vector<uint64_t> numbers = std::vector<uint64_t>(2);  // of the open dispatch and combine; on the device
};

std::vector<LowLatencyTensors> make_low_latency_inputs(const LowLatencyProblem& problem);
int64_t low_latency_bytes(const LowLatencyProblem& problem);

void send_dispatch(World& world, const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank);
void receive_dispatch(World& world, const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank);
// The whole call: in one launch for both phases, or one for each.
enum class Launches { kOne, kTwo };
void launch_dispatch(World& world, const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank,
                     Launches launches);
void launch_combine(World& world, const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank,
                    Launches launches);
// The experts: fresh random rows.
void fill_expert_rows(const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks);
void send_combine(World& world, const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank);
void receive_combine(World& world, const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank);

// The flag of a token of `source`, in the memory of `owner`.
uint64_t& low_latency_token_flag(World& world, int owner, int bank, int source, int token);

// The first difference from what the contract says, or "": in what one rank has received, and in what all have.
std::string check_low_latency_dispatch_of(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks,
                                          int rank);
std::string check_low_latency_dispatch(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks);
std::string check_low_latency_combine(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks);

// Dispatch, check, combine, check; the whole of each launched at once on every rank.
std::string low_latency_round_trip(World& world, const LowLatencyProblem& problem, Launches launches);

// A dispatch or a combine of these ranks, run to the end.
void dispatch_on(World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks,
                 const std::vector<int>& callers, Launches launches = Launches::kTwo);
void combine_on(World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks,
                const std::vector<int>& callers, Launches launches = Launches::kTwo);
std::vector<int> all_ranks(const LowLatencyProblem& problem);

// Rank 0 gives a dispatch up whose kernel has been launched, and which no other rank has entered.
void abandon_dispatch_of_rank_0(World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks);

// A layer's tokens on their way to the experts and back in phases, beside those of other micro-batches.
struct MicroBatch {
    World& world;
    const LowLatencyProblem& problem;
    std::vector<LowLatencyTensors> ranks = make_low_latency_inputs(problem);

    LowLatencyTensors& on(int rank) { return ranks[static_cast<size_t>(rank)]; }
    void send_dispatch(int rank) { test::send_dispatch(world, problem, on(rank), rank); }
    void receive_dispatch(int rank) { test::receive_dispatch(world, problem, on(rank), rank); }
    void send_combine(int rank) { test::send_combine(world, problem, on(rank), rank); }
    void receive_combine(int rank) { test::receive_combine(world, problem, on(rank), rank); }
    std::string check_dispatch() const { return check_low_latency_dispatch(problem, ranks); }
    std::string check_combine() const { return check_low_latency_combine(problem, ranks); }
};

// All ranks, run to the end: both micro-batches are sent, and `receive(rank)` receives them.
template <class Receive> std::string dispatch_both(MicroBatch& a, MicroBatch& b, const Receive& receive) {
    a.world.run_on_all([&](int rank) {
        a.send_dispatch(rank);
        b.send_dispatch(rank);
        receive(rank);
    });
    return a.check_dispatch() + b.check_dispatch();
}

// Likewise, of what the experts have made of the dispatched rows.
template <class Receive> std::string combine_both(MicroBatch& a, MicroBatch& b, const Receive& receive) {
    fill_expert_rows(a.problem, a.ranks);
    fill_expert_rows(b.problem, b.ranks);
    a.world.run_on_all([&](int rank) {
        a.send_combine(rank);
        b.send_combine(rank);
        receive(rank);
    });
    return a.check_combine() + b.check_combine();
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
