// The symmetric heap, as kernels address it.
#pragma once

#include "device/prim.h"
#include "layout/intranode.h"
#include "layout/status.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// Where deadlines and reports live; filled from the launch parameters.
struct WatchWords {
    layout::LocalState* local;
    layout::HostStatus* status;
    uint64_t timeout_ns;
    uint64_t late_ns;
};

// Ranks here are those of the node, by index.
class Heap {
public:
    EP_DEVICE Heap(uint8_t* const* bases, int rank, int num_ranks, const layout::ControlLayout& control,
                   int first_rank = 0, int num_nodes = 1)
        : bases_(bases),
          control_(&control),
          rank_(rank),
          num_ranks_(num_ranks),
          first_rank_(first_rank),
          num_nodes_(num_nodes) {}

    EP_DEVICE int rank() const { return rank_; }
    EP_DEVICE int num_ranks() const { return num_ranks_; }
    // Of the node, among all ranks.
    EP_DEVICE int first_rank() const { return first_rank_; }
    EP_DEVICE int num_nodes() const { return num_nodes_; }
    EP_DEVICE int num_sources() const { return num_nodes_ * num_ranks_; }

    // Each of these names a place in `owner`'s memory; see ControlLayout for who writes it.
    EP_DEVICE uint64_t* started(int owner, int source) const { return word(owner, control_->started.at(source)); }
    EP_DEVICE uint64_t* abort(int owner) const { return word(owner, control_->abort.offset); }
    // `source`: of all ranks.
    EP_DEVICE uint64_t* rank_count(int owner, int bank, int source, int destination) const {
        const uint64_t row = static_cast<uint64_t>(bank) * num_sources() + source;
        return word(owner, control_->rank_counts.at(row * num_ranks_ + destination));
    }
    EP_DEVICE uint64_t* expert_count(int owner, int bank, int source, int local_expert) const {
        const uint64_t row = static_cast<uint64_t>(bank) * num_sources() + source;
        return word(owner, control_->expert_counts.at(row * layout::kMaxLocalExperts + local_expert));
    }
    // `group`: bank * num_nodes() + node.
    EP_DEVICE uint64_t* full(int owner, int group, int source, int slot) const {
        const uint64_t row = static_cast<uint64_t>(group) * num_ranks_ + source;
        return word(owner, control_->full.at(row * layout::kMaxWindow + slot));
    }
    EP_DEVICE uint64_t* empty(int owner, int group, int destination, int slot) const {
        const uint64_t row = static_cast<uint64_t>(group) * num_ranks_ + destination;
        return word(owner, control_->empty.at(row * layout::kMaxWindow + slot));
    }
    EP_DEVICE uint8_t* slot(int owner, const layout::WindowLayout& window, int bank, int source, int slot_idx,
                            int node) const {
        return bases_[owner] + control_->bytes + window.slot_offset(bank, owner, source, slot_idx, node);
    }

    EP_DEVICE uint64_t* loan_flag(int owner, int bank, int lender) const {
        return word(owner, control_->loan_flags.at(bank * num_ranks_ + lender));
    }
    EP_DEVICE layout::Loan* loan(int owner, int bank, int lender) const {
        return reinterpret_cast<layout::Loan*>(bases_[owner] + control_->loans.at(bank * num_ranks_ + lender));
    }
    EP_DEVICE uint64_t* weight_flag(int owner, int lender) const {
        return word(owner, control_->weight_flags.at(lender));
    }
    EP_DEVICE uint64_t* returned(int owner, int borrower) const { return word(owner, control_->returned.at(borrower)); }

    // Low latency; see LowLatencyControl.
    EP_DEVICE uint64_t* low_latency_started(int owner, int source) const {
        return word(owner, control_->low_latency.started.at(source));
    }
    EP_DEVICE uint64_t* received(int owner, int bank, int peer) const {
        return word(owner, control_->low_latency.received.at(bank * num_ranks_ + peer));
    }
    EP_DEVICE uint64_t* cleaned(int owner, int source) const {
        return word(owner, control_->low_latency.cleaned.at(source));
    }
    EP_DEVICE uint64_t* table_full(int owner, int bank, int source) const {
        return word(owner, control_->low_latency.table_full.at(bank * num_ranks_ + source));
    }
    EP_DEVICE uint64_t* token_full(int owner, int bank, int source, int token) const {
        const uint64_t row = static_cast<uint64_t>(bank) * num_ranks_ + source;
        return word(owner, control_->low_latency.token_full.at(row * layout::kMaxLowLatencyTokens + token));
    }
    // The packets of `source`.
    EP_DEVICE prim::Packet* low_latency_packets(int owner, int bank, int source) const {
        const uint64_t row = static_cast<uint64_t>(bank) * num_ranks_ + source;
        return reinterpret_cast<prim::Packet*>(bases_[owner] +
                                               control_->low_latency.packets.at(row * layout::kMaxLowLatencyPackets));
    }
    EP_DEVICE uint8_t* at(int owner, uint64_t offset) const { return bases_[owner] + offset; }

private:
    EP_DEVICE uint64_t* word(int owner, uint64_t offset) const {
        return reinterpret_cast<uint64_t*>(bases_[owner] + offset);
    }

    uint8_t* const* bases_;
    const layout::ControlLayout* control_;
    int rank_;
    int num_ranks_;
    int first_rank_;
    int num_nodes_;
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
