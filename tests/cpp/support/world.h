// All ranks of a node in one process, on one executor: the whole protocol as one deterministic program.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "device/simt/device.h"
#include "device/simt/scheduler.h"
#include "runtime/buffer.h"

namespace deep_ep::test {

simt::SchedulerOptions seeded(uint64_t seed);
// Virtual time passes while everybody waits.
simt::SchedulerOptions impatient();

// What one layer looks like. Everything else follows from `seed`.
struct Problem {
    std::vector<int> num_tokens;  // of each rank
    int num_experts = 8;
    int num_topk = 2;
    int hidden = 64;  // bfloat16 elements of a row
    int num_scales = 0;
    int expert_alignment = 1;
    int num_sms = 2;
    int num_biases = 0;
    double drop_probability = 0.1;  // of a top-k entry being -1
    int only_rank = -1;             // all entries go to the experts of this rank
    int num_extra_rows = 0;         // > 0: worst-case mode with so many rows more than arrive
    uint64_t seed = 1;
    int ranks_per_node = 0;      // 0: all are in one
    uint32_t lending_ranks = 0;  // bit i: rank i lends outputs of dispatch and inputs of combine (in a World that can)

    uint32_t sums_ranks = 0;  // likewise, outputs of combine

    bool lends_sums(int rank) const { return (sums_ranks >> rank & 1u) != 0; }
    bool lends(int rank) const { return (lending_ranks >> rank & 1u) != 0; }
    int num_ranks() const { return static_cast<int>(num_tokens.size()); }
};

// One rank's tensors, at their exact sizes so that AddressSanitizer sees every overrun. Outputs start poisoned.
struct RankTensors {
    std::vector<uint16_t> x;
    std::vector<uint32_t> scales;
    std::vector<int64_t> topk_idx;
    std::vector<float> topk_weights;

    std::vector<int> num_tokens_per_rank, num_tokens_per_expert;
    std::vector<uint8_t> is_token_in_rank;
    std::vector<int> rank_prefix_matrix, send_head;

    std::vector<uint16_t> recv_x;
    std::vector<uint32_t> recv_scales;
    std::vector<int64_t> recv_topk_idx;
    std::vector<float> recv_topk_weights;
    std::vector<int> recv_src_idx;
    int64_t num_recv_tokens = 0;
    std::vector<int> num_recv_per_expert;

    // What this rank lends, and the vectors that it stands for.
    struct Lent {
        std::shared_ptr<runtime::LentMemory> memory;
        void* data;
        size_t num_bytes;
    };
    std::vector<Lent> lent;

    std::vector<uint16_t> y;  // what the experts made of recv_x
    std::vector<float> y_weights;
    std::vector<uint16_t> bias[2];
    std::vector<uint16_t> combined_x;
    std::vector<float> combined_weights;
};

// What the caller on `rank` hands to each operation: everything in its own memory, a dispatch without counts.
kernels::NotifyArgs notify_args(const Problem& problem, RankTensors& tensors, int rank);
kernels::DispatchArgs dispatch_args(const Problem& problem, RankTensors& tensors, int rank, bool is_cached);
kernels::CombineArgs combine_args(const Problem& problem, RankTensors& tensors, int rank);

enum class Call { kDispatch, kCombine };

// What a dispatch knows of the counts of all ranks: nothing yet (worst case), notify_dispatch has exchanged them, or they
// are those of an earlier call.
// kGuessed: as kUnknown, but the host waits, and the outputs hold what it has guessed.
enum class Counts { kUnknown, kExchanged, kKnown, kGuessed };

// The rail of a World of several nodes.
struct WorldRail {
    int ranks_per_node;
    // Called with all devices before the first engine is asked for.
    std::function<void(const std::vector<simt::SimtDevice*>&)> begin;
    std::function<std::unique_ptr<rail::Engine>(const std::shared_ptr<dev::Device>&, const rail::EngineOptions&)>
        make_engine;
    // Runs `body` as host code while the rail carries what is posted.
    std::function<void(simt::Scheduler&, const std::function<void()>& body)> run;
    std::function<void()> end;  // no Buffer has an engine any more
};

class World {
public:
    World(int num_ranks, int64_t num_data_bytes, const simt::SchedulerOptions& options, double timeout_s = 100,
          int64_t num_low_latency_bytes = 0, bool is_shrinkable = false,
          const std::vector<simt::DeviceOptions>& devices = {{}},  // of each rank; one: of all
          int64_t num_lend_bytes = 0, const WorldRail* rail = nullptr);
    ~World();

    simt::Scheduler& scheduler() { return *scheduler_; }
    runtime::Buffer& buffer(int rank) { return *buffers_[static_cast<size_t>(rank)]; }
    dev::Stream stream(int rank) { return streams_[static_cast<size_t>(rank)]; }
    simt::SimtDevice& device(int rank) { return *devices_[static_cast<size_t>(rank)]; }
    int num_ranks() const { return static_cast<int>(buffers_.size()); }
    // Runs everything that was launched. Throws what the executor found (deadlock, race of a collective, …).
    void run();
    // `launch(rank)` for each rank, and then run().
    template <class Launch> void run_on_all(const Launch& launch) {
        for (int rank = 0; rank < num_ranks(); ++rank) launch(rank);
        run();
    }
    // Throws what any rank's Buffer has to report.
    void check_all();

    void layout(const Problem& problem, std::vector<RankTensors>& ranks);
    void dispatch(const Problem& problem, std::vector<RankTensors>& ranks);         // fresh, or worst case
    std::vector<RankTensors> dispatched(const Problem& problem);                    // fresh inputs after both
    void dispatch_cached(const Problem& problem, std::vector<RankTensors>& ranks);  // with the routing of a fresh one
    void combine(const Problem& problem, std::vector<RankTensors>& ranks);

    // The launches alone, for tests that interleave calls or leave a rank out.
    void launch_layout(const Problem& problem, RankTensors& tensors, int rank);
    void launch_notify(const Problem& problem, RankTensors& tensors, int rank);
    void launch_dispatch(const Problem& problem, RankTensors& tensors, int rank, Counts counts);
    void launch_combine(const Problem& problem, RankTensors& tensors, int rank);
    // A combine of these ranks alone, run to the end.
    void combine_on(const Problem& problem, std::vector<RankTensors>& ranks, std::initializer_list<int> callers);
    // On every rank: outputs with so many rows more (or fewer) than come, and a dispatch whose host waits for the counts;
    // where they are too few, the second half of the call. `lends_again`: of ranks that lend, whose guess was too small.
    void dispatch_guessed(const Problem& problem, std::vector<RankTensors>& ranks,
                          const std::vector<int>& num_spare_rows, bool lends_again = true);
    // On every rank: outputs with more rows than come, and a dispatch that exchanges the counts.
    void launch_worst_case(const Problem& problem, std::vector<RankTensors>& ranks);
    // On every rank: a dispatch, the outputs of `short_rank` holding one row less than comes.
    void launch_without_room(const Problem& problem, std::vector<RankTensors>& ranks, int short_rank, Counts counts);
    // The host's part of a count exchange.
    runtime::RecvCounts wait_counts(int rank) { return buffer(rank).high_throughput().counts().wait(); }
    // Of the memory that `rank` can lend, or null.
    std::unique_ptr<runtime::LentMemory> lend(int rank, int64_t num_bytes);
    // After run(): what came into lent memory, into the vectors that it stands for; the memory is given back.
    static void collect(std::vector<RankTensors>& ranks);

private:
    void launch_fresh(const Problem& problem, std::vector<RankTensors>& ranks);
    void count_rows(const Problem& problem, std::vector<RankTensors>& ranks) const;
    // A copy of `data` in memory that `rank` lends; the same one until collect().
    template <class T> T* lend(RankTensors& tensors, int rank, std::vector<T>& data);

    const WorldRail* rail_;  // null: there is one node
    std::unique_ptr<simt::Scheduler> scheduler_;
    std::vector<std::shared_ptr<simt::SimtDevice>> devices_;
    std::vector<std::unique_ptr<runtime::Buffer>> buffers_;
    std::vector<dev::Stream> streams_;
};

// Fresh random inputs for every rank.
std::vector<RankTensors> make_inputs(const Problem& problem);
// Sizes the outputs and poisons them.
void prepare_recv(const Problem& problem, RankTensors& tensors, int64_t num_rows);
void prepare_combine(const Problem& problem, RankTensors& tensors, int rank);
void prepare_combine(const Problem& problem, std::vector<RankTensors>& ranks);

// Compares with the obvious loops of reference.cc; returns the first difference, or "".
std::string check_dispatch(const Problem& problem, const std::vector<RankTensors>& ranks, bool is_cached = false);
std::string check_combine(const Problem& problem, const std::vector<RankTensors>& ranks);

// After a call that failed: the first output that could pass for a result, or "".
std::string check_void_dispatch(const RankTensors& tensors, bool is_cached);
std::string check_void_combine(const RankTensors& tensors);

// Bytes of the region `whole` that are not as `before` and lie in none of the tensors that this rank has lent.
int64_t num_stray_bytes(const uint8_t* whole, const std::vector<uint8_t>& before, const RankTensors& tensors);

// layout, dispatch, check, combine, check.
std::string round_trip(World& world, const Problem& problem);

}  // namespace deep_ep::test
