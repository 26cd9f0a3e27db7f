// The conformance suite over the engine `nvshmem`: one rank of several processes, all of which run it at the same time.
//     rail_conformance_nvshmem RANK NUM_RANKS FOLDER [part of the names of the tests]
// Addresses go through files in a folder that is empty at first.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "core/error.h"
#include "device/cuda/device.h"
#include "rail/nvshmem/linked_world.h"
#include "rail/nvshmem/meeting.h"
#include "rail/nvshmem/nvshmem_engine.h"
#include "rail/rail_world.h"
#include "support/testing.h"

namespace deep_ep::testing {
namespace {

Meeting* meeting = nullptr;

class NvshmemWorld final : public RailWorld {
public:
    explicit NvshmemWorld(const RailOptions& options)
        : rank_(meeting->rank()),
          device_(dev::make_cuda_device(rank_ % dev::count_cuda_devices())),
          stream_(device_->create_stream()),
          engine_(device_, linked_world(), {.rank = rank_, .window_bytes = options.window_bytes}) {
        std::vector<int> peers;
        for (int peer = 0; peer < options.num_ranks; ++peer)
            if (peer != rank_) peers.push_back(peer);
        engine_.connect(meeting->gather(engine_.address()), peers);
    }
    ~NvshmemWorld() override {
        engine_.release(10);
        device_->destroy_stream(stream_);
    }

    std::vector<int> own_ranks() const override { return {rank_}; }
    rail::Engine& engine(int) override { return engine_; }
    dev::Device& device(int) override { return *device_; }
    void run(const Launch& launch, const std::function<void()>& beside) override {
        launch(rank_, stream_);
        beside();
        device_->synchronize_stream(stream_);
        engine_.check();
        static_cast<void>(meeting->gather("done"));
    }

private:
    const int rank_;
    const std::shared_ptr<dev::Device> device_;
    const dev::Stream stream_;
    rail::nvshmem::NvshmemEngine engine_;
};

}  // namespace

int RailWorld::num_ranks(int) { return meeting->num_ranks(); }

std::vector<uint64_t> RailWorld::seeds() { return {1, 2}; }

uint64_t RailWorld::timeout_ns() { return 30'000'000'000; }

std::unique_ptr<RailWorld> make_rail_world(const RailOptions& options) {
    return std::make_unique<NvshmemWorld>(options);
}

}  // namespace deep_ep::testing

int main(int argc, char** argv) {
    if (deep_ep::dev::count_cuda_devices() == 0) {
        std::puts("skipped: no CUDA device, or no driver for it");
        return 77;
    }
    if (argc < 4) {
        std::puts("RANK NUM_RANKS FOLDER are expected");
        return 2;
    }
    deep_ep::testing::Meeting meeting(std::atoi(argv[1]), std::atoi(argv[2]), argv[3]);
    deep_ep::testing::meeting = &meeting;
    return deep_ep::testing::run_tests(argc - 3, argv + 3);
}
