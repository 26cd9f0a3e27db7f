#include "comm/symmetric_heap.h"

#include "comm/graveyard.h"
#include "core/error.h"

namespace deep_ep::comm {

SymmetricHeap::SymmetricHeap(std::shared_ptr<dev::Device> device, int rank, int num_ranks, size_t bytes,
                             size_t left_offset)
    : device_(std::move(device)), rank_(rank), num_ranks_(num_ranks), left_offset_(left_offset) {
    sweep_graveyard();
    memory_ = device_->allocate_shareable(bytes);
}

SymmetricHeap::~SymmetricHeap() { release(0.0); }

void SymmetricHeap::connect(const std::vector<std::string>& handles) {
    EP_CHECK(!is_connected(), "this heap is connected already");
    EP_CHECK(handles.size() == static_cast<size_t>(num_ranks_), "handles: expected one for each of ", num_ranks_,
             " ranks, got ", handles.size());
    bases_.assign(handles.size(), nullptr);
    for (int peer = 0; peer < num_ranks_; ++peer) {
        const auto idx = static_cast<size_t>(peer);
        bases_[idx] = peer == rank_ ? memory_.address : device_->open_shared(handles[idx]);
        if (peer != rank_ && device_->holds(handles[idx])) ++num_ranks_here_;
    }
    is_connected_ = true;
}

void SymmetricHeap::tell_peers_we_left() {
    const uint64_t left = 1;
    for (int peer = 0; peer < num_ranks_; ++peer) {
        auto* base = static_cast<uint8_t*>(bases_[static_cast<size_t>(peer)]);
        if (peer == rank_ || base == nullptr) continue;
        device_->copy_now(base + left_offset_ + sizeof(uint64_t) * static_cast<size_t>(rank_), &left, sizeof(left));
    }
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
        if (was_shared) tell_peers_we_left();
        if (was_shared) unmap_peers();
        is_connected_ = false;
        BuriedRegion region{device_, memory_, left_offset_, rank_, num_ranks_, std::move(leases_)};
        memory_ = {};
        const bool is_unmapped = !was_shared || device_->host_wait([&] { return have_peers_left(region); }, timeout_s);
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
