// One warp serves several streams of rows, each from or to another rank, and never blocks on one of them: a stream
// that stands still must not hold up another, or ranks could wait for each other in a circle.
#pragma once

#include "device/algo/group.h"
#include "device/algo/ring.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// Lane i of a warp holds the state of stream i; lanes without one hold an empty stream.
struct RowStream {
    int peer = 0;
    int next = 0;   // position of the next row
    int count = 0;  // rows in all
    int step = 1;   // more than 1 where several warps share the stream
};

// Deals `num_peers` peers to `num_warps` warps, of which this is number `warp_idx`: several warps to a peer, or several peers
// to a warp. `peer_at(i)` is the one that comes at place i.
template <class PeerAt, class Count>
EP_DEVICE RowStream deal_peers(Warp warp, int warp_idx, int num_warps, int num_peers, const PeerAt& peer_at,
                               const Count& count_of) {
    warp.expect();
    RowStream stream;
    if (num_peers == 0) return stream;
    const int warps_per_peer = num_warps / num_peers;
    const bool is_shared = warps_per_peer > 0;
    const int peer_idx = is_shared ? warp_idx % num_peers : warp_idx + warp.thread_rank() * num_warps;
    const bool has_stream =
        is_shared ? warp.thread_rank() == 0 && warp_idx < warps_per_peer * num_peers : peer_idx < num_peers;
    if (!has_stream) return stream;
    stream.peer = peer_at(peer_idx);
    stream.next = is_shared ? warp_idx / num_peers : 0;
    stream.step = is_shared ? warps_per_peer : 1;
    stream.count = count_of(stream.peer);
    return stream;
}

// The other ranks of `num_ranks`.
template <class Count>
EP_DEVICE RowStream deal_stream(Warp warp, int warp_idx, int num_warps, int rank, int num_ranks,
                                const Count& count_of) {
    const auto peer_at = [&](int idx) { return (rank + 1 + idx) % num_ranks; };  // every rank begins with another peer
    return deal_peers(warp, warp_idx, num_warps, num_ranks - 1, peer_at, count_of);
}

// Where every warp has one stream at most (warps >= peers): that stream, on every lane.
EP_DEVICE RowStream only_stream(Warp warp, const RowStream& stream) {
    warp.expect();
    return {__shfl_sync(prim::kFullMask, stream.peer, 0), __shfl_sync(prim::kFullMask, stream.next, 0),
            __shfl_sync(prim::kFullMask, stream.count, 0), __shfl_sync(prim::kFullMask, stream.step, 0)};
}

// Rows that a stream still has.
EP_DEVICE int num_rows_left(const RowStream& stream) {
    return stream.next < stream.count ? (stream.count - stream.next + stream.step - 1) / stream.step : 0;
}

// The warp serves its streams to the end: `test(peer, position)` says which flag the next row waits for, `site_of(peer)` what
// that is, and the whole warp calls `serve(peer, position, count)` once it is set. False: a wait failed.
template <class SiteOf, class Test, class Serve>
EP_DEVICE bool serve_streams_at(Warp warp, const Watch& watch, const SiteOf& site_of, RowStream stream,
                                const Test& test, const Serve& serve) {
    warp.expect();
    constexpr int kPollsBetweenChecks = 16;
    uint64_t start_ns = 0;
    for (int polls = 0;;) {
        const bool has_row = stream.next < stream.count;
        if (!__any_sync(prim::kFullMask, has_row)) return true;
        FlagTest flag{nullptr, 0};
        uint64_t seen = 0;
        if (has_row) {
            flag = test(stream.peer, stream.next);
            if (flag.flag != nullptr) seen = prim::load<prim::Order::kRelaxed, prim::Scope::kSys>(flag.flag);
        }
        const bool is_ready = has_row && seen >= flag.expected;
        if (is_ready && flag.flag != nullptr) prim::load<prim::Order::kAcquire, prim::Scope::kSys>(flag.flag);
        const uint32_t ready = __ballot_sync(prim::kFullMask, is_ready);
        if (ready == 0) {
            bool may_wait = true;
            if (has_row && polls % kPollsBetweenChecks == 0) {
                if (start_ns == 0) start_ns = prim::clock_ns();
                may_wait = may_go_on(watch, site_of(stream.peer), start_ns, flag.expected, seen);
            }
            if (!__all_sync(prim::kFullMask, may_wait)) return false;
            ++polls;
            prim::pause();
            continue;
        }
        polls = 0;
        start_ns = 0;
        warp.sync();  // one lane's acquire, every lane's accesses
        for (uint32_t rest = ready; rest != 0; rest &= rest - 1) {
            const int lane = __ffs(static_cast<int>(rest)) - 1;
            serve(__shfl_sync(prim::kFullMask, stream.peer, lane), __shfl_sync(prim::kFullMask, stream.next, lane),
                  __shfl_sync(prim::kFullMask, stream.count, lane));
        }
        if (is_ready) stream.next += stream.step;
    }
}

// Peers are ranks of this node.
template <class Test, class Serve>
EP_DEVICE bool serve_streams(Warp warp, const Watch& watch, layout::Stage stage, const RowStream& stream,
                             const Test& test, const Serve& serve) {
    return serve_streams_at(
        warp, watch,
        [&](int peer) {
            return WaitSite{stage, peer};
        },
        stream, test, serve);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
