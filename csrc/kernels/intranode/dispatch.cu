// dispatch: every token to the final row of each rank that needs it, once per rank.
//
//   at first        each block: learns where rows go and stand. Where the counts have not been exchanged before (the caller
//                   gives the number of rows that may come), this kernel exchanges them
//   send warps      token t: read once; our own copy and those for ranks that lend their outputs go straight to their
//                   final rows, the others into the next slot of each destination's window, then one flag for each
//   receive warps   (of a rank that does not lend) one stream per source: wait for the flag of the next row, move the
//                   slot to its final row, give the slot back where a later row needs it
//
// With bulk copies, send warps keep several rows on their way through shared memory. Receive warps do not: one engine
// carries all bulk copies of an SM, and is full with what is sent (docs/performance/intranode.md).
//
// Messages, buffer map and orderings: docs/protocols/intranode.md.
#include "kernels/intranode/dispatch_context.h"
#include "kernels/intranode/token_send.h"
#include "kernels/kernel_table.h"

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

// Rows are sent through stages of shared memory, or through registers: a kernel for both would have registers for neither.
template <bool kIsStaged> struct Kernel {
    using Params = DispatchParams;
    using Shared = DispatchState;
    static constexpr int kMaxThreads = kWarpSize * kMaxDispatchWarps;
    static constexpr auto kOperation = layout::Operation::kDispatch;

    // -- The operation of a CallSession ----------------------------------------------------------------------------------

    static EP_DEVICE bool is_first_launch(const Params& p) { return p.is_first_kernel; }

    struct Look {};
    static EP_DEVICE Look look(algo::Warp, const Params&, const algo::Watch&) { return {}; }

    static EP_DEVICE bool open(algo::Warp warp, const Params& p, const algo::Watch& watch, Look) {
        return open_call(warp, p, watch);
    }

    static EP_DEVICE void prepare(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        dispatch::prepare(block, p, watch, shared);
    }

    static EP_DEVICE Begun learn(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        return dispatch::learn(block, p, watch, shared);
    }

    static EP_DEVICE bool work(algo::Block, const Params& p, const algo::Watch& watch, Shared& shared) {
        const algo::Ring ring(watch, p.window);
        const DispatchContext c{p, watch, ring, shared.rows, &shared.bad_token};
        const Geometry& geometry = p.geometry;
        const algo::Warp warp;
        const int recv_warp = prim::warp_idx() - geometry.num_send_warps;
        if (p.is_worst_case) mark_unused_rows(algo::Grid{}, p, shared.rows.num_rows(watch.heap.num_ranks()));
        if (recv_warp < 0) return send_any<kIsStaged>(warp, c, prim::warp_idx());
        return receive(warp, c, recv_warp * geometry.num_blocks + static_cast<int>(blockIdx.x),
                       geometry.num_recv_warps * geometry.num_blocks);
    }

    static EP_DEVICE bool check(algo::Warp warp, const Params& p, const Shared& shared) {
        return input_can_be(warp, p, shared);
    }

    static EP_DEVICE void void_outputs(algo::Block block, const Params& p) { void_dispatch(block, p); }

    static EP_DEVICE void run(const Params& p, Shared& shared) { CallSession<Kernel>::run(p, shared); }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch

void deep_ep::kernels::launch(const DispatchParams& params, dev::Stream stream) {
    const Geometry& geometry = params.geometry;
    launch_call<dispatch::Kernel>("deep_ep::dispatch", params, geometry.num_send_warps + geometry.num_recv_warps,
                                  geometry.send.num_stages > 0, stream);
}
