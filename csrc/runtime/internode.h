// The high-throughput mode across nodes: to neighbours through the heap, to the other nodes over the rail.
#pragma once

#include "kernels/params_internode.h"
#include "runtime/high_throughput.h"

namespace deep_ep::runtime {

using kernels::InternodeCombineArgs;
using kernels::InternodeDispatchArgs;
using kernels::InternodeNotifyArgs;

class Internode {
public:
    // All of them outlive this.
    Internode(Connection& connection, const kernels::KernelTable& kernels, HighThroughput& node);
    void release() noexcept { counters_.reset(); }

    // The first launch of every call that is not cached. Where an alignment is given, the host waits for the counts.
    void notify(const InternodeNotifyArgs& args, dev::Stream stream);
    void dispatch(const InternodeDispatchArgs& args, int num_sms, dev::Stream stream);
    void combine(const InternodeCombineArgs& args, int num_sms, dev::Stream stream);

private:
    kernels::RailPlan plan_call(const layout::SlotLayout& slot, const char* operation) const;

    Connection& connection_;
    const kernels::KernelTable& kernels_;
    HighThroughput& node_;                // a call's part within the node
    dev::DeviceArray<uint8_t> counters_;  // layout::RailCounters
};

}  // namespace deep_ep::runtime
