#include "comm/symmetric_heap.h"

#include "comm/graveyard.h"
#include "core/error.h"

namespace deep_ep::comm {

SymmetricHeap::SymmetricHeap(std::shared_ptr<dev::Device> device, std::shared_ptr<Mailbox> mailbox, int num_ranks,
                             size_t bytes)
    : device_(std::move(device)), mailbox_(std::move(mailbox)), rank_(mailbox_->rank()), num_ranks_(num_ranks) {
    sweep_graveyard();
    memory_ = device_->allocate_shareable(bytes);
}

SymmetricHeap::~SymmetricHeap() { release(0.0); }

void SymmetricHeap::connect(const std::vector<std::string>& handles) {
    EP_ENSURE(!is_connected(), "this heap is connected already");
    EP_ENSURE(handles.size() == static_cast<size_t>(num_ranks_), "handles: expected one for each of ", num_ranks_,
              " ranks, got ", handles.size());
    bases_.assign(handles.size(), nullptr);
    for (int peer = 0; peer < num_ranks_; ++peer) {
        const auto idx = static_cast<size_t>(peer);
        bases_[idx] = peer == rank_ ? memory_.address : device_->open_shared(handles[idx]);
        if (peer != rank_ && device_->holds(handles[idx])) ++num_ranks_here_;
    }
    is_connected_ = true;
}

void SymmetricHeap::unmap_peers() {
    for (int peer = 0; peer < num_ranks_; ++peer) {
        void*& base = bases_[static_cast<size_t>(peer)];
        if (peer != rank_ && base != nullptr) device_->close_shared(base);
        base = nullptr;
    }
}

void SymmetricHeap::release(double timeout_s) noexcept {
    if (memory_.address == nullptr) return;
    try {
        const bool was_shared = !bases_.empty() && num_ranks_ > 1;
        if (was_shared) unmap_peers();
        // Not before: a peer frees its memory when it hears this. (The CPU unmaps only when its kernels have ended, but
        // there the memory lives as long as any mapping of it.)
        mailbox_->tell_left();
        is_connected_ = false;
        BuriedRegion region{device_, memory_, was_shared ? mailbox_ : nullptr, num_ranks_, std::move(leases_)};
        memory_ = {};
        const bool is_unmapped = device_->host_wait([&] { return have_peers_left(region); }, timeout_s);
        if (is_unmapped && !has_leases(region))
            device_->free_shareable(region.memory);
        else
            bury(std::move(region));
    } catch (...) {
        // The driver is unloading or the context is broken: the system reclaims what is left.
        memory_ = {};
    }
}

}  // namespace deep_ep::comm
