// notify_dispatch: the count exchange, for a host that has to know how many rows come before it can allocate them. One block.
// Where it need not know, dispatch exchanges the counts by itself. See docs/protocols/intranode.md.
#include "device/algo/watch.h"
#include "device/launch.h"
#include "kernels/intranode/exchange.h"
#include "kernels/params.h"

namespace deep_ep::kernels::notify_dispatch {
inline namespace EP_BACKEND {

using prim::Order;
using prim::Scope;

struct Kernel {
    using Params = NotifyDispatchParams;
    static constexpr int kMaxThreads = kMaxNotifyThreads;
    struct Shared {};

    static EP_DEVICE bool enter(algo::Warp warp, const Params& p, const algo::Watch& watch) {
        if (warp.thread_rank() == 0) prim::store<Order::kRelaxed, Scope::kSys>(&p.counts->entered, p.ticket);
        algo::announce_start(warp, watch);
        return algo::wait_for_banks(warp, watch);
    }

    // The matrix that the caller gets: a thread sums the column of one destination.
    static EP_DEVICE bool fill_matrix(algo::Block block, const Params& p, const algo::Watch& watch) {
        const int num_ranks = watch.heap.num_ranks();
        bool is_ok = true;
        algo::for_each(block, num_ranks, [&](int rank) {
            is_ok &= accumulate_rank_counts(
                watch, rank, [&](int source, int sum) { p.rank_prefix_matrix[source * num_ranks + rank] = sum; });
        });
        return is_ok;
    }

    static EP_DEVICE void run(const Params& p, Shared&) {
        const algo::Block block;
        const algo::Watch watch = {p.watch, p.heap, layout::Operation::kNotifyDispatch,
                                   algo::current_call(p.watch.local)};
        if (algo::any(block, prim::warp_idx() == 0 && !enter(algo::Warp{}, p, watch))) return;
        algo::for_each(block, watch.heap.num_ranks(), [&](int rank) {
            write_rank_count(watch, watch.heap.rank(), rank, p.num_tokens_per_rank[rank]);
        });
        write_expert_counts(block, watch, p.num_tokens_per_expert, p.num_local_experts);
        const bool has_matrix = fill_matrix(block, p, watch);
        const bool has_counts = tell_expert_counts(block, watch, p.counts, p.num_local_experts, p.expert_alignment);
        // Everybody's counts and sums, one thread's release.
        if (algo::any(block, !has_matrix || !has_counts) || block.thread_rank() != 0) return;
        const int last_row = (watch.heap.num_ranks() - 1) * watch.heap.num_ranks();
        tell_num_rows(p.counts, p.rank_prefix_matrix[last_row + watch.heap.rank()], p.ticket);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::notify_dispatch

void deep_ep::kernels::launch(const NotifyDispatchParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_threads = params.num_threads;
    config.name = "deep_ep::notify_dispatch";
    dev::launch<notify_dispatch::Kernel>(config, stream, params);
}
