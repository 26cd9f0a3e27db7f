// The part of a rank's heap that is lent: who holds which bytes, and what must end before they are used again.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "core/non_copyable.h"
#include "device/owned.h"
#include "runtime/lend_pool.h"

namespace deep_ep::runtime {

// torch's allocator gives a freed block to later work of the same stream only. A Buffer makes its calls on many streams, so
// this keeps the streams on which a piece may still be in use when it comes back, and orders the next use behind them.
//
// Contract with the caller: takers form a chain. Work of a taker comes after that of the one before it, on whatever streams.
// Thread-safe: whoever drops a tensor last gives its memory back.
class Lender : NonCopyable {
public:
    Lender(std::shared_ptr<dev::Device> device, uint64_t num_bytes);

    uint64_t num_bytes() const { return pool_.num_bytes(); }

    // From now on, what comes back may be in use on `stream`, which lives as long as the process. `is_ours`: only kernels
    // of this Buffer run there, so what it has when the piece is used again is soon enough to know.
    void note_stream(dev::Stream stream, bool is_ours);

    // A piece of each size that is free for later work on `stream`; none at all where there is no room for all of them.
    // Prefers what needs no wait on the device.
    std::vector<uint64_t> take(std::span<const uint64_t> sizes, dev::Stream stream);

    // The same for a graph into which `stream` is captured, and which owns the pieces as long as it lives. The host waits
    // for earlier uses, because a replay may run on any stream. All graphs together get half of the memory at most.
    std::vector<uint64_t> take_for_graph(std::span<const uint64_t> sizes, dev::Stream stream);

    // Keeps the first `num_bytes` of a piece; nobody has used the rest since it was taken.
    void shrink(uint64_t offset, uint64_t num_bytes);

    // `stream`: the one that is current where the last tensor over the piece was dropped, if there is one.
    void give_back(uint64_t offset, std::optional<dev::Stream> stream) noexcept;

private:
    struct Use {
        dev::Stream stream;
        dev::OwnedEvent event;  // none: what the stream has when the piece is needed
    };
    struct Returned {
        uint64_t offset;
        std::vector<Use> uses;
    };
    // A piece that a graph owns; free when the graph and the tensor are gone.
    struct Captured {
        uint64_t offset;
        std::shared_ptr<const std::atomic<bool>> is_graph_gone;
        bool is_tensor_gone;
    };
    struct Noted {
        dev::Stream stream;
        bool is_ours;
    };

    bool is_captured(dev::Stream stream) const { return device_->stream_kind(stream) == dev::StreamKind::kCaptured; }
    dev::OwnedEvent record(dev::Stream stream);
    std::vector<Use> uses_now(std::optional<dev::Stream> stream);
    bool has_ended(const Use& use, dev::Stream stream);
    template <class Settle> bool settle_oldest(const Settle& settle);
    std::vector<uint64_t> take_free(std::span<const uint64_t> sizes);
    void collect(dev::Stream stream);
    void collect_graphs();
    template <class Wait> bool wait_for(const Use& use, const Wait& wait);
    void forget(Use& use);

    const std::shared_ptr<dev::Device> device_;
    std::mutex mutex_;
    LendPool pool_;
    std::vector<Noted> noted_;
    std::optional<dev::Stream> last_taker_;
    std::deque<Returned> returned_;  // oldest first
    std::vector<Captured> captured_;
    std::vector<dev::OwnedEvent> free_events_;
};

// A piece of a rank's heap that peers can reach, in use as a tensor. It keeps the heap allocated.
class LentMemory : NonCopyable {
public:
    LentMemory(std::shared_ptr<Lender> lender, uint64_t offset, uint8_t* address, std::shared_ptr<const void> lease)
        : lender_(std::move(lender)), offset_(offset), address_(address), lease_(std::move(lease)) {}
    ~LentMemory() { give_back(std::nullopt); }

    uint8_t* address() const { return address_; }
    void shrink(uint64_t num_bytes) { lender_->shrink(offset_, num_bytes); }
    // Once; see Lender. The address must not be used afterwards.
    void give_back(std::optional<dev::Stream> stream) noexcept {
        if (lender_ == nullptr) return;
        std::exchange(lender_, nullptr)->give_back(offset_, stream);
        lease_.reset();
    }

private:
    std::shared_ptr<Lender> lender_;
    uint64_t offset_;
    uint8_t* address_;
    std::shared_ptr<const void> lease_;
};

}  // namespace deep_ep::runtime
