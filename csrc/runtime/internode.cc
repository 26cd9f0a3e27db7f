#include "runtime/internode.h"

#include "core/error.h"

namespace deep_ep::runtime {

namespace {

template <class Args> layout::RailSlot rail_dispatch_slot(const Args& args, int num_positions) {
    return layout::RailSlot::for_dispatch(args.row_bytes, static_cast<uint64_t>(args.num_topk),
                                          static_cast<uint64_t>(args.num_scales), static_cast<uint64_t>(num_positions));
}

}  // namespace

Internode::Internode(Connection& connection, const kernels::KernelTable& kernels, Loans& loans, CountExchange& counts)
    : connection_(connection), kernels_(kernels), loans_(loans), counts_(counts) {
    const auto num_nodes = static_cast<uint64_t>(connection.topology().num_nodes());
    if (num_nodes > 1) counters_ = {connection.device(), layout::RailCounters::make(num_nodes).bytes};
}

kernels::RailPlan Internode::plan_call(const layout::RailSlot& slot, const char* operation) const {
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
    counts_.check_experts(args.num_experts);
    EP_CHECK(args.expert_alignment >= 0, "expert_alignment must be positive, got ", args.expert_alignment);
    check_dispatch_rows(args.num_tokens, args.row_bytes);
    static_cast<void>(plan_window(connection_.plan(), dispatch_slot(args), "dispatch"));  // it would be too late later
    const kernels::RailPlan rail =
        plan_call(rail_dispatch_slot(args, connection_.topology().ranks_per_node), "dispatch");
    connection_.announce(stream, false);
    const bool tells_host = args.expert_alignment > 0;
    const int num_local = args.num_experts / connection_.topology().num_ranks;
    const uint64_t ticket = tells_host ? counts_.begin(num_local) : counts_.ticket();
    kernels_.internode_notify({{{.heap = connection_.heap_params(),
                                 .watch = connection_.watch_params(),
                                 .num_local_experts = num_local,
                                 .counts = tells_host ? counts_.counts() : nullptr,
                                 .ticket = ticket,
                                 .num_threads = plan_notify_threads(connection_.machine())},
                                args},
                               args,
                               rail},
                              stream);
}

void Internode::dispatch(const InternodeDispatchArgs& args, int num_sms, dev::Stream stream) {
    connection_.check();
    EP_ENSURE(!args.is_cached || args.is_token_in_rank == nullptr, "a cached dispatch scans no tokens");
    EP_ENSURE(args.num_tokens_per_rank == nullptr && args.expert_alignment == 0,
              "across nodes a kernel of its own exchanges the counts");
    check_dispatch_rows(args.num_tokens, args.row_bytes);
    const layout::SlotLayout slot = dispatch_slot(args);
    const layout::WindowLayout window = plan_window(connection_.plan(), slot, "dispatch");
    const int num_positions = args.is_cached ? 0 : connection_.topology().ranks_per_node;
    kernels::RailPlan rail = plan_call(rail_dispatch_slot(args, num_positions), "dispatch");
    const layout::Loan loan = loans_.loan_for(args);
    const bool receives_nothing = loan.x != 0 || connection_.topology().ranks_per_node == 1;  // from neighbours
    const InternodeGeometry geometry = plan_internode_dispatch(connection_.machine(), connection_.topology(),
                                                               args.num_topk, num_sms, receives_nothing);
    rail.num_forward_warps = geometry.num_forward_warps;
    connection_.announce(stream, false);
    kernels_.internode_dispatch({{{.heap = connection_.heap_params(),
                                   .watch = connection_.watch_params(),
                                   .geometry = geometry.node,
                                   .slot = slot,
                                   .window = window,
                                   .is_first_kernel = args.is_cached,
                                   .may_lend = loans_.may_lend(),
                                   .loan = loan,
                                   .num_local_experts = args.num_experts / connection_.topology().num_ranks,
                                   .counts = nullptr,
                                   .ticket = counts_.ticket()},
                                  args},
                                 args,
                                 rail},
                                stream);
}

void Internode::combine(const InternodeCombineArgs& args, int num_sms, dev::Stream stream) {
    connection_.check();
    const uint32_t row_bytes = check_combine_rows(args.num_tokens, args.hidden);
    const layout::SlotLayout slot = combine_slot(args);
    const layout::WindowLayout window = plan_window(connection_.plan(), slot, "combine");
    kernels::RailPlan rail =
        plan_call(layout::RailSlot::for_combine(row_bytes, static_cast<uint64_t>(args.num_topk)), "combine");
    const layout::Loan loan = loans_.loan_for(args);
    const bool sends_nothing = loan.x != 0 || connection_.topology().ranks_per_node == 1;  // to neighbours
    const InternodeGeometry geometry =
        plan_internode_combine(connection_.machine(), connection_.topology(), args.num_topk, num_sms, sends_nothing);
    rail.num_forward_warps = geometry.num_forward_warps;
    connection_.announce(stream, false);
    kernels_.internode_combine({{{.heap = connection_.heap_params(),
                                  .watch = connection_.watch_params(),
                                  .geometry = geometry.node,
                                  .slot = slot,
                                  .window = window,
                                  .may_lend = loans_.may_lend(),
                                  .loan = loan,
                                  .lent_weights = loans_.weights(),
                                  .row_bytes = row_bytes},
                                 args},
                                args,
                                rail},
                               stream);
}

}  // namespace deep_ep::runtime
