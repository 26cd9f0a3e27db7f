// Ranks of several nodes in one process, on one executor, with the engine `sim` between the nodes: the kernels alone, without
// the runtime that launches them for users.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device/owned.h"
#include "kernels/params_internode.h"
#include "layout/rail.h"
#include "layout/topology.h"
#include "rail_sim/sim_engine.h"
#include "support/world.h"

namespace deep_ep::test {

struct InternodeOptions {
    int num_nodes = 2;
    int ranks_per_node = 2;
    int num_blocks = 2;
    int num_warps = 1;          // of each role in a block
    uint64_t window = 64;       // slots of a stream inside a node
    uint64_t rail_slots = 64;   // of a stream on the rail, in one bank
    uint64_t chunk_tokens = 4;  // as the engine likes it
    size_t max_posted = 4096;   // requests of a rank that are under way
    bool is_near = false;       // stores reach the windows of rail peers
    uint64_t lend_bytes = 0;    // > 0: ranks can lend
    simt::SchedulerOptions scheduler = {};
    uint64_t network_seed = 0;
    double timeout_s = 100;
    simt::DeviceOptions device = {};

    int num_ranks() const { return num_nodes * ranks_per_node; }
};

// What a call across nodes has beside the tensors of one inside a node.
struct RailTensors {
    std::vector<int> num_tokens_per_node, recv_rank_prefix, rail_prefix, send_rail_head, rail_head;
    int64_t num_rail_tokens = 0;
};

// One call after the other, each of one kind on all ranks.
struct InternodeCall {
    Problem problem;
    std::vector<RankTensors> ranks;
    std::vector<RailTensors> rails;
    bool has_topk = true;  // of the dispatch; its routing comes from the problem's entries anyway

    InternodeCall(const Problem& problem, const InternodeOptions& options);
};

class InternodeWorld {
public:
    explicit InternodeWorld(const InternodeOptions& options, const Problem& largest);
    ~InternodeWorld();

    // Each with the check of what comes out; "" or the first difference. Throw what the executor or the engine finds.
    std::string dispatch(InternodeCall& call);         // fresh, or worst case
    std::string dispatch_cached(InternodeCall& call);  // with the routing of a fresh one
    std::string combine(InternodeCall& call);
    std::string round_trip(const Problem& problem);

    // Launches alone.
    void launch_notify(InternodeCall& call, int rank);
    void launch_dispatch(InternodeCall& call, int rank, Counts counts);
    void launch_combine(InternodeCall& call, int rank);
    // Runs `body`, which launches, and everything that it has launched.
    void run(const std::function<void()>& body);
    // Sizes the outputs of a dispatch from what the host of the rank has learned, or would learn.
    void prepare_dispatch(InternodeCall& call, int rank, bool asks_host);

    const InternodeOptions& options() const { return options_; }
    simt::Scheduler& scheduler() { return *scheduler_; }
    int num_ranks() const { return options_.num_ranks(); }
    rail::sim::SimEngine& engine(int rank) { return network_->engine(rank); }
    const layout::HostStatus& status(int rank) const { return *ranks_[static_cast<size_t>(rank)].status.host(); }
    std::vector<layout::WaitCell> wait_cells(int rank) const;
    layout::Topology topology(int rank) const { return {num_ranks(), options_.ranks_per_node, rank}; }
    layout::RailWindow rail_window(const layout::SlotLayout& slot) const;
    layout::SlotLayout dispatch_slot(const InternodeCall& call, bool is_cached) const;
    layout::SlotLayout combine_slot(const InternodeCall& call) const;
    uint64_t num_calls() const { return num_calls_; }
    // What a rank of another node has told this rank's window.
    uint64_t ended(int rank, int node) const;

private:
    struct Rank {
        std::shared_ptr<simt::SimtDevice> device;
        dev::Stream stream = nullptr;
        uint8_t* heap = nullptr;
        dev::DeviceArray<layout::LocalState> local;
        dev::DeviceArray<layout::WaitCell> wait_cells;
        dev::DeviceArray<uint8_t> counters;
        dev::HostMappedObject<layout::HostStatus> status;
        dev::HostMappedObject<layout::HostCounts> counts;
        uint64_t lent_bytes = 0;
    };

    kernels::HeapParams heap_params(int rank) const;
    kernels::WatchParams watch_params(int rank) const;
    kernels::RailPlan rail_plan(int rank, const layout::SlotLayout& slot) const;
    layout::WindowLayout window(const layout::SlotLayout& slot) const;
    kernels::Geometry geometry() const;
    template <class T> uint64_t lend(InternodeCall& call, int rank, std::vector<T>& data);
    void collect(InternodeCall& call);
    uint64_t lend_offset() const;

    const InternodeOptions options_;
    const layout::ControlLayout control_;
    const layout::RailControl rail_control_;
    uint64_t num_data_bytes_ = 0, num_rail_bytes_ = 0;
    std::unique_ptr<simt::Scheduler> scheduler_;
    std::vector<Rank> ranks_;
    std::unique_ptr<rail::sim::SimNetwork> network_;
    uint64_t num_calls_ = 0;
    struct Lent {
        int rank;
        void* data;
        const uint8_t* memory;
        size_t num_bytes;
    };
    std::vector<Lent> lent_;
};

// The kind of record that a rank has left, or kNone.
inline layout::FailureKind failure_of(const InternodeWorld& world, int rank) {
    return world.status(rank).failure.state != 0 ? world.status(rank).failure.kind : layout::FailureKind::kNone;
}

}  // namespace deep_ep::test
