// combine: every rank hands the rows it has worked on back to their owners, and each owner sums what comes back.
//
//   reduce warps   token t: wait for the rows of all ranks that had it, sum in FP32 in rank order straight from where they
//                  stand (our own input, slots, or the input that a peer lends), add the bias, write once, give slots back
//   send warps     (of a rank that does not lend its input) one stream per owner: wait for a free slot, copy the row and
//                  its weights into it, set its flag
//   add warps      (of one of two ranks, that lends its sums, instead of reduce warps) the peer writes its rows where they are
//                  summed, and the own ones are added there; the weights are summed by the warp that else sets flags
//   flag warp      sets flags for the others, which would wait for their stores
//
// With bulk copies send warps, or both roles, keep several rows, or pieces of rows, on their way through shared memory; each form is
// a kernel of its own.
//
// Messages, buffer map and orderings: docs/protocols/intranode.md.
#include <algorithm>

#include "device/algo/group.h"
#include "kernels/intranode/call_session.h"
#include "kernels/intranode/combine_add.h"
#include "kernels/intranode/combine_context.h"
#include "kernels/intranode/combine_reduce_staged.h"
#include "kernels/intranode/row_return.h"
#include "kernels/params.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

// Each role moves rows through stages of shared memory, or through registers: that wants blocks of different shape.
enum class Form { kRegisters, kSendsStaged, kStaged, kAdds };

constexpr int max_warps(Form form) {
    return form == Form::kStaged ? kMaxStagedCombineWarps
           : form == Form::kAdds ? kMaxAddingCombineWarps
                                 : kMaxCombineWarps;
}

// Shared memory of a block.
template <Form kForm> struct CombineState {
    CallState call;
    FlagRequests requests[max_warps(kForm)];
};

template <Form kForm> struct Kernel : CallOperation<Kernel<kForm>, CombineParams, CombineState<kForm>> {
    using Params = CombineParams;
    using Shared = CombineState<kForm>;
    static constexpr bool kSendsStaged = kForm == Form::kStaged || kForm == Form::kSendsStaged;
    static constexpr int kMaxWarps = max_warps(kForm);
    static constexpr int kMaxThreads = kWarpSize * (1 + kMaxWarps);
    static constexpr auto kOperation = layout::Operation::kCombine;
    static_assert(sizeof(Shared) <= kMaxCombineState);

    // Where the rows between this rank and a peer are.
    struct Look {
        RowSpan here, there;
    };
    static EP_DEVICE Look rows_between(const algo::Watch& watch, const RowMap& rows, int peer) {
        const int self = watch.heap.rank();
        return {rows.span(peer, self), rows.span(self, peer)};
    }

    static EP_DEVICE Look look(algo::Warp warp, const Params& p, const algo::Watch& watch) {
        const int num_ranks = watch.heap.num_ranks();
        return rows_between(watch, {p.rank_prefix_matrix, num_ranks},
                            warp.thread_rank() < num_ranks ? warp.thread_rank() : 0);
    }

    static EP_DEVICE bool open(algo::Warp warp, const Params& p, const algo::Watch& watch, const Look& look) {
        const int num_ranks = watch.heap.num_ranks();
        const int lane = warp.thread_rank();
        const RowMap rows{p.rank_prefix_matrix, num_ranks};
        bool is_ok = can_be(p, watch, lane < num_ranks ? lane : 0, look);
        for (int peer = lane + warp.size(); peer < num_ranks; peer += warp.size())
            is_ok &= can_be(p, watch, peer, rows_between(watch, rows, peer));
        if (!algo::all(warp, is_ok)) return false;
        if (!p.may_lend) return true;
        if (blockIdx.x == 0) algo::state_loan(warp, watch, p.loan);
        if (!algo::wait_for_loans(warp, watch)) return false;
        if (lane < num_ranks) is_ok &= fits_loans(p, watch, lane, look);
        for (int peer = lane + warp.size(); peer < num_ranks; peer += warp.size())
            is_ok &= fits_loans(p, watch, peer, rows_between(watch, rows, peer));
        return algo::all(warp, is_ok);
    }

    static EP_DEVICE void prepare(algo::Block block, const Params&, const algo::Watch&, Shared& shared) {
        algo::for_each(block, kMaxWarps * kRequests,
                       [&](int i) { shared.requests[i / kRequests].word[i % kRequests] = 0; });
    }

    static EP_DEVICE bool work(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        const algo::Ring ring(watch, p.window);
        const CombineContext c{p, watch, ring, RowMap{p.rank_prefix_matrix, p.heap.num_ranks}};
        if (p.loan.x != 0 && p.loan.topk_weights != 0) lend_weights(block, c);
        const algo::Warp warp;
        FlagRequester flags(shared.requests + prim::warp_idx());
        if constexpr (kForm == Form::kAdds) return work_apart(warp, c, shared.requests, flags);
        const int num_warps = p.geometry.num_recv_warps + p.geometry.num_send_warps;
        if (prim::warp_idx() == num_warps) {
            if (has_flags(warp, c)) serve_flags(warp, ring, shared.requests, num_warps);
            return true;
        }
        const int send_warp = prim::warp_idx() - p.geometry.num_recv_warps;
        const bool is_ok =
            send_warp < 0 ? reduce_any(warp, c, flags, prim::warp_idx()) : send_any(warp, c, flags, send_warp);
        flags.no_more(warp);
        return is_ok;
    }

    static EP_DEVICE void void_outputs(algo::Block block, const Params& p) { void_combine(block, p); }

private:
    // Staged send warps set flags themselves, after their bulk stores.
    static EP_DEVICE bool has_flags(algo::Warp warp, const CombineContext& c) {
        return gives_slots_back(warp, c) || (!kSendsStaged && c.p.geometry.num_send_warps > 0);
    }

    // Of a rank that lends its sums: blocks that send, with a warp for the flags of slots, and blocks that add, with one for the weights.
    static EP_DEVICE bool work_apart(algo::Warp warp, const CombineContext& c, FlagRequests* requests,
                                     FlagRequester& flags) {
        const Geometry& geometry = c.p.geometry;
        const int warp_idx = prim::warp_idx(), num_add_blocks = geometry.num_blocks - geometry.num_send_blocks;
        const int add_block = static_cast<int>(blockIdx.x) - geometry.num_send_blocks;
        if (add_block < 0) {
            const int peer = 1 - c.watch.heap.rank();
            const LentSums sums = lent_sums(c, peer);
            const RoleWarp self{warp_idx * geometry.num_send_blocks + static_cast<int>(blockIdx.x),
                                geometry.num_send_warps * geometry.num_send_blocks};
            if (warp_idx >= geometry.num_send_warps) {
                if (warp_idx == geometry.num_send_warps && !sums.are_lent())
                    serve_flags(warp, c.ring, requests, geometry.num_send_warps);
                return true;
            }
            if (sums.are_lent()) return send_to_sums(warp, c, sums, peer, self.idx, self.count);
            const bool is_ok = send(warp, c, flags, self.idx, self.count);
            flags.no_more(warp);
            return is_ok;
        }
        if (warp_idx > geometry.num_recv_warps) return true;
        const bool is_summed_here = peer_writes_rows(c);
        if (warp_idx == geometry.num_recv_warps)
            return !is_summed_here || add_weights(warp, c, add_block, num_add_blocks);
        const RoleWarp self{warp_idx * num_add_blocks + add_block, geometry.num_recv_warps * num_add_blocks};
        return is_summed_here ? add_rows(warp, c, self.idx, self.count)
                              : reduce_lent_rows(&c.p, c.watch.call, &flags, self.idx, self.count);
    }

    static EP_DEVICE bool reduce_any(algo::Warp warp, const CombineContext& c, FlagRequester& flags, int reduce_warp) {
        const Geometry& geometry = c.p.geometry;
        const RoleWarp self = role_warp(geometry, reduce_warp, geometry.num_recv_warps);
        constexpr SlotCode kSlots = kForm == Form::kSendsStaged ? SlotCode::kInline : SlotCode::kApart;
        if constexpr (kForm == Form::kStaged)
            return reduce_staged(warp, c, flags, self.idx, self.count, recv_memory(geometry, reduce_warp));
        else
            return reduce<kSlots>(warp, c, flags, self.idx, self.count);
    }

    static EP_DEVICE bool send_any(algo::Warp warp, const CombineContext& c, FlagRequester& flags, int send_warp) {
        const Geometry& geometry = c.p.geometry;
        const RoleWarp self = role_warp(geometry, send_warp, geometry.num_send_warps);
        if (peer_lends_sums(c)) return send_all_to_sums(&c.p, c.watch.call, self.idx, self.count);
        if constexpr (kSendsStaged)
            return send_staged(warp, c, self.idx, self.count, send_memory(geometry, send_warp));
        else
            return send(warp, c, flags, self.idx, self.count);
    }

    // The matrix is the caller's, and what it says becomes addresses.
    static EP_DEVICE bool can_be(const Params& p, const algo::Watch& watch, int peer, const Look& rows) {
        const int self = watch.heap.rank();
        const auto is_sound = [&](int source, int destination, const RowSpan& span) {
            return span.can_be() || refuse_rows(watch, source, destination, span.first, span.end, span.total);
        };
        return is_sound(peer, self, rows.here) && is_sound(self, peer, rows.there) &&
               has_room(watch, p.num_rows, rows.here.total);
    }

    // After wait_for_loans: our rows are among those that the peer lends, and of two ranks one that lends its sums has at most a row
    // at the other for each of its tokens.
    static EP_DEVICE bool fits_loans(const Params& p, const algo::Watch& watch, int peer, const Look& rows) {
        const int self = watch.heap.rank();
        const layout::Loan& loan = algo::loan_of(watch, peer);
        const uint64_t num_lent = loan.num_rows;  // under way with the two that say whether it counts
        const auto fits = [&](int owner, int rank, const RowSpan& span, bool is_lent, int first, uint64_t num_rows) {
            return !is_lent || static_cast<uint64_t>(span.end - first) <= num_rows ||
                   refuse_rows(watch, owner, rank, span.first, span.end, static_cast<int>(num_rows));
        };
        return fits(self, peer, rows.there, loan.x != 0, 0, num_lent) &&
               fits(peer, self, rows.here, loan.sums != 0, rows.here.first, num_lent) &&
               fits(self, peer, rows.there, p.loan.sums != 0 && peer != self, rows.there.first, p.loan.num_rows);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine

void deep_ep::kernels::launch(const CombineParams& params, dev::Stream stream) {
    using combine::Form;
    using combine::Kernel;
    const Geometry& geometry = params.geometry;
    const auto launch = params.loan.sums != 0          ? launch_call<Kernel<Form::kAdds>, CombineParams>
                        : geometry.recv.num_stages > 0 ? launch_call<Kernel<Form::kStaged>, CombineParams>
                        : geometry.send.num_stages > 0 ? launch_call<Kernel<Form::kSendsStaged>, CombineParams>
                                                       : launch_call<Kernel<Form::kRegisters>, CombineParams>;
    const int num_warps = geometry.num_send_blocks > 0 ? std::max(geometry.num_send_warps, geometry.num_recv_warps)
                                                       : geometry.num_send_warps + geometry.num_recv_warps;
    launch("deep_ep::combine", params, num_warps + 1, stream);
}
