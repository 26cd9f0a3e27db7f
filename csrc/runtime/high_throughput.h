// The high-throughput mode: layout, dispatch and combine. What both ways have in common is here: inside a node, and across
// nodes.
#pragma once

#include <memory>
#include <vector>

#include "kernels/kernel_table.h"
#include "runtime/connection.h"
#include "runtime/count_exchange.h"
#include "runtime/internode.h"
#include "runtime/intranode.h"
#include "runtime/loans.h"

namespace deep_ep::runtime {

using kernels::LayoutArgs;

class HighThroughput {
public:
    // Both outlive this.
    HighThroughput(Connection& connection, const kernels::KernelTable& kernels);
    void release() noexcept;

    void get_dispatch_layout(const LayoutArgs& args, dev::Stream stream);
    RecvCounts wait_counts() { return counts_.wait(); }
    Loans& loans() { return loans_; }
    Intranode& intranode();
    Internode& internode();

private:
    Connection& connection_;
    const kernels::KernelTable& kernels_;
    Loans loans_;
    CountExchange counts_;
    // Here, not when first needed: that may be while a CUDA graph is captured.
    dev::DeviceArray<int> layout_partials_;
    Intranode intranode_;
    Internode internode_;
};

}  // namespace deep_ep::runtime
