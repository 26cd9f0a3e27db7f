// What a Buffer knows of failures: of its own kernels, of its host, and of its peers. See docs/protocols/failure.md.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "comm/mailbox.h"
#include "comm/symmetric_heap.h"
#include "device/runtime.h"
#include "layout/rail.h"
#include "layout/status.h"
#include "layout/topology.h"
#include "rail/engine.h"
#include "runtime/failure_report.h"

namespace deep_ep::runtime {

// Which exception tells of it.
enum class FailureClass { kTimeout, kInvalidArgument, kTransport, kOther };

struct Failure {
    FailureClass kind;
    std::string text;
};

// Who else is to stop.
enum class Spread { kNobody, kPeers };

// What a desk looks at and writes to.
struct Surroundings {
    layout::Topology topology;
    const comm::SymmetricHeap* heap;
    layout::ControlLayout control;
    const layout::HostStatus* status;
    rail::Engine* engine;  // null: there is one node
    layout::RailControl rail;
    layout::LowLatencyRailControl low_latency_rail;  // where there are several nodes, and the mode
    bool
        does_without_peers;  // low latency leaves out ranks of other nodes that are lost: a lost connection is no failure
};

// The first failure is kept. Thread-safe: the watcher looks while the Buffer's own thread is in a call.
//
// Whoever learns of a failure for the first time passes it on, to neighbours through their heaps and mailboxes and to rail
// peers through the engine. So every rank hears of it after three hops at most, whoever runs a kernel.
class FailureDesk {
public:
    // All that is pointed to outlives close().
    FailureDesk(std::shared_ptr<dev::Device> device, std::shared_ptr<comm::Mailbox> mailbox,
                const Surroundings& surroundings);

    // Throws the first failure, if there is one; cheap while there is none.
    void check();
    bool has_failed() const { return has_failed_.load(std::memory_order_acquire); }
    // The sentence of the first failure, or nothing.
    std::string failure();

    // The host has found something: kernels of this rank that wait give up, and with kPeers those of every peer.
    void fail(FailureClass kind, const std::string& text, Spread spread);

    // One look by the watcher, at what kernels have reported, the engine has met, and peers have noted. Returns what it was
    // the first to find.
    std::string look();

    // A warning of a kernel, as a sentence.
    std::string describe_warning(const layout::WaitRecord& record) const;

    // The heap, the engine and the status go: from now on look() and fail() do nothing.
    void close();

private:
    void collect();
    bool is_reason_due();
    void collect_engine_failure();
    void collect_notes();
    void collect_rail_aborts();
    void adopt(Failure failure);
    Peers peers(layout::Operation operation) const;
    std::vector<Progress> progress(layout::Operation operation) const;
    uint64_t far_progress(layout::Operation operation, int peer) const;
    std::string remark(int peer) const;
    std::optional<std::string> note_of(int origin) const;
    std::string rail_note(int node) const;
    bool may_still_say(int origin) const;
    std::string reason_of(int origin) const;
    std::string stall_of(int peer) const;
    uint64_t abort_over_rail(int node) const;
    uint64_t rail_word(uint64_t offset) const;
    void write_abort(int index, uint64_t code) noexcept;
    void abort_neighbours(uint64_t code) noexcept;
    void abort_rail_peers(uint64_t code) noexcept;
    void tell_reason() noexcept;
    bool is_here(int rank) const { return at_.topology.is_neighbour(rank); }
    int index_of(int rank) const { return at_.topology.index_of(rank); }

    std::shared_ptr<dev::Device> device_;
    std::shared_ptr<comm::Mailbox> mailbox_;
    const Surroundings at_;
    std::mutex mutex_;
    bool is_closed_ = false;
    int num_looks_for_reason_ = 0;
    Failure failure_{FailureClass::kOther, ""};
    std::atomic<bool> has_failed_{false};
};

}  // namespace deep_ep::runtime
