// What this rank lends to its neighbours: memory of its heap for outputs of dispatch and inputs of combine, and how a call
// states it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/args.h"
#include "layout/heap.h"
#include "runtime/connection.h"
#include "runtime/lender.h"

namespace deep_ep::runtime {

class Loans {
public:
    // The connection outlives this.
    explicit Loans(Connection& connection);

    std::vector<std::unique_ptr<LentMemory>> lend(const std::vector<int64_t>& sizes, dev::Stream stream,
                                                  bool is_captured);
    int64_t num_bytes() const { return static_cast<int64_t>(lender_->num_bytes()); }
    void note_stream(dev::Stream stream, bool is_ours) { lender_->note_stream(stream, is_ours); }

    // Whether some rank of this node may: then calls state their loans.
    bool may_lend() const { return lender_->num_bytes() > 0 && connection_.topology().ranks_per_node > 1; }
    // Nothing where the tensors of the call are not lent.
    layout::Loan loan_for(const kernels::DispatchArgs& args) const;
    layout::Loan loan_for(const kernels::CombineArgs& args) const;
    // Where the copy of combine's weights is that a loan names.
    float* weights() const;

private:
    uint64_t lent_offset(const void* address) const;

    Connection& connection_;
    std::shared_ptr<Lender> lender_;
};

}  // namespace deep_ep::runtime
