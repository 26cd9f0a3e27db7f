#include "runtime/high_throughput.h"

#include "core/error.h"

namespace deep_ep::runtime {

HighThroughput::HighThroughput(Connection& connection, const kernels::KernelTable& kernels)
    : connection_(connection),
      kernels_(kernels),
      loans_(connection),
      counts_(connection),
      layout_partials_(connection.device(),
                       kernels::kMaxLayoutBlocks * static_cast<size_t>(max_layout_counts(connection.machine()))),
      intranode_(connection, kernels, loans_, counts_),
      internode_(connection, kernels, loans_, counts_) {}

void HighThroughput::release() noexcept {
    internode_.release();
    layout_partials_.reset();
    counts_.release();
}

void HighThroughput::get_dispatch_layout(const LayoutArgs& args, dev::Stream stream) {
    const Machine& machine = connection_.machine();
    const int num_ranks = connection_.topology().num_ranks;
    connection_.check();
    check_num_tokens(args.num_tokens);
    check_num_experts(args.num_experts, num_ranks);
    EP_CHECK(args.num_nodes > 0 && num_ranks % args.num_nodes == 0, "num_nodes must divide the ", num_ranks,
             " ranks, got ", args.num_nodes);
    const int max_experts = max_layout_counts(machine) - num_ranks - args.num_nodes;
    EP_CHECK(args.num_experts <= max_experts, "num_experts must be at most ", max_experts, ", got ", args.num_experts);
    const LayoutGrid grid = plan_layout(machine, args.num_tokens);
    kernels_.layout({{.num_ranks = num_ranks,
                      .partials = layout_partials_.get(),
                      .num_threads = grid.num_threads,
                      .watch = connection_.watch_params()},
                     args},
                    grid.num_blocks, stream);
}

Intranode& HighThroughput::intranode() {
    EP_ENSURE(connection_.topology().num_nodes() == 1, "this call is for a Buffer within one node");
    return intranode_;
}

Internode& HighThroughput::internode() {
    EP_ENSURE(connection_.topology().num_nodes() > 1, "this call is for a Buffer across nodes");
    return internode_;
}

}  // namespace deep_ep::runtime
