// A World of several nodes for low-latency calls: Buffers of the runtime, with the engine `sim` between the nodes.
#pragma once

#include <functional>
#include <memory>

#include "rail_sim/sim_engine.h"
#include "support/low_latency_world.h"

namespace deep_ep::test {

struct NodesOptions {
    int num_nodes = 2;
    int ranks_per_node = 2;
    simt::SchedulerOptions scheduler = {};
    uint64_t network_seed = 0;
    double timeout_s = 100;
    bool is_shrinkable = false;
    size_t max_posted = 4096;    // requests of a rank that are under way
    bool shares_windows = true;  // inside a node: of a dispatch one copy crosses for each node
    int64_t num_more_bytes = 0;  // than the size hint
    simt::DeviceOptions device = {};

    int num_ranks() const { return num_nodes * ranks_per_node; }
};

class LowLatencyNodes {
public:
    LowLatencyNodes(const NodesOptions& options, const LowLatencyProblem& largest);

    World& world() { return *world_; }
    // Runs `body` as host code while the rail carries what is posted.
    void run(const std::function<void()>& body) { network_->run(world_->scheduler(), body); }
    rail::Engine& engine(int rank) { return network_->engine(rank); }

private:
    std::unique_ptr<rail::sim::SimNetwork> network_;
    std::vector<simt::SimtDevice*> devices_;
    WorldRail rail_;
    std::unique_ptr<World> world_;
};

}  // namespace deep_ep::test
