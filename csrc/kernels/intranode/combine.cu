// combine: every rank hands the rows it has worked on back to their owners, and each owner sums what comes back.
//
//   reduce warps   token t: wait for the rows of all ranks that had it, sum in FP32 in rank order straight from where they
//                  stand (our own input, slots, or the input that a peer lends), add the bias, write once, give slots back
//   send warps     (of a rank that does not lend its input) one stream per owner: wait for a free slot, copy the row and
//                  its weights into it, set its flag
//
// With bulk copies, both keep several rows, or pieces of rows, on their way through shared memory.
//
// Messages, buffer map and orderings: docs/protocols/intranode.md.
#include "device/launch.h"
#include "kernels/context.h"
#include "kernels/intranode/combine_reduce.h"
#include "kernels/intranode/combine_send.h"
#include "kernels/intranode/frame.h"
#include "kernels/intranode/launchers.h"
#include "kernels/intranode/staging.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

struct Kernel {
    using Params = CombineParams;
    static constexpr int kMaxThreads = kMaxCombineThreads;
    using Shared = FrameState;
    static_assert(sizeof(Shared) <= kMaxCombineState);

    // All threads of all blocks: the weights go to where peers can read them; the block that comes last says so.
    static EP_DEVICE void lend_weights(const Context& c) {
        const Params& p = c.p;
        const algo::Heap& heap = c.watch.heap;
        const int64_t num_weights = static_cast<int64_t>(c.rows.total_rows(heap.rank())) * p.num_topk;
        const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
        for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_weights; i += step)
            p.lent_weights[i] = p.topk_weights[i];
        __syncthreads();
        if (prim::warp_idx() != 0 || !algo::is_last_block(&c.watch.words.local->num_weight_blocks)) return;
        for (int peer = prim::lane_idx(); peer < heap.num_ranks(); peer += kWarpSize)
            // Release: the weights. Pairs with: wait_for_weights at the peer.
            prim::store<prim::Order::kRelease, prim::Scope::kSys>(heap.weight_flag(peer, heap.rank()), c.watch.call);
    }

    static EP_DEVICE bool reduce_any(const Context& c, int reduce_warp) {
        const Geometry& geometry = c.p.geometry;
        const int warp = reduce_warp * geometry.num_blocks + static_cast<int>(blockIdx.x);
        const int num_warps = geometry.num_recv_warps * geometry.num_blocks;
        if (prim::has_bulk_copy() && geometry.recv.num_stages > 0)
            return reduce_staged(c, warp, num_warps, recv_memory(geometry, reduce_warp));
        return reduce(c, warp, num_warps);
    }

    static EP_DEVICE bool send_any(const Context& c, int send_warp) {
        const Geometry& geometry = c.p.geometry;
        const int warp = send_warp * geometry.num_blocks + static_cast<int>(blockIdx.x);
        const int num_warps = geometry.num_send_warps * geometry.num_blocks;
        if (prim::has_bulk_copy() && geometry.send.num_stages > 0)
            return send_staged(c, warp, num_warps, send_memory(geometry, send_warp));
        return send(c, warp, num_warps);
    }

    // Where the rows between this rank and a peer are.
    struct Between {
        RowSpan here, there;
    };
    static EP_DEVICE Between rows_between(const Context& c, int peer) {
        const int self = c.watch.heap.rank();
        return {c.rows.span(peer, self), c.rows.span(self, peer)};
    }

    // One thread. The matrix is the caller's, and what it says becomes addresses.
    static EP_DEVICE bool can_be(const Context& c, int peer, const Between& rows) {
        const int self = c.watch.heap.rank();
        const auto is_sound = [&](int source, int destination, const RowSpan& span) {
            return span.can_be() || refuse_rows(c.watch, source, destination, span.first, span.end, span.total);
        };
        return is_sound(peer, self, rows.here) && is_sound(self, peer, rows.there) &&
               has_room(c.watch, c.p.num_rows, rows.here.total);
    }

    // One thread, after wait_for_loans: our rows are among those that the peer lends.
    static EP_DEVICE bool is_among_lent(const Context& c, int peer, const RowSpan& rows) {
        const layout::Loan& loan = algo::loan_of(c.watch, peer);
        return loan.x == 0 || static_cast<uint64_t>(rows.end) <= loan.num_rows ||
               refuse_rows(c.watch, c.watch.heap.rank(), peer, rows.first, rows.end, static_cast<int>(loan.num_rows));
    }

    // One warp of each block.
    static EP_DEVICE bool enter(const Context& c) {
        const int num_ranks = c.watch.heap.num_ranks();
        const int lane = prim::lane_idx();
        const Between rows = rows_between(c, lane < num_ranks ? lane : 0);  // under way while the call is entered
        if (!enter_call(c.watch, true)) return false;
        bool is_ok = can_be(c, lane < num_ranks ? lane : 0, rows);
        for (int peer = lane + kWarpSize; peer < num_ranks; peer += kWarpSize)
            is_ok &= can_be(c, peer, rows_between(c, peer));
        is_ok = __all_sync(kFullMask, is_ok) != 0;
        if (!is_ok || !c.p.may_lend) return is_ok;
        if (blockIdx.x == 0) algo::state_loan(c.watch, c.p.loan);
        if (!algo::wait_for_loans(c.watch)) return false;
        for (int peer = lane; peer < num_ranks; peer += kWarpSize)
            is_ok &= is_among_lent(c, peer, c.rows.span(c.watch.heap.rank(), peer));
        return __all_sync(kFullMask, is_ok) != 0;
    }

    // All threads of the block. False: do nothing but finish the call.
    static EP_DEVICE bool begin(const Context& c, FrameState& state) {
        if (prim::warp_idx() == 0) {
            const bool is_ok = enter(c);
            if (prim::lane_idx() == 0) state = {is_ok ? 1 : 0, 0, {}};
        }
        __syncthreads();
        return state.is_ready != 0;
    }

    static EP_DEVICE void work(const Context& c, FrameState& state) {
        if (c.p.loan.topk_weights != 0) lend_weights(c);
        const int send_warp = prim::warp_idx() - c.p.geometry.num_recv_warps;
        const bool is_ok = send_warp < 0 ? reduce_any(c, prim::warp_idx()) : send_any(c, send_warp);
        if (!is_ok) state.note_failure();
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Watch watch =
            make_watch(p.watch, p.heap, layout::Operation::kCombine, algo::current_call(p.watch.local));
        const algo::Ring ring(watch, p.window);
        const Context context{p, watch, ring, RowMap{p.rank_prefix_matrix, p.heap.num_ranks}};
        const bool has_begun = begin(context, shared);
        if (has_begun) work(context, shared);
        finish_call(watch, has_begun, p.may_lend, p.loan.x != 0, shared, [&] {
            void_output(p.combined_x, static_cast<int64_t>(p.num_tokens) * p.row_bytes);
            void_output(p.combined_topk_weights, static_cast<int64_t>(p.num_tokens) * p.num_topk * 4);
        });
    }
};

void launch(const CombineParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.geometry.num_blocks;
    config.num_threads = kWarpSize * (params.geometry.num_send_warps + params.geometry.num_recv_warps);
    config.dynamic_shared_bytes = staging_bytes(params.geometry);
    config.is_cooperative = true;
    config.name = "deep_ep::combine";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
