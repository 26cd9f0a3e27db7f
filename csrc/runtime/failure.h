// What a Buffer knows of failures: of its own kernels, of its host, and of its peers. See docs/protocols/failure.md.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "comm/mailbox.h"
#include "comm/symmetric_heap.h"
#include "device/runtime.h"
#include "layout/status.h"

namespace deep_ep::runtime {

// Which exception tells of it.
enum class FailureClass { kTimeout, kInvalidArgument, kOther };

struct Failure {
    FailureClass kind;
    std::string text;
};

// Who else is to stop.
enum class Spread { kNobody, kPeers };

// The first failure is kept. Thread-safe: the watcher looks while the Buffer's own thread is in a call.
class FailureDesk {
public:
    // All of them outlive close().
    FailureDesk(std::shared_ptr<dev::Device> device, std::shared_ptr<comm::Mailbox> mailbox,
                const comm::SymmetricHeap& heap, const layout::ControlLayout& control, const layout::HostStatus* status,
                int num_ranks);

    // Throws the first failure, if there is one; cheap while there is none.
    void check();
    bool has_failed() const { return has_failed_.load(std::memory_order_acquire); }
    // The sentence of the first failure, or nothing.
    std::string failure();

    // The host has found something: kernels of this rank that wait give up, and with kPeers those of every peer.
    void fail(FailureClass kind, const std::string& text, Spread spread);

    // One look by the watcher, at what kernels have reported and peers have noted. Returns what it was the first to find.
    std::string look();

    // What the peers' mailboxes say of a rank that did not come, to be put behind its name; or nothing.
    std::string remark(int peer) const;

    // The heap and the status go: from now on look() and fail() do nothing.
    void close();

private:
    void collect();
    bool is_reason_due();
    void collect_notes();
    void adopt(Failure failure);
    std::string reason_of(int origin) const;
    void write_abort(int peer, uint64_t code) noexcept;
    void abort_everybody(Spread spread) noexcept;

    std::shared_ptr<dev::Device> device_;
    std::shared_ptr<comm::Mailbox> mailbox_;
    const comm::SymmetricHeap* heap_;
    const layout::ControlLayout control_;
    const layout::HostStatus* status_;
    const int rank_, num_ranks_;
    std::mutex mutex_;
    bool is_closed_ = false;
    int num_looks_for_reason_ = 0;
    Failure failure_{FailureClass::kOther, ""};
    std::atomic<bool> has_failed_{false};
};

// How far the peers are, by the heap of this rank: the last call of the operation's mode that each has entered.
std::vector<uint64_t> read_started(dev::Device& device, const comm::SymmetricHeap& heap,
                                   const layout::ControlLayout& control, layout::Operation operation);

}  // namespace deep_ep::runtime
