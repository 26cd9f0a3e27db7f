// The same region of memory on every rank of a node, each mapped by all.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/mailbox.h"
#include "core/non_copyable.h"
#include "device/owned.h"

namespace deep_ep::comm {

// Owns the local region and the mappings of the peers' regions. Not thread-safe.
//
// Lifetime: a region may be freed only when no peer maps it any more. Peers say so in their mailboxes; release() waits for
// them for a bounded time, and what is still mapped then is kept for later (see DeferredRegions).
class SymmetricHeap : NonCopyable {
public:
    // Allocates `bytes`, zero-filled, for the rank of the mailbox, which is connected before the heap.
    SymmetricHeap(std::shared_ptr<dev::Device> device, std::shared_ptr<Mailbox> mailbox, int num_ranks, size_t bytes,
                  dev::Placement placement = dev::Placement::kDevice);
    ~SymmetricHeap();

    // What peers need to map this region.
    const std::string& handle() const { return memory_.get().handle; }
    // Maps every peer's region; `handles[rank]` is this rank's own. Once.
    void connect(const std::vector<std::string>& handles);
    bool is_connected() const { return is_connected_; }

    // Whoever holds the result keeps the local region allocated, also beyond release().
    std::shared_ptr<const void> lease() const { return leases_; }

    uint8_t* local() const { return static_cast<uint8_t*>(memory_.get().address); }
    // Where a rank's region is mapped in this process.
    uint8_t* base(int rank) const {
        return rank == rank_ ? local() : static_cast<uint8_t*>(mappings_[static_cast<size_t>(rank)].get());
    }

    // Ranks that run on this device; this one is one of them.
    int num_ranks_here() const { return num_ranks_here_; }

    // Unmaps the peers' regions, tells them, and waits until they have done the same or have ended. False: not all have in
    // `timeout_s`. Idempotent, never throws.
    bool part(double timeout_s) noexcept;
    // The same, and frees the local region then, and `also`; after `timeout_s` they go to the list of deferred frees instead.
    void release(double timeout_s, std::shared_ptr<const void> also = nullptr) noexcept;

private:
    std::shared_ptr<dev::Device> device_;
    std::shared_ptr<Mailbox> mailbox_;
    int rank_, num_ranks_;
    dev::OwnedShareable memory_;
    std::shared_ptr<const void> leases_ = std::make_shared<int>(0);
    std::vector<dev::Mapping> mappings_;  // of the peers' regions
    bool is_connected_ = false, was_shared_ = false;
    int num_ranks_here_ = 1;
};

// One handle of both: the mailbox's, which has the same size everywhere, then the heap's.
std::string join_handles(const Mailbox& mailbox, const SymmetricHeap& heap);
// Connects both, in their order, to those of all ranks.
void connect(const std::vector<std::string>& handles, Mailbox& mailbox, SymmetricHeap& heap);

}  // namespace deep_ep::comm
