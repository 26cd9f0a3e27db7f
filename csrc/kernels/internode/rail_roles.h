// What the roles of a kernel across nodes share: streams of tokens on the rail and between neighbours, each served by one warp, and
// how three roles lie side by side in every block.
#pragma once

#include "core/error.h"
#include "device/algo/ring.h"
#include "device/launch.h"
#include "device/prim.h"
#include "kernels/internode/rail_link.h"
#include "kernels/intranode/call_session.h"
#include "kernels/intranode/exchange.h"

namespace deep_ep::kernels::internode {
inline namespace EP_BACKEND {

// -- Streams of the rail ---------------------------------------------------------------------------------------------
// A warp serves several, each from or to a rank of another node. What a token needs may be many things at once, which the lanes
// look for; a stream that lacks something never holds up another.

// What one lane misses of the next token of a stream.
struct Lack {
    bool is_set = false;
    bool has_failed = false;  // it will never come: that is reported already
    algo::WaitSite site = {};
    uint64_t expected = 0;
    uint64_t seen = 0;
};

EP_DEVICE Lack failed_look() {
    Lack lack;
    lack.is_set = lack.has_failed = true;
    return lack;
}

// The streams of the other nodes; `count_of(node)`: tokens of that one.
template <class Count>
EP_DEVICE algo::RowStream deal_nodes(algo::Warp warp, const RailLink& link, RoleWarp self, const Count& count_of) {
    const auto node_at = [&](int idx) { return (link.node() + 1 + idx) % link.num_nodes(); };
    return algo::deal_peers(warp, self.idx, self.count, link.num_nodes() - 1, node_at, count_of);
}

// The warp serves its streams to the end: all lanes call `look(node, position)` for the next token, and when no lane lacks
// anything, `serve(node, position, count)`, which is false when it gives up. False: that, or a wait failed.
template <class Look, class Serve>
EP_DEVICE bool serve_tokens(algo::Warp warp, const RailLink& link, algo::RowStream stream, const Look& look,
                            const Serve& serve) {
    warp.expect();
    constexpr int kPollsBetweenChecks = 16;
    uint64_t start_ns = 0;
    for (int polls = 0;;) {
        uint32_t rest = __ballot_sync(kFullMask, stream.next < stream.count);
        if (rest == 0) return true;
        bool has_served = false;
        Lack lack;  // of the first stream that this lane lacks something of
        for (; rest != 0; rest &= rest - 1) {
            const int lane = __ffs(static_cast<int>(rest)) - 1;
            const int node = __shfl_sync(kFullMask, stream.peer, lane);
            const int position = __shfl_sync(kFullMask, stream.next, lane);
            const int count = __shfl_sync(kFullMask, stream.count, lane);
            const Lack here = look(node, position);
            if (here.is_set && !lack.is_set) lack = here;
            if (!__all_sync(kFullMask, !here.has_failed)) return false;
            if (!algo::all(warp, !here.is_set)) continue;
            if (!serve(node, position, count)) return false;
            if (warp.thread_rank() == lane) stream.next += stream.step;
            has_served = true;
        }
        if (has_served) {
            polls = 0;
            start_ns = 0;
            continue;
        }
        bool may_wait = true;
        if (++polls % kPollsBetweenChecks == 0) {  // not at once: as in serve_streams_at()
            if (start_ns == 0) start_ns = prim::clock_ns();
            if (lack.is_set) may_wait = link.may_go_on(lack.site, start_ns, lack.expected, lack.seen);
        }
        if (!__all_sync(kFullMask, may_wait)) return false;
        prim::pause();
    }
}

// -- Streams inside the node ------------------------------------------------------------------------------------------

// The warp serves the rows between this rank and its neighbours to the end, unless they need no slots (`is_lent`): a stream for each
// rank of any node that is not on this rank's rail. `test(rank, position)`: what has to be there for the row that
// `serve(rank, position, count, row)` moves; `row` is its place among all that `rows` has here.
template <class Test, class Serve>
EP_DEVICE bool serve_neighbours(algo::Warp warp, const RailLink& link, Stage stage, RoleWarp self, const RowMap& rows,
                                bool is_lent, const Test& test, const Serve& serve) {
    const algo::Heap& heap = link.watch().heap;
    const int num_others = heap.num_ranks() - 1;
    const auto rank_at = [&](int idx) {
        const int node = (link.node() + idx / num_others) % heap.num_nodes();
        return node * heap.num_ranks() + (heap.rank() + 1 + idx % num_others) % heap.num_ranks();
    };
    const algo::RowStream stream =
        algo::deal_peers(warp, self.idx, self.count, num_others * heap.num_nodes(), rank_at,
                         [&](int rank) { return is_lent ? 0 : rows.num_rows(rank, heap.rank()); });
    const auto site = [&](int rank) { return algo::WaitSite{stage, rank % heap.num_ranks()}; };
    return algo::serve_streams_at(warp, link.watch(), site, stream, test, [&](int rank, int position, int count) {
        serve(rank, position, count, static_cast<int64_t>(rows.first_row(rank, heap.rank())) + position);
    });
}

// -- Roles -----------------------------------------------------------------------------------------------------------

// In every block: warps that go through this rank's tokens, then those that forward, then those that serve streams inside the
// node. Each has one, `num_own` and `num_streams` warps of a block the first and the last.
template <class Params, class Own, class Forward, class Streams>
EP_DEVICE bool run_role(const Params& p, int num_own, int num_streams, const Own& own, const Forward& forward,
                        const Streams& streams) {
    const int num_forward = p.rail.num_forward_warps;
    const int warp_idx = prim::warp_idx();
    if (warp_idx < num_own) return own(role_warp(p.geometry, warp_idx, num_own));
    if (warp_idx < num_own + num_forward) return forward(role_warp(p.geometry, warp_idx - num_own, num_forward));
    return streams(role_warp(p.geometry, warp_idx - num_own - num_forward, num_streams));
}

// What is the same in the operations of both kernels; see CallSession.
template <class Operation, class Params, class Shared> struct RoleOperation : CallOperation<Operation, Params, Shared> {
    static constexpr int kMinBlocks = 1;

    // The rail is entered after the node. `is_first`: the call's first launch, which announces it.
    static EP_DEVICE bool open_rail(algo::Warp warp, const Params& p, const algo::Watch& watch, bool is_first) {
        const RailLink link(p.rail, watch);
        if (is_first && blockIdx.x == 0 && !link.announce(warp)) return false;
        if (!link.wait_for_banks(warp)) return false;
        if (p.may_lend && blockIdx.x == 0) algo::state_loan(warp, watch, p.loan);
        return true;
    }

    static EP_DEVICE void close(algo::Warp warp, const Params& p, const algo::Watch& watch, bool has_failed) {
        const RailLink link(p.rail, watch);
        if (has_failed || !link.tell_end(warp)) link.tell_failure(warp);
    }
};

// `num_stream_warps`: of the role that serves streams inside the node, see can_serve().
template <class Kernel>
void launch_roles(const char* operation, const char* name, const typename Kernel::Params& params, int num_stream_warps,
                  dev::Stream stream) {
    const Geometry& geometry = params.geometry;
    EP_ENSURE(can_serve(params.heap, geometry, params.rail, num_stream_warps, params.loan.x != 0), operation,
              " across nodes has too few warps for its streams");
    dev::LaunchConfig config;
    config.num_blocks = geometry.num_blocks;
    config.num_threads =
        prim::kWarpSize * (geometry.num_send_warps + params.rail.num_forward_warps + geometry.num_recv_warps);
    config.is_cooperative = true;
    config.name = name;
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode
