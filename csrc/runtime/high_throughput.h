// The high-throughput mode within a node; and what it shares with its calls across nodes (internode.h): the counts that the host
// waits for, and what is lent to neighbours.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "device/owned.h"
#include "kernels/params.h"
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
    int64_t num_rail_tokens;  // that this rank forwards for its rail peers; 0 within a node
};

class CountExchange {
public:
    // The connection outlives this.
    explicit CountExchange(Connection& connection);
    void release() noexcept { counts_.reset(); }

    // Whether a call with so many experts could be counted: throws InvalidArgument where not.
    void check_experts(int num_experts) const;
    // The next kernel that is launched with counts() tells the host, under this ticket.
    uint64_t begin(int num_local_experts);
    layout::HostCounts* counts() const { return counts_.device(); }
    uint64_t ticket() const { return ticket_; }
    // Until the counts of all ranks have arrived.
    RecvCounts wait();

private:
    Connection& connection_;
    dev::HostMappedObject<layout::HostCounts> counts_;
    uint64_t ticket_ = 0;        // of the last exchange that the host waits for
    int num_local_experts_ = 0;  // in that one
};

// What this rank lends to its neighbours: memory of its heap for outputs of dispatch and inputs of combine, and how a call
// states it.
class Loans {
public:
    // The connection outlives this.
    explicit Loans(Connection& connection);

    std::vector<std::unique_ptr<LentMemory>> lend(const std::vector<int64_t>& sizes, dev::Stream stream,
                                                  bool is_captured);
    void note_stream(dev::Stream stream, bool is_ours) { lender_->note_stream(stream, is_ours); }

    // Whether some rank of this node may: then calls state their loans.
    bool may_lend() const { return lender_->num_bytes() > 0 && connection_.topology().ranks_per_node > 1; }
    // Nothing where the tensors of the call are not lent.
    layout::Loan loan_for(const DispatchArgs& args) const;
    layout::Loan loan_for(const CombineArgs& args) const;
    // Where the copy of combine's weights is that a loan names.
    float* weights() const;

private:
    uint64_t lent_offset(const void* address) const;

    Connection& connection_;
    std::shared_ptr<Lender> lender_;
};

class HighThroughput {
public:
    // Both outlive this.
    HighThroughput(Connection& connection, const kernels::KernelTable& kernels);
    void release() noexcept;

    void get_dispatch_layout(const LayoutArgs& args, dev::Stream stream);
    // The host learns the counts; then dispatch. These three are for one node: InternalError where there are several.
    void notify_dispatch(const NotifyArgs& args, dev::Stream stream);
    void dispatch(const DispatchArgs& args, int num_sms, dev::Stream stream);
    void combine(const CombineArgs& args, int num_sms, dev::Stream stream);
    CountExchange& counts() { return counts_; }
    Loans& loans() { return loans_; }

    // A call's part within the node, of calls across nodes too: checks the arguments, and plans all but the geometry.
    kernels::NotifyDispatchPlan notify_plan(const NotifyArgs& args);
    kernels::DispatchPlan dispatch_plan(const DispatchArgs& args);
    kernels::CombinePlan combine_plan(const CombineArgs& args) const;

private:
    void check_call();
    int num_local_experts(int num_experts) const { return num_experts / connection_.topology().num_ranks; }

    Connection& connection_;
    const kernels::KernelTable& kernels_;
    Loans loans_;
    CountExchange counts_;
    // Here, not when first needed: that may be while a CUDA graph is captured.
    dev::DeviceArray<int> layout_partials_;
};

}  // namespace deep_ep::runtime
