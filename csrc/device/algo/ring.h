// Rows on their way from rank to rank: windows of slots with a flag for each slot, nothing to clear; streams of rows; and
// stages of shared memory for bulk copies.
//
// The row at `position` (counted per pair of ranks and call) lives in slot position % window of the receiver's region
// for that source. Two flags guard it, each holding a tag that grows from use to use:
//     full  (receiver's memory, written by the sender):   the row is there
//     empty (sender's memory, written by the receiver):   the row has been taken out; only where a later row needs the slot
#pragma once

#include "device/algo/group.h"
#include "device/algo/watch.h"
#include "layout/heap.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

struct FlagTest {
    const uint64_t* flag;  // null: nothing to wait for
    uint64_t expected;
};

// What says that a row is there, or taken out: stored with a release at system scope.
struct FlagMark {
    uint64_t* flag;
    uint64_t value;
};

// One pair of ranks, seen from one of them: addresses are worked out once, for all rows of the call.
class Port {
public:
    EP_DEVICE Port(uint8_t* slots, uint64_t* full, uint64_t* empty, const layout::WindowLayout& window, uint64_t call)
        : slots_(slots), full_(full), empty_(empty), window_(&window), call_(call) {}

    // Where the row at `position` is on its way: at the receiver.
    EP_DEVICE uint8_t* slot(int position) const {
        return slots_ + static_cast<uint64_t>(position % window_->window) * window_->slot_bytes;
    }

    // Sender: may the row go into its slot?
    EP_DEVICE FlagTest slot_is_free(int position) const {
        if (position < window_->window) return {nullptr, 0};
        return {empty_ + position % window_->window, tag(position - window_->window)};
    }
    // Sender, after the whole warp has written the slot and met in a sync().
    EP_DEVICE void publish(int position) const {
        const FlagMark mark = mark_here(position);
        // Pairs with: row_is_here at the receiver.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(mark.flag, mark.value);
    }
    EP_DEVICE FlagMark mark_here(int position) const { return {full_ + position % window_->window, tag(position)}; }

    // Receiver: has the row come?
    EP_DEVICE FlagTest row_is_here(int position) const { return {full_ + position % window_->window, tag(position)}; }
    // Receiver, after the whole warp has read the slot and met in a sync(). `num_rows`: of this sender, in all.
    EP_DEVICE void give_back(int position, int num_rows) const {
        if (!is_needed_again(position, num_rows)) return;
        const FlagMark mark = mark_free(position);
        // Pairs with: slot_is_free at the sender.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(mark.flag, mark.value);
    }
    EP_DEVICE FlagMark mark_free(int position) const { return {empty_ + position % window_->window, tag(position)}; }
    // Whether a later row of this call comes into the slot.
    EP_DEVICE bool is_needed_again(int position, int num_rows) const { return position + window_->window < num_rows; }

private:
    EP_DEVICE uint64_t tag(int position) const { return layout::make_tag(call_, static_cast<uint64_t>(position)); }

    uint8_t* slots_;
    uint64_t* full_;   // at the receiver
    uint64_t* empty_;  // at the sender
    const layout::WindowLayout* window_;
    uint64_t call_;
};

class Ring {
public:
    EP_DEVICE Ring(const Watch& watch, const layout::WindowLayout& window)
        : watch_(watch), window_(window), bank_(bank_of(watch.call)) {}

    EP_DEVICE Port to(int receiver) const { return port(watch_.heap.rank(), receiver, bank_, 0); }
    EP_DEVICE Port from(int sender) const { return port(sender, watch_.heap.rank(), bank_, 0); }
    // Across nodes: the stream of these two that belongs to a source (dispatch) or owner (combine) in `node`.
    EP_DEVICE Port to(int receiver, int node) const { return port(watch_.heap.rank(), receiver, group(node), node); }
    EP_DEVICE Port from(int sender, int node) const { return port(sender, watch_.heap.rank(), group(node), node); }

    // One look, no waiting; acquire. For what has mostly come already: one trip to memory.
    EP_DEVICE bool is_set(FlagTest test) const {
        return test.flag == nullptr || prim::load<prim::Order::kAcquire, prim::Scope::kSys>(test.flag) >= test.expected;
    }

    // Acquire. Other lanes may touch what the flag guards after a sync().
    EP_DEVICE bool wait(layout::Stage stage, int peer, FlagTest test) const {
        return test.flag == nullptr || wait_at_least(watch_, {stage, peer}, test.flag, test.expected);
    }

private:
    EP_DEVICE int group(int node) const { return bank_ * watch_.heap.num_nodes() + node; }
    EP_DEVICE Port port(int sender, int receiver, int group, int node) const {
        return {watch_.heap.slot(receiver, window_, bank_, sender, 0, node),
                watch_.heap.full(receiver, group, sender, 0), watch_.heap.empty(sender, group, receiver, 0), window_,
                watch_.call};
    }

    const Watch& watch_;
    const layout::WindowLayout& window_;
    int bank_;
};

// -- One warp serves several streams of rows -------------------------------------------------------------------------
// Each goes from or to another rank, and the warp never blocks on one of them: a stream that stands still must not hold up
// another, or ranks could wait for each other in a circle.

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
            // Not at once: the word that it looks at is the same for all warps, and a GPU looks at a word of the host's memory
            // for one warp after the other.
            if (has_row && ++polls % kPollsBetweenChecks == 0) {
                if (start_ns == 0) start_ns = prim::clock_ns();
                may_wait = may_go_on(watch, site_of(stream.peer), start_ns, flag.expected, seen);
            }
            if (!__all_sync(prim::kFullMask, may_wait)) return false;
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

// -- One warp's ring of shared-memory stages: what bulk loads have under way, and what bulk stores are taken from ----
// Item n (counted by the warp from 0) uses stage n % num_stages. The warp keeps the order: a stage is loaded again only
// after the stores from it have been read (bulk_wait_read by the threads that issued them), and after every lane that
// read it has called fence_async_shared and met the loading lane in a __syncwarp. A lane that writes to a stage calls
// fence_async_shared before the __syncwarp that leads to a bulk store from it.

// Every lane that reads the stage, and the lane that stores from it.
//
// The one wait without a deadline: it waits for no peer, only for loads that this warp has issued, which land or break the
// context, and then every wait of the host ends. A block may not leave earlier, because what lands after its end would
// land in the shared memory of the next one. A wait for what nobody has loaded is a bug; the executor reports it.
EP_DEVICE void wait_mbarrier(prim::MBarrier* bar, uint32_t phase_parity) {
    while (!prim::mbarrier_try_wait(bar, phase_parity)) {
    }
}

// A place in the order of items: its stage, and the parity of its use of it. Going on costs no division.
class StageCursor {
public:
    EP_DEVICE int stage() const { return stage_; }
    EP_DEVICE uint32_t parity() const { return parity_; }
    EP_DEVICE void advance(int num_stages) {
        if (++stage_ < num_stages) return;
        stage_ = 0;
        parity_ ^= 1;
    }

private:
    int stage_ = 0;
    uint32_t parity_ = 0;
};

class Stages {
public:
    // `memory`: staging.bytes() of dynamic shared memory, this warp's alone, 16-byte aligned.
    EP_DEVICE Stages(uint8_t* memory, const layout::Staging& staging) : memory_(memory), staging_(staging) {}

    // Once, before anything else.
    EP_DEVICE void init(Warp warp) const {
        warp.expect();
        if (warp.thread_rank() == 0) {
            for (int stage = 0; stage < staging_.num_stages; ++stage) prim::mbarrier_init(barrier(stage), 1);
            prim::mbarrier_init_fence();
        }
        warp.sync();
    }

    // For warps that store from their stages: before item n is stored, item n + num_ahead() may be loaded, once every
    // thread that stores has called wait_reusable(). With three stages or more the latest stores may still be read.
    EP_DEVICE int num_ahead() const { return staging_.num_stages > 2 ? staging_.num_stages - 2 : 1; }
    EP_DEVICE void wait_reusable() const {
        if (staging_.num_stages > 2)
            prim::bulk_wait_read<1>();
        else
            prim::bulk_wait_read<0>();
    }

    EP_DEVICE uint8_t* at(int item) const { return memory_ + staging_.stage_offset(item % staging_.num_stages); }

    EP_DEVICE uint8_t* at(const StageCursor& item) const { return memory_ + staging_.stage_offset(item.stage()); }

    // One lane, always the same.
    EP_DEVICE void load(int item, const void* source, uint32_t bytes) const {
        load_stage(item % staging_.num_stages, source, bytes);
    }
    EP_DEVICE void load(const StageCursor& item, const void* source, uint32_t bytes) const {
        load_stage(item.stage(), source, bytes);
    }

    // True once the load of `item` has landed; every item is waited for, in order.
    EP_DEVICE void wait(int item) const {
        wait_mbarrier(barrier(item % staging_.num_stages), static_cast<uint32_t>(item / staging_.num_stages) & 1);
    }
    EP_DEVICE void wait(const StageCursor& item) const { wait_mbarrier(barrier(item.stage()), item.parity()); }

private:
    EP_DEVICE void load_stage(int stage, const void* source, uint32_t bytes) const {
        prim::MBarrier* bar = barrier(stage);
        prim::mbarrier_arrive_expect_tx(bar, bytes);
        prim::bulk_load(memory_ + staging_.stage_offset(stage), source, bytes, bar);
    }
    EP_DEVICE prim::MBarrier* barrier(int stage) const {
        return reinterpret_cast<prim::MBarrier*>(memory_ + staging_.barrier_offset(stage));
    }

    uint8_t* memory_;
    layout::Staging staging_;
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
