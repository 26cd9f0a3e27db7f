#include "rail/host_world.h"

#include <algorithm>
#include <thread>

#include "core/error.h"

namespace deep_ep::testing {

using rail::host::HostEngine;
using rail::host::HostOptions;

std::vector<std::string> connect_all(const std::vector<std::unique_ptr<HostEngine>>& engines) {
    std::vector<std::string> addresses;
    for (const auto& engine : engines) addresses.push_back(engine->address());
    std::vector<std::string> failures(engines.size());
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < engines.size(); ++rank)
        threads.emplace_back([&, rank] {
            std::vector<int> peers;
            for (size_t peer = 0; peer < engines.size(); ++peer)
                if (peer != rank) peers.push_back(static_cast<int>(peer));
            try {
                engines[rank]->connect(addresses, peers);
            } catch (const Error& error) {
                failures[rank] = error.what();
            }
        });
    for (auto& thread : threads) thread.join();
    return failures;
}

std::vector<std::unique_ptr<HostEngine>> make_engines(const std::vector<std::shared_ptr<dev::Device>>& devices,
                                                      const HostOptions& options) {
    std::vector<std::unique_ptr<HostEngine>> engines;
    for (size_t rank = 0; rank < devices.size(); ++rank) {
        HostOptions own = options;
        own.rank = static_cast<int>(rank);
        engines.push_back(std::make_unique<HostEngine>(devices[rank], own));
    }
    for (const std::string& failure : connect_all(engines))
        if (!failure.empty()) throw Error(failure);
    return engines;
}

namespace {

class HostWorld final : public RailWorld {
public:
    explicit HostWorld(const RailOptions& options) {
        for (int rank = 0; rank < options.num_ranks; ++rank) {
            devices_.push_back(make_test_device(rank));
            streams_.push_back(devices_.back()->create_stream());
        }
        HostOptions host;
        host.window_bytes = options.window_bytes;
        host.interface = "127.0.0.1";
        host.ring_capacity = options.ring_capacity;
        host.max_queued = std::max<size_t>(options.ring_capacity / 8, 1);
        engines_ = make_engines(devices_, host);
    }
    ~HostWorld() override {
        for (auto& engine : engines_) engine->release(10);
        for (size_t rank = 0; rank < streams_.size(); ++rank) devices_[rank]->destroy_stream(streams_[rank]);
    }

    std::vector<int> own_ranks() const override { return all_ranks(static_cast<int>(devices_.size())); }
    rail::Engine& engine(int rank) override { return *engines_[static_cast<size_t>(rank)]; }
    dev::Device& device(int rank) override { return *devices_[static_cast<size_t>(rank)]; }
    void run(const Launch& launch, const std::function<void()>& beside) override {
        for (size_t rank = 0; rank < streams_.size(); ++rank) launch(static_cast<int>(rank), streams_[rank]);
        beside();
        for (size_t rank = 0; rank < streams_.size(); ++rank) devices_[rank]->synchronize_stream(streams_[rank]);
        for (const auto& engine : engines_) engine->check();
    }

private:
    std::vector<std::shared_ptr<dev::Device>> devices_;
    std::vector<dev::Stream> streams_;
    std::vector<std::unique_ptr<HostEngine>> engines_;
};

}  // namespace

int RailWorld::num_ranks(int wanted) { return wanted; }

std::vector<uint64_t> RailWorld::seeds() { return {1, 2}; }

uint64_t RailWorld::timeout_ns() { return 120'000'000'000; }

std::unique_ptr<RailWorld> make_rail_world(const RailOptions& options) { return std::make_unique<HostWorld>(options); }

}  // namespace deep_ep::testing
