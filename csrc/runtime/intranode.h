// The high-throughput mode within a node: layout, dispatch and combine, and the memory that they lend to peers.
#pragma once

#include <memory>
#include <vector>

#include "kernels/kernel_table.h"
#include "runtime/connection.h"
#include "runtime/lender.h"

namespace deep_ep::runtime {

using kernels::CombineArgs;
using kernels::DispatchArgs;
using kernels::LayoutArgs;
using kernels::NotifyArgs;

struct RecvCounts {
    int64_t num_tokens;
    std::vector<int> num_tokens_per_expert;
};

class Intranode {
public:
    // Both outlive this.
    Intranode(Connection& connection, const kernels::KernelTable& kernels);
    void release() noexcept;

    void get_dispatch_layout(const LayoutArgs& args, dev::Stream stream);
    void notify_dispatch(const NotifyArgs& args, dev::Stream stream);
    // After notify_dispatch: waits until the counts of all ranks have arrived.
    RecvCounts wait_counts();
    void dispatch(const DispatchArgs& args, int num_sms, dev::Stream stream);
    void combine(const CombineArgs& args, int num_sms, dev::Stream stream);

    std::vector<std::unique_ptr<LentMemory>> lend(const std::vector<int64_t>& sizes, dev::Stream stream,
                                                  bool is_captured);
    int64_t num_lend_bytes() const { return static_cast<int64_t>(lender_->num_bytes()); }
    void note_stream(dev::Stream stream, bool is_ours) { lender_->note_stream(stream, is_ours); }

private:
    layout::WindowLayout check_dispatch_rows(int num_tokens, int64_t row_bytes, const layout::SlotLayout& slot) const;
    void check_counted_experts(int num_experts) const;
    uint64_t lent_offset(const void* address) const;
    layout::Loan loan_for(const DispatchArgs& args) const;
    layout::Loan loan_for(const CombineArgs& args) const;
    bool may_lend() const { return lender_->num_bytes() > 0 && num_ranks_ > 1; }

    Connection& connection_;
    const kernels::KernelTable& kernels_;
    const int num_ranks_;
    std::shared_ptr<Lender> lender_;
    dev::HostMappedObject<layout::HostCounts> counts_;
    dev::DeviceArray<int> layout_partials_;
    uint64_t ticket_ = 0;        // of the last exchange of counts that the host waits for
    int num_local_experts_ = 0;  // in that one
};

}  // namespace deep_ep::runtime
