#include "internode/low_latency_nodes.h"

#include "device/simt/happens_before.h"

namespace deep_ep::test {

namespace {

// What a Buffer owns; the network has the engine itself.
class BorrowedEngine final : public rail::Engine {
public:
    explicit BorrowedEngine(rail::sim::SimEngine& engine) : engine_(engine) {}

    std::string name() const override { return engine_.name(); }
    std::string address() const override { return engine_.address(); }
    void connect(const std::vector<std::string>& addresses, const std::vector<int>& peers) override {
        engine_.connect(addresses, peers);
    }
    std::vector<const uint8_t*> share_windows(const std::vector<int>& neighbours) override {
        return engine_.share_windows(neighbours);
    }
    rail::Window window() const override { return engine_.window(); }
    rail::Params params() const override { return engine_.params(); }
    size_t chunk_bytes() const override { return engine_.chunk_bytes(); }
    void set(int peer, uint64_t flag, uint64_t value) override { engine_.set(peer, flag, value); }
    void check() const override { engine_.check(); }
    void check_itself() const override { engine_.check_itself(); }
    rail::Traffic sent_to(int peer) const override { return engine_.sent_to(peer); }
    void release(double timeout_s) override { engine_.release(timeout_s); }

private:
    rail::sim::SimEngine& engine_;
};

}  // namespace

LowLatencyNodes::LowLatencyNodes(const NodesOptions& options, const LowLatencyProblem& largest) {
    rail_.ranks_per_node = options.ranks_per_node;
    rail_.begin = [this](const std::vector<simt::SimtDevice*>& devices) { devices_ = devices; };
    rail_.make_engine = [this, options](const std::shared_ptr<dev::Device>&, const rail::EngineOptions& engine) {
        if (network_ == nullptr)
            network_ = std::make_unique<rail::sim::SimNetwork>(
                devices_, rail::sim::SimOptions{.num_ranks = options.num_ranks(),
                                                .window_bytes = engine.window_bytes,
                                                .seed = options.network_seed,
                                                .steps = options.num_ranks() * options.num_ranks(),
                                                .max_posted = options.max_posted,
                                                .shares_windows = options.shares_windows});
        return std::make_unique<BorrowedEngine>(network_->engine(engine.rank));
    };
    rail_.run = [this](simt::Scheduler& scheduler, const std::function<void()>& body) {
        network_->run(scheduler, body);
    };
    rail_.end = [this] {
        const simt::hb::Quiet quiet;  // its messages have contexts of their own, which nothing orders before this
        network_.reset();
    };
    world_ = std::make_unique<World>(options.num_ranks(), 0, options.scheduler, options.timeout_s,
                                     low_latency_bytes(largest) + options.num_more_bytes, options.is_shrinkable,
                                     std::vector<simt::DeviceOptions>{options.device}, 0, &rail_);
}

}  // namespace deep_ep::test
