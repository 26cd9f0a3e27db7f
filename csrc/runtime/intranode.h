// The high-throughput mode within a node.
#pragma once

#include "kernels/kernel_table.h"
#include "runtime/connection.h"
#include "runtime/count_exchange.h"
#include "runtime/loans.h"

namespace deep_ep::runtime {

using kernels::CombineArgs;
using kernels::DispatchArgs;
using kernels::NotifyArgs;

class Intranode {
public:
    // All of them outlive this.
    Intranode(Connection& connection, const kernels::KernelTable& kernels, Loans& loans, CountExchange& counts)
        : connection_(connection), kernels_(kernels), loans_(loans), counts_(counts) {}

    // The host learns the counts; then dispatch.
    void notify_dispatch(const NotifyArgs& args, dev::Stream stream);
    void dispatch(const DispatchArgs& args, int num_sms, dev::Stream stream);
    void combine(const CombineArgs& args, int num_sms, dev::Stream stream);

private:
    int num_local_experts(int num_experts) const { return num_experts / connection_.topology().num_ranks; }

    Connection& connection_;
    const kernels::KernelTable& kernels_;
    Loans& loans_;
    CountExchange& counts_;
};

}  // namespace deep_ep::runtime
