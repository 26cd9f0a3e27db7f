// Ranks over the engine `sim`, on one executor.
#pragma once

#include <memory>
#include <vector>

#include "rail/rail_world.h"
#include "rail_sim/sim_engine.h"

namespace deep_ep::testing {

class SimWorld final : public RailWorld {
public:
    explicit SimWorld(const RailOptions& options);
    ~SimWorld() override;

    std::vector<int> own_ranks() const override { return all_ranks(static_cast<int>(devices_.size())); }
    rail::Engine& engine(int rank) override { return network_->engine(rank); }
    dev::Device& device(int rank) override { return *devices_[static_cast<size_t>(rank)]; }
    void run(const Launch& launch, const std::function<void()>& beside) override;
    uint64_t trace_hash() const { return scheduler_->trace_hash(); }

private:
    std::unique_ptr<simt::Scheduler> scheduler_;
    std::vector<std::unique_ptr<simt::SimtDevice>> devices_;
    std::vector<dev::Stream> streams_;
    std::unique_ptr<rail::sim::SimNetwork> network_;
};

}  // namespace deep_ep::testing
