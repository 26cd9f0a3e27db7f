// One warp serves the tokens of several streams, each from or to a rank of another node. What a token needs may be many things
// at once, which the lanes look for; a stream that lacks something never holds up another.
#pragma once

#include "device/algo/ring.h"
#include "kernels/internode/rail_link.h"

namespace deep_ep::kernels::internode {
inline namespace EP_BACKEND {

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
EP_DEVICE algo::RowStream deal_nodes(algo::Warp warp, const RailLink& link, int warp_idx, int num_warps,
                                     const Count& count_of) {
    const auto node_at = [&](int idx) { return (link.node() + 1 + idx) % link.num_nodes(); };
    return algo::deal_peers(warp, warp_idx, num_warps, link.num_nodes() - 1, node_at, count_of);
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
        if (polls++ % kPollsBetweenChecks == 0) {
            if (start_ns == 0) start_ns = prim::clock_ns();
            if (lack.is_set) may_wait = link.may_go_on(lack.site, start_ns, lack.expected, lack.seen);
        }
        if (!__all_sync(kFullMask, may_wait)) return false;
        prim::pause();
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode
