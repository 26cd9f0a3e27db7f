#include "comm/symmetric_heap.h"

#include <algorithm>

#include "comm/deferred_free.h"
#include "core/error.h"

namespace deep_ep::comm {

SymmetricHeap::SymmetricHeap(std::shared_ptr<dev::Device> device, std::shared_ptr<Mailbox> mailbox, int num_ranks,
                             size_t bytes, dev::Placement placement)
    : device_(std::move(device)), mailbox_(std::move(mailbox)), rank_(mailbox_->rank()), num_ranks_(num_ranks) {
    free_deferred();
    memory_ = dev::make_shareable(device_, bytes, placement);
}

SymmetricHeap::~SymmetricHeap() { release(0.0); }

void SymmetricHeap::connect(const std::vector<std::string>& handles) {
    EP_ENSURE(!is_connected(), "this heap is connected already");
    EP_ENSURE(handles.size() == static_cast<size_t>(num_ranks_), "handles: expected one for each of ", num_ranks_,
              " ranks, got ", handles.size());
    mappings_.resize(handles.size());
    for (int peer = 0; peer < num_ranks_; ++peer) {
        if (peer == rank_) continue;
        const auto idx = static_cast<size_t>(peer);
        mappings_[idx] = dev::open_mapping(device_, handles[idx]);
        if (device_->holds(handles[idx])) ++num_ranks_here_;
    }
    is_connected_ = true;
}

bool SymmetricHeap::part(double timeout_s) noexcept {
    if (!memory_) return true;
    was_shared_ = was_shared_ || (!mappings_.empty() && num_ranks_ > 1);
    mappings_.clear();
    is_connected_ = false;
    try {
        // Not before: a peer frees its memory when it hears this. (The CPU unmaps only when its kernels have ended, but
        // there the memory lives as long as any mapping of it.)
        mailbox_->tell_left();
        return !was_shared_ || device_->host_wait([&] { return have_peers_left(*mailbox_, num_ranks_); }, timeout_s);
    } catch (...) {
        return true;  // the driver is unloading or the context is broken: the system reclaims what is left
    }
}

void SymmetricHeap::release(double timeout_s, std::shared_ptr<const void> also) noexcept {
    if (!memory_) return;
    const bool is_unmapped = part(timeout_s);
    DeferredRegion region{std::move(memory_), was_shared_ ? mailbox_ : nullptr, num_ranks_, std::move(leases_),
                          std::move(also)};
    try {
        if (!is_unmapped || has_leases(region)) defer_free(std::move(region));
    } catch (...) {
        // As above.
    }
}

std::string join_handles(const Mailbox& mailbox, const SymmetricHeap& heap) { return mailbox.handle() + heap.handle(); }

void connect(const std::vector<std::string>& handles, Mailbox& mailbox, SymmetricHeap& heap) {
    const size_t border = mailbox.handle().size();
    std::vector<std::string> of_mailboxes, of_heaps;
    for (const std::string& handle : handles) {
        of_mailboxes.push_back(handle.substr(0, border));
        of_heaps.push_back(handle.substr(std::min(border, handle.size())));
    }
    mailbox.connect(of_mailboxes);
    heap.connect(of_heaps);
}

}  // namespace deep_ep::comm
