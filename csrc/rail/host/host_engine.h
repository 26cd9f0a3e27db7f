// The engine `host`: windows in host memory, TCP between nodes, two threads. docs/protocols/internode.md says how it works.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "device/owned.h"
#include "rail/engine.h"
#include "rail/host/command_ring.h"
#include "rail/host/connection.h"
#include "rail/host/rendezvous.h"

namespace deep_ep::rail::host {

struct HostOptions {
    int rank = 0;
    size_t window_bytes = 0;        // the same on every rank
    std::string interface = {};     // to listen on: a name or an address; empty: see `reach`
    std::string reach = {};         // a host that the interface must reach; empty: the first interface
    double timeout_s = 100;         // for connecting, and for a peer's machine to answer
    uint32_t ring_capacity = 4096;  // a power of two
    size_t max_queued = 65536;      // commands for one peer; then kernels wait until it takes some
    bool shares_window = false;     // with ranks of this node; the same on every rank
};

class HostEngine final : public Engine {
public:
    // Throws InvalidArgument where no interface fits, TransportError where it cannot be listened on.
    HostEngine(std::shared_ptr<dev::Device> device, const HostOptions& options);
    // Never blocks for long: what was not released is not sent.
    ~HostEngine() override;

    std::string name() const override;
    std::string address() const override { return rendezvous_.blob() + shared_memory_.get().handle; }
    void connect(const std::vector<std::string>& addresses, const std::vector<int>& peers) override;
    std::vector<const uint8_t*> share_windows(const std::vector<int>& neighbours) override;
    Window window() const override { return window_; }
    Params params() const override;
    size_t chunk_bytes() const override { return 256 << 10; }
    void set(int peer, uint64_t flag, uint64_t value) override;
    void check() const override;
    void check_itself() const override;
    std::string loss_of(int peer) const override;
    bool has_left(int peer) const override;
    Traffic sent_to(int peer) const override;
    void release(double timeout_s) override;

private:
    using Connections = std::map<int, Connection>;
    static constexpr int64_t kNever = INT64_MAX;

    void run_sender();
    bool take_commands();
    bool take_host_posts();
    bool send_all();
    bool queue_held();
    void queue_command(const Command& command);
    void sleep_until_work();
    void wait_for_sockets(int64_t timeout_us);
    void say_farewell();
    void run_receiver();
    void note_failure(const std::string& text);
    void note_loss(const std::string& text);
    std::unique_ptr<std::thread> start_thread(const char* name, void (HostEngine::*body)());

    const std::shared_ptr<dev::Device> device_;
    const HostOptions options_;
    const int process_;
    const bool is_woken_by_kernels_;
    OwnedHostMapped window_memory_;      // either this
    dev::OwnedShareable shared_memory_;  // or this
    Window window_;
    CommandRing ring_;
    Rendezvous rendezvous_;
    Connections connections_;                  // fixed while the threads run
    std::vector<std::string> window_handles_;  // by rank
    std::vector<dev::Mapping> mappings_;       // of neighbours' windows

    Event sender_event_, receiver_event_;
    std::unique_ptr<std::thread> sender_, receiver_;
    std::atomic<int64_t> release_deadline_ns_{kNever};  // of the steady clock; kNever: it goes on
    std::atomic<bool> is_receiver_stopped_{false};
    bool is_released_ = false;

    // Of the sender's thread.
    std::optional<Command> held_;  // for a peer whose queue is full
    int64_t busy_until_ns_ = 0;
    int64_t nap_us_ = 0;

    mutable std::mutex mutex_;
    std::vector<Command> host_posts_;
    std::string failure_;  // of the engine itself, the first
    std::string loss_;     // of a connection, the first
};

}  // namespace deep_ep::rail::host
