// dispatch across nodes: every token once to each node that needs it, and there to the final row of each rank that needs it.
//
//   at first        each block: positions of tokens, from the routing. Where rows stand is known: from the count exchange, which
//                   is a launch of its own, or from the call whose routing is used again
//   send warps      token t: read once; to the ranks of this node as inside a node, and into the staging slot of each other node;
//                   whoever completes a chunk posts it
//   forward warps   the chunks of the rail peers: each token on to the ranks of this node that need it
//   receive warps   (of a rank that does not lend) slots to final rows, one stream for each source of any node
//
// Messages, buffer map and orderings: docs/protocols/internode.md.
#include "kernels/internode/launch_roles.h"
#include "kernels/internode/token_forward.h"
#include "kernels/intranode/dispatch_context.h"
#include "kernels/kernel_table.h"

namespace deep_ep::kernels::internode::dispatch {
inline namespace EP_BACKEND {

struct Kernel {
    using Params = InternodeDispatchParams;
    using Shared = State;
    static constexpr int kMaxThreads = kMaxInternodeDispatchThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr auto kOperation = layout::Operation::kDispatch;

    // -- The operation of a CallSession ----------------------------------------------------------------------------------

    static EP_DEVICE bool is_first_launch(const Params& p) { return p.is_first_kernel; }

    struct Look {};
    static EP_DEVICE Look look(algo::Warp, const Params&, const algo::Watch&) { return {}; }

    static EP_DEVICE bool open(algo::Warp warp, const Params& p, const algo::Watch& watch, Look) {
        const RailLink link(p.rail, watch);
        if (p.is_first_kernel && blockIdx.x == 0 && !link.announce(warp)) return false;
        if (!link.wait_for_banks(warp)) return false;
        if (p.may_lend && blockIdx.x == 0) algo::state_loan(warp, watch, p.loan);
        return true;
    }

    static EP_DEVICE void prepare(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        dispatch::prepare(block, p, watch, shared);
    }

    static EP_DEVICE Begun learn(algo::Block block, const Params& p, const algo::Watch& watch, Shared&) {
        return dispatch::learn(block, p, watch);
    }

    static EP_DEVICE bool work(algo::Block, const Params& p, const algo::Watch& watch, Shared& shared) {
        const algo::Ring ring(watch, p.window);
        const RailLink link(p.rail, watch);
        const Context c{p,
                        watch,
                        ring,
                        link,
                        row_map(p.heap, p.rank_prefix_matrix),
                        {p.rail_prefix, watch.heap.num_nodes()},
                        shared.num_sent,
                        &shared.bad_token};
        const Geometry& geometry = p.geometry;
        const algo::Warp warp;
        if (p.is_worst_case) kernels::dispatch::mark_unused_rows(algo::Grid{}, p, c.rows.total_rows(watch.heap.rank()));
        // The warps of a role are dealt over all blocks.
        const auto idx_from = [&](int first_warp) {
            return (prim::warp_idx() - first_warp) * geometry.num_blocks + static_cast<int>(blockIdx.x);
        };
        const int first_forward = geometry.num_send_warps;
        const int first_recv = first_forward + p.rail.num_forward_warps;
        if (prim::warp_idx() < first_forward)
            return send(warp, c, idx_from(0), geometry.num_send_warps * geometry.num_blocks);
        if (prim::warp_idx() < first_recv)
            return forward(warp, c, idx_from(first_forward), p.rail.num_forward_warps * geometry.num_blocks);
        return receive(warp, c, idx_from(first_recv), geometry.num_recv_warps * geometry.num_blocks);
    }

    static EP_DEVICE bool check(algo::Warp warp, const Params& p, const Shared& shared) {
        const int token = prim::load<Order::kRelaxed, Scope::kCta>(&shared.bad_token);
        if (token < 0) return true;
        if (warp.thread_rank() == 0) refuse_expert(&p, shared.call.number, token);
        return false;
    }

    static EP_DEVICE void close(algo::Warp warp, const Params& p, const algo::Watch& watch, bool has_failed) {
        const RailLink link(p.rail, watch);
        if (has_failed || !link.tell_end(warp)) link.tell_failure(warp);
    }

    static EP_DEVICE void void_outputs(algo::Block block, const Params& p) {
        kernels::dispatch::void_dispatch(block, p);
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) { CallSession<Kernel>::run(p, shared); }

private:
    // Streams are those of all sources but the ranks that write into this rank's tensors themselves: this one, for its own tokens
    // and for those that it forwards.
    static EP_DEVICE bool receive(algo::Warp warp, const Context& c, int warp_idx, int num_warps) {
        const algo::Heap& heap = c.watch.heap;
        const int num_others = heap.num_ranks() - 1;
        const auto index_of = [&](int source) { return source % heap.num_ranks(); };
        const auto source_at = [&](int idx) {
            const int node = (c.link.node() + idx / num_others) % heap.num_nodes();
            return node * heap.num_ranks() + (heap.rank() + 1 + idx % num_others) % heap.num_ranks();
        };
        const bool is_lent = c.p.loan.x != 0;
        const algo::RowStream stream =
            algo::deal_peers(warp, warp_idx, num_warps, num_others * heap.num_nodes(), source_at,
                             [&](int source) { return is_lent ? 0 : c.rows.num_rows(source, heap.rank()); });
        const auto port = [&](int source) { return c.ring.from(index_of(source), source / heap.num_ranks()); };
        return algo::serve_streams_at(
            warp, c.watch,
            [&](int source) {
                return algo::WaitSite{Stage::kRow, index_of(source)};
            },
            stream, [&](int source, int position) { return port(source).row_is_here(position); },
            [&](int source, int position, int count) {
                const int64_t row = static_cast<int64_t>(c.rows.first_row(source, heap.rank())) + position;
                kernels::dispatch::receive_row(warp, c, port(source), position, count, row);
            });
    }

    static EP_DEVICE_COLD void refuse_expert(const Params* p, uint64_t call, int token) {
        kernels::dispatch::refuse_expert(*p, kernels::dispatch::make_watch(*p, call), token);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::dispatch

void deep_ep::kernels::launch(const InternodeDispatchParams& params, dev::Stream stream) {
    using namespace internode;
    using namespace internode::dispatch;
    launch_roles<Kernel>("dispatch", "deep_ep::dispatch_internode", params, params.geometry.num_recv_warps, stream);
}
