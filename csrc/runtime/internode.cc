#include "runtime/internode.h"

#include "core/error.h"

namespace deep_ep::runtime {

namespace {

template <class Args> layout::SlotLayout rail_dispatch_slot(const Args& args, int num_positions) {
    return layout::SlotLayout::for_dispatch(args.row_bytes, static_cast<uint64_t>(args.num_topk),
                                            static_cast<uint64_t>(args.num_scales),
                                            static_cast<uint64_t>(num_positions));
}

void share_roles(const InternodeGeometry& planned, kernels::Geometry& node, kernels::RailPlan& rail) {
    node = planned.node;
    rail.num_forward_warps = planned.num_forward_warps;
}

}  // namespace

Internode::Internode(Connection& connection, const kernels::KernelTable& kernels, HighThroughput& node)
    : connection_(connection), kernels_(kernels), node_(node) {
    const auto num_nodes = static_cast<uint64_t>(connection.topology().num_nodes());
    if (num_nodes > 1) counters_ = {connection.device(), layout::RailCounters::make(num_nodes).bytes};
}

kernels::RailPlan Internode::plan_call(const layout::SlotLayout& slot, const char* operation) const {
    const layout::Topology& topology = connection_.topology();
    const rail::Engine& engine = connection_.engine();
    const RailRegion& region = connection_.rail_region();
    return {.params = engine.params(),
            .topology = topology,
            .control = region.control,
            .window = plan_rail_window(region, topology.num_nodes(), slot,
                                       plan_chunk_bytes(engine.chunk_bytes(), connection_.options().rail_gb_per_s),
                                       operation),
            .slot = slot,
            .counters = counters_.get(),
            .num_forward_warps = 0};
}

void Internode::notify(const InternodeNotifyArgs& args, dev::Stream stream) {
    connection_.check();
    EP_CHECK(args.expert_alignment >= 0, "expert_alignment must be positive, got ", args.expert_alignment);
    const kernels::NotifyDispatchPlan plan = node_.notify_plan(args);
    const kernels::RailPlan rail =
        plan_call(rail_dispatch_slot(args, connection_.topology().ranks_per_node), "dispatch");
    connection_.announce(stream, false);
    connection_.launch(kernels_.internode_notify, {{plan, args}, args, rail}, stream);
}

void Internode::dispatch(const InternodeDispatchArgs& args, int num_sms, dev::Stream stream) {
    connection_.check();
    EP_ENSURE(args.num_tokens_per_rank == nullptr && args.expert_alignment == 0,
              "across nodes a kernel of its own exchanges the counts");
    kernels::DispatchPlan plan = node_.dispatch_plan(args);
    const int num_positions = args.is_cached ? 0 : connection_.topology().ranks_per_node;
    kernels::RailPlan rail = plan_call(rail_dispatch_slot(args, num_positions), "dispatch");
    const bool receives_nothing = plan.loan.x != 0 || connection_.topology().ranks_per_node == 1;  // from neighbours
    share_roles(plan_internode_dispatch(connection_.machine(), connection_.topology(), args.num_topk, num_sms,
                                        receives_nothing),
                plan.geometry, rail);
    connection_.announce(stream, false);
    connection_.launch(kernels_.internode_dispatch, {{plan, args}, args, rail}, stream);
}

void Internode::combine(const InternodeCombineArgs& args, int num_sms, dev::Stream stream) {
    connection_.check();
    kernels::CombinePlan plan = node_.combine_plan(args);
    kernels::RailPlan rail =
        plan_call(layout::SlotLayout::for_combine(plan.row_bytes, static_cast<uint64_t>(args.num_topk)), "combine");
    const bool sends_nothing = plan.loan.x != 0 || connection_.topology().ranks_per_node == 1;  // to neighbours
    share_roles(
        plan_internode_combine(connection_.machine(), connection_.topology(), args.num_topk, num_sms, sends_nothing),
        plan.geometry, rail);
    connection_.announce(stream, false);
    connection_.launch(kernels_.internode_combine, {{plan, args}, args, rail}, stream);
}

}  // namespace deep_ep::runtime
