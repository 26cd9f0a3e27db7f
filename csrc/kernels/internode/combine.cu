// combine across nodes: rows go back to their owners, those for owners in other nodes as one sum of each node.
//
//   reduce warps    token t of this rank: its rows in this node, in rank order, the sums of other nodes, in node order, biases
//   forward warps   token q of a rail peer: the sum of its rows in this node into staging; whoever completes a chunk posts it
//   send warps      (of a rank that does not lend its input) rows to the rank of this node that needs them: the owner, or the
//                   forwarder on the owner's rail
//
// Messages, buffer map and orderings: docs/protocols/internode.md.
#include "device/algo/group.h"
#include "kernels/internode/launch_roles.h"
#include "kernels/internode/sum_forward.h"
#include "kernels/internode/token_reduce.h"
#include "kernels/intranode/combine_context.h"
#include "kernels/intranode/row_return.h"
#include "kernels/kernel_table.h"

namespace deep_ep::kernels::internode::combine {
inline namespace EP_BACKEND {

struct Kernel {
    using Params = InternodeCombineParams;
    using Shared = State;
    static constexpr int kMaxThreads = kMaxInternodeCombineThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr auto kOperation = layout::Operation::kCombine;

    // -- The operation of a CallSession ----------------------------------------------------------------------------------

    static EP_DEVICE bool is_first_launch(const Params&) { return true; }

    struct Look {};
    static EP_DEVICE Look look(algo::Warp, const Params&, const algo::Watch&) { return {}; }

    static EP_DEVICE bool open(algo::Warp warp, const Params& p, const algo::Watch& watch, Look) {
        const RailLink link(p.rail, watch);
        if (blockIdx.x == 0 && !link.announce(warp)) return false;
        if (!link.wait_for_banks(warp)) return false;
        if (!p.may_lend) return true;
        if (blockIdx.x == 0) algo::state_loan(warp, watch, p.loan);
        return algo::wait_for_loans(warp, watch);
    }

    static EP_DEVICE void prepare(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        count_sent_tokens(block, p.send_rail_head, p.num_tokens, watch.heap.num_nodes(), shared.num_sent);
    }

    static EP_DEVICE Begun learn(algo::Block block, const Params& p, const algo::Watch& watch, Shared&) {
        const RailLink link(p.rail, watch);
        const RowMap rows = row_map(p.heap, p.rank_prefix_matrix);
        bool is_ok = rows_can_be(block, watch, rows, p.num_rows);
        is_ok &= rail_tokens_can_be(block, link, {p.rail_prefix, watch.heap.num_nodes()}, p.num_rail_tokens);
        if (p.may_lend)
            algo::for_each(block, rows.num_ranks,
                           [&](int rank) { is_ok &= are_among_lent(watch, rank, rows.total_rows(rank)); });
        return algo::any(block, !is_ok) ? Begun::kFailed : Begun::kReady;
    }

    static EP_DEVICE bool work(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        const algo::Ring ring(watch, p.window);
        const RailLink link(p.rail, watch);
        const CombineContext local{p, watch, ring, row_map(p.heap, p.rank_prefix_matrix)};
        const Context c{p, local, link, {p.rail_prefix, watch.heap.num_nodes()}, shared.num_sent};
        if (p.loan.topk_weights != 0) kernels::combine::lend_weights(block, local);
        const Geometry& geometry = p.geometry;
        const algo::Warp warp;
        const auto idx_from = [&](int first_warp) {
            return (prim::warp_idx() - first_warp) * geometry.num_blocks + static_cast<int>(blockIdx.x);
        };
        const int first_forward = geometry.num_recv_warps;
        const int first_send = first_forward + p.rail.num_forward_warps;
        if (prim::warp_idx() < first_forward)
            return TokenReduce(c).run(warp, idx_from(0), geometry.num_recv_warps * geometry.num_blocks);
        if (prim::warp_idx() < first_send)
            return SumForward(c).run(warp, idx_from(first_forward), p.rail.num_forward_warps * geometry.num_blocks);
        return send(warp, c, idx_from(first_send), geometry.num_send_warps * geometry.num_blocks);
    }

    static EP_DEVICE bool check(algo::Warp, const Params&, const Shared&) { return true; }

    static EP_DEVICE void close(algo::Warp warp, const Params& p, const algo::Watch& watch, bool has_failed) {
        const RailLink link(p.rail, watch);
        if (has_failed || !link.tell_end(warp)) link.tell_failure(warp);
    }

    static EP_DEVICE void void_outputs(algo::Block block, const Params& p) {
        algo::void_output(block, p.combined_x, static_cast<int64_t>(p.num_tokens) * p.row_bytes);
        algo::void_output(block, p.combined_topk_weights, static_cast<int64_t>(p.num_tokens) * p.num_topk * 4);
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) { CallSession<Kernel>::run(p, shared); }

private:
    // After wait_for_loans: what stands at the rank is among what it lends.
    static EP_DEVICE bool are_among_lent(const algo::Watch& watch, int rank, int num_rows) {
        const layout::Loan& loan = algo::loan_of(watch, rank);
        return loan.x == 0 || static_cast<uint64_t>(num_rows) <= loan.num_rows ||
               refuse_rows(watch, watch.heap.first_rank() + watch.heap.rank(), watch.heap.first_rank() + rank, 0,
                           num_rows, static_cast<int>(loan.num_rows));
    }

    // One stream for each owner whose rows another rank of this node needs.
    static EP_DEVICE bool send(algo::Warp warp, const Context& c, int warp_idx, int num_warps) {
        const algo::Heap& heap = c.local.watch.heap;
        const int num_others = heap.num_ranks() - 1;
        const auto index_of = [&](int owner) { return owner % heap.num_ranks(); };
        const auto owner_at = [&](int idx) {
            const int node = (c.link.node() + idx / num_others) % heap.num_nodes();
            return node * heap.num_ranks() + (heap.rank() + 1 + idx % num_others) % heap.num_ranks();
        };
        const bool is_lent = c.p.loan.x != 0;
        const algo::RowStream stream =
            algo::deal_peers(warp, warp_idx, num_warps, num_others * heap.num_nodes(), owner_at,
                             [&](int owner) { return is_lent ? 0 : c.local.rows.num_rows(owner, heap.rank()); });
        const auto port = [&](int owner) { return c.local.ring.to(index_of(owner), owner / heap.num_ranks()); };
        return algo::serve_streams_at(
            warp, c.local.watch,
            [&](int owner) {
                return algo::WaitSite{Stage::kSlot, index_of(owner)};
            },
            stream, [&](int owner, int position) { return port(owner).slot_is_free(position); },
            [&](int owner, int position, int) {
                const int64_t row = static_cast<int64_t>(c.local.rows.first_row(owner, heap.rank())) + position;
                kernels::combine::put_row(warp, c.local, row,
                                          kernels::combine::place_in_slot(c.local, port(owner).slot(position)));
                if (warp.thread_rank() == 0) port(owner).publish(position);
            });
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::combine

void deep_ep::kernels::launch(const InternodeCombineParams& params, dev::Stream stream) {
    using namespace internode;
    using namespace internode::combine;
    launch_roles<Kernel>("combine", "deep_ep::combine_internode", params, params.geometry.num_send_warps, stream);
}
