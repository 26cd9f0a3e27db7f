// The engine `sim`: a network inside the executor's schedule that keeps no promise but those of the seam, and holds kernels
// to its rules. A seed decides the pieces, orders and delays, and replays them.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/non_copyable.h"
#include "device/simt/device.h"
#include "device/simt/drive.h"
#include "rail/engine.h"

namespace deep_ep::rail::sim {

enum class Kind { kPut, kSet, kAdd };

// What a kernel or a host asks for.
struct Request {
    Kind kind;
    int peer;
    uint64_t dst, src;
    uint32_t bytes;
    uint64_t flag, value;
    uint64_t told_bytes = 0;  // that the poster has stored itself
};

class SimEngine;

struct SimOptions {
    int num_ranks = 2;
    size_t window_bytes = 0;
    uint64_t seed = 0;
    int steps = 1;             // that the network may take in a pass of the schedule: more where many ranks are on it
    size_t max_posted = 4096;  // requests of a rank that are under way; then posters wait
    bool shares_windows = true;
    bool is_near = false;  // stores reach the windows of peers, too
};

class SimNetwork : NonCopyable {
public:
    SimNetwork(const std::vector<simt::SimtDevice*>& devices, const SimOptions& options);
    ~SimNetwork();

    SimEngine& engine(int rank) { return *engines_[static_cast<size_t>(rank)]; }
    // Runs `body` as host code of the executor while the network carries what is posted, and all that is left afterwards.
    void run(simt::Scheduler& scheduler, const std::function<void()>& body);

    // Of a rank's kernels and host. Throw Error when a rule is broken.
    bool has_room(int rank) const;
    void post(int rank, const Request& request);
    void confirm(int rank, uint64_t flag, uint64_t value);
    void confirm_at(int rank, const uint64_t* word, uint64_t value);
    std::vector<const uint8_t*> share_windows(const std::vector<int>& neighbours);
    // The window of the peer, where stores reach it.
    char* reach(int peer) const { return options_.is_near ? place(peer, 0) : nullptr; }

private:
    struct Message;

    [[noreturn]] void break_rule(const std::string& text) const;
    void check_places(int rank, const Request& request) const;
    void check_source(const Message& message) const;
    void carry_messages(const bool& is_over);
    bool has_messages() const;
    bool draws_a_step();
    void step();
    void carry_piece(Message& message);
    void carry_word(Message& message);
    bool is_posted(const Message& message) const;
    char* place(int rank, uint64_t offset) const;

    const SimOptions options_;
    std::vector<std::unique_ptr<SimEngine>> engines_;
    simt::Random random_;
    uint32_t odds_;  // 1 : n, that a visit carries something
    std::deque<std::unique_ptr<Message>> under_way_;
    mutable std::string broken_rule_;
    std::vector<size_t> num_posted_;  // by rank
    // By peer and flag: what was put or set there and is not confirmed.
    std::map<std::pair<int, uint64_t>, std::unique_ptr<Message>> open_;
};

class SimEngine final : public Engine {
public:
    SimEngine(SimNetwork& network, simt::SimtDevice& device, int rank, size_t window_bytes);
    ~SimEngine() override;

    std::string name() const override { return "sim"; }
    std::string address() const override { return {}; }
    void connect(const std::vector<std::string>&, const std::vector<int>&) override {}
    std::vector<const uint8_t*> share_windows(const std::vector<int>& neighbours) override {
        return network_.share_windows(neighbours);
    }
    Window window() const override { return window_; }
    Params params() const override;
    size_t chunk_bytes() const override { return 512; }
    void set(int peer, uint64_t flag, uint64_t value) override;
    void check() const override {}
    Traffic sent_to(int peer) const override;
    void release(double) override {}

    void count(const Request& request);
    void wait(const std::function<bool()>& done);
    SimNetwork& network() { return network_; }
    int rank() const { return rank_; }

private:
    SimNetwork& network_;
    simt::SimtDevice& device_;
    const int rank_;
    Window window_;
    std::map<int, Traffic> traffic_;
};

// What the device half needs.
struct View {
    SimEngine* engine;
    char* window;
};

}  // namespace deep_ep::rail::sim
