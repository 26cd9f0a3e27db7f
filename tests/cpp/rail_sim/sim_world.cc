#include "rail_sim/sim_world.h"

#include <exception>

#include "core/error.h"
#include "device/simt/happens_before.h"

namespace deep_ep::testing {

SimWorld::SimWorld(const RailOptions& options)
    : scheduler_(std::make_unique<simt::Scheduler>(simt::SchedulerOptions{.seed = options.seed})) {
    std::vector<simt::SimtDevice*> devices;
    for (int rank = 0; rank < options.num_ranks; ++rank) {
        devices_.push_back(std::make_unique<simt::SimtDevice>(*scheduler_, rank));
        streams_.push_back(devices_.back()->create_stream());
        devices.push_back(devices_.back().get());
    }
    network_ =
        std::make_unique<rail::sim::SimNetwork>(devices, rail::sim::SimOptions{.num_ranks = options.num_ranks,
                                                                               .window_bytes = options.window_bytes,
                                                                               .seed = options.seed,
                                                                               .max_posted = options.ring_capacity,
                                                                               .is_near = options.is_near});
}

SimWorld::~SimWorld() {
    {
        const simt::hb::Quiet quiet;  // its messages have contexts of their own, which nothing orders before this
        network_.reset();
    }
    for (size_t rank = 0; rank < streams_.size(); ++rank) devices_[rank]->destroy_stream(streams_[rank]);
}

void SimWorld::run(const Launch& launch, const std::function<void()>& beside) {
    network_->run(*scheduler_, [&] {
        for (size_t rank = 0; rank < streams_.size(); ++rank) launch(static_cast<int>(rank), streams_[rank]);
        beside();
        // All must have ended, also those that wait for one that has failed.
        std::exception_ptr first;
        for (size_t rank = 0; rank < streams_.size(); ++rank) try {
                devices_[rank]->synchronize_stream(streams_[rank]);
            } catch (const Error&) {
                if (first == nullptr) first = std::current_exception();
            }
        if (first != nullptr) std::rethrow_exception(first);
    });
}

int RailWorld::num_ranks(int wanted) { return wanted; }

std::vector<uint64_t> RailWorld::seeds() { return {0, 1, 2, 3, 4, 5, 6, 7}; }

uint64_t RailWorld::timeout_ns() { return 0; }

std::unique_ptr<RailWorld> make_rail_world(const RailOptions& options) { return std::make_unique<SimWorld>(options); }

}  // namespace deep_ep::testing
