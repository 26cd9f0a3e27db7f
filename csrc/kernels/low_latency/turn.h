// How a launch of a low-latency kernel begins and ends: the order in which its blocks begin, the bank that must be free,
// which of them receive, who does which share of that, and who counts the launch.
#pragma once

#include "kernels/low_latency/frame.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

// What the block knows of its launch; shared memory.
struct Block {
    int is_ready;  // zero: some rank has given up, do nothing
    int is_first;  // this block began before all others of its grid
    int receives;  // it takes part in the receive phase
    int share;     // its current part of that
    // Of this launch, after a barrier. Context::turn is right only in a warp that has begun before the launch was counted:
    // in a receive phase of its own another warp than the last may be later.
    layout::LowLatencyTurn* turn;
    // A bit for each rank: masked when this block had waited for the bank. Nothing is sent to it: it may still read.
    uint32_t left_out[(layout::kMaxRanks + 31) / 32];

    EP_DEVICE bool leaves_out(const LowLatencyCall& call, int peer) const {
        return call.is_shrinkable && (left_out[peer / 32] >> peer % 32 & 1u) != 0;
    }
};

// One warp of the block that began first: tells the peers which calls this rank has received in earlier launches, so that
// the banks may be written again. Never after a wait for what a peer does once it has begun: the peer may wait for this.
EP_DEVICE void publish_ended(const Context& c) {
    constexpr int kNumBanks = layout::kNumLowLatencyBanks;
#pragma unroll 1
    for (int i = prim::lane_idx(); i < c.num_ranks() * kNumBanks; i += kWarpSize) {
        const int bank = i % kNumBanks;
        if (is_masked(c.call, i / kNumBanks)) continue;
        const uint64_t ended = prim::load<Order::kRelaxed, Scope::kGpu>(&c.watch.words.local->low_latency_ended[bank]);
        // Release: the reads of an earlier launch. Pairs with: is_bank_free at the peer.
        prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.received(i / kNumBanks, bank, c.rank()), ended);
    }
}

// This lane; acquire. `peer` has read what this rank sent it in the bank's last use, two calls ago.
EP_DEVICE bool is_bank_free(const Context& c, int peer) {
    if (c.watch.call <= layout::kNumLowLatencyBanks) return true;
    const uint64_t received = prim::load<Order::kAcquire, Scope::kSys>(c.watch.heap.received(c.rank(), c.bank, peer));
    return received + layout::kNumLowLatencyBanks >= c.watch.call;
}

// One thread. The host refuses to open a call while this rank still has another one open in the bank. It does not see calls
// of a graph that is replayed: those fail here, and do not wait for themselves.
EP_DEVICE_COLD void refuse_open_bank(algo::Watch watch, uint64_t needed) {
    const uint64_t ended =
        prim::load<Order::kRelaxed, Scope::kGpu>(&watch.words.local->low_latency_ended[bank_of(needed)]);
    if (ended < needed)
        algo::fail(watch, layout::FailureKind::kBadInput, {Stage::kOpen, watch.heap.rank()}, needed, ended, 0);
}

// Warp 0. False: some rank has given up.
EP_DEVICE bool wait_for_bank(const Context& c) {
    if (prim::lane_idx() == 0 && c.watch.call > layout::kNumLowLatencyBanks)
        refuse_open_bank(c.watch, c.watch.call - layout::kNumLowLatencyBanks);
#pragma unroll 1
    for (int peer = prim::lane_idx(); peer < c.num_ranks(); peer += kWarpSize)
        if (c.watch.call > layout::kNumLowLatencyBanks)
            wait_for_peer(&c.call, c.watch, Stage::kStart, peer, c.watch.heap.received(c.rank(), c.bank, peer),
                          c.watch.call - layout::kNumLowLatencyBanks, ~uint64_t{0});
    return __all_sync(kFullMask, algo::may_go_on(c.watch, {Stage::kStart, c.rank()}, prim::clock_ns(), 0, 0)) != 0;
}

// Warp 0.
EP_DEVICE void note_masks(const Context& c, Block* block) {
#pragma unroll 1
    for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
        const int peer = first + prim::lane_idx();
        const uint32_t masks = __ballot_sync(kFullMask, peer < c.num_ranks() && is_masked(c.call, peer));
        if (prim::lane_idx() == 0) block->left_out[first / kWarpSize] = masks;
    }
}

// All threads of a block that sends: notes the order in which blocks begin, and waits until no peer reads this bank. What
// was loaded by then is under way all the while.
EP_DEVICE void begin_send(const Context& c, Block* block) {
    if (prim::warp_idx() == 0) {
        uint32_t order = 0;
        if (prim::lane_idx() == 0) order = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.turn->begun_blocks, 1u);
        bool may_go_on = algo::abort_code(c.watch) == 0;
#pragma unroll 1
        for (int peer = prim::lane_idx(); peer < c.num_ranks(); peer += kWarpSize) may_go_on &= is_bank_free(c, peer);
        bool is_ready = __all_sync(kFullMask, may_go_on) != 0;
        const bool is_first = __shfl_sync(kFullMask, order, 0) == 0;
        if (is_first)
#pragma unroll 1
            for (int peer = prim::lane_idx(); peer < c.num_ranks(); peer += kWarpSize)
                if (!is_masked(c.call, peer))
                    prim::store<Order::kRelaxed, Scope::kSys>(c.watch.heap.low_latency_started(peer, c.rank()),
                                                              c.watch.call);
        if (!is_ready) {
            if (is_first) publish_ended(c);
            is_ready = wait_for_bank(c);
        }
        if (c.call.is_shrinkable) note_masks(c, block);
        if (prim::lane_idx() == 0) {
            block->is_ready = is_ready ? 1 : 0;
            block->is_first = is_first ? 1 : 0;
            block->turn = c.turn;
        }
    }
    __syncthreads();  // each lane's acquire, the block's stores
}

// All threads of the block that has written our table into the messages to all ranks: they may read it.
EP_DEVICE void publish_table(const Context& c, const Block* block, int num_tokens) {
    for (int peer = first_of_block(); peer < c.num_ranks(); peer += step_of_block())
        if (!block->leaves_out(c.call, peer))
            *reinterpret_cast<int*>(c.message(peer, c.rank()) + c.call.message.num_tokens.offset) = num_tokens;
    __syncthreads();
    // Release: the tables. Pairs with: wait_for_table at the peer.
    for (int peer = first_of_block(); peer < c.num_ranks(); peer += step_of_block())
        if (!block->leaves_out(c.call, peer))
            prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.table_full(peer, c.bank, c.rank()), c.watch.call);
}

// One thread: counts the launch, for the next one.
EP_DEVICE void count_launch(const Context& c) {
    layout::LocalState* local = c.watch.words.local;
    layout::LowLatencyTurn* next = &local->low_latency_turns[c.turn == &local->low_latency_turns[0] ? 1 : 0];
    prim::store<Order::kRelaxed, Scope::kGpu>(&next->begun_blocks, 0u);
    prim::store<Order::kRelaxed, Scope::kGpu>(&next->settled_blocks, 0u);
    prim::store<Order::kRelaxed, Scope::kGpu>(&next->next_share, 0u);
    prim::store<Order::kRelaxed, Scope::kGpu>(&next->spoiled_pieces, 0u);
    prim::store<Order::kRelaxed, Scope::kGpu>(&next->lists, 0u);
    if (c.sends()) prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_sends, c.watch.call);
    if (c.phase == Phase::kSend) prim::store<Order::kRelaxed, Scope::kGpu>(c.call.number, c.watch.call);
    if (c.receives()) prim::store<Order::kRelaxed, Scope::kGpu>(&local->low_latency_ended[c.bank], c.watch.call);
    const uint64_t launches = prim::load<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_launches);
    prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_launches, launches + 1);
}

EP_DEVICE bool is_last_warp() { return prim::warp_idx() == num_warps() - 1; }

// The last warp, when its block has read the counters that count_launch changes, and after publish_ended: nothing
// of this launch looks at what the last one to settle changes, and the end of the launch publishes it, so no order is
// needed.
EP_DEVICE void settle(const Context& c) {
    __syncwarp();  // every lane has looked at them
    if (prim::lane_idx() == 0 &&
        prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.turn->settled_blocks, 1u) + 1 == gridDim.x)
        count_launch(c);
}

// One thread: have all blocks of this launch begun? A block with little to send asks early, so it asks a few times: whoever
// leaves makes another block do two shares, one after the other.
EP_DEVICE bool have_all_begun(const Context& c) {
    constexpr int kMostLooks = 8;
#pragma unroll 1
    for (int looks = 0; looks < kMostLooks; ++looks)
        if (prim::load<Order::kRelaxed, Scope::kGpu>(&c.turn->begun_blocks) == gridDim.x) return true;
    return false;
}

// All threads of a block that has sent. In a launch of both phases a block may wait for rows of its own rank only when
// all blocks have begun: one that has not may never get an SM otherwise. Blocks that come too early leave, and whoever
// is there later does their part. In a call that has failed no wait lasts, and what does not come is spoiled.
EP_DEVICE void end_send(const Context& c, Block* block) {
    if (is_last_warp()) settle(c);
    // Another warp than that, and than warp 0, which is busy with releases; a block may have but one.
    if (threadIdx.x == (blockDim.x > kWarpSize ? kWarpSize : 0)) {
        const bool receives = c.receives() && (block->is_ready == 0 || have_all_begun(c));
        block->receives = receives ? 1 : 0;
        if (receives)
            block->share = static_cast<int>(prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.turn->next_share, 1u));
    }
    __syncthreads();
}

// All threads of a block that only receives. The last warp is the least likely to have a unit.
EP_DEVICE void begin_receive(const Context& c, Block* block) {
    // No other warp depends on a counter that this changes.
    if (!is_last_warp()) return;
    uint32_t order = 0;
    if (prim::lane_idx() == 0) order = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.turn->begun_blocks, 1u);
    if (prim::lane_idx() == 0) block->turn = c.turn;
    if (__shfl_sync(kFullMask, order, 0) == 0) publish_ended(c);
    settle(c);
}

// All threads of the blocks that receive: `work(unit, is_first, draw)` for every unit below `num_units`, a warp for each, and
// at least once for every warp, so that it may have barriers the first time: then `unit` may be beyond. Work may call
// draw() when what it waited for has come: the next share is drawn then, while this one is still worked on. Not before:
// blocks that are still sending would find no share left, and this one would do two.
template <class Work> EP_DEVICE void for_each_unit(const Context& c, Block* block, int num_units, const Work& work) {
    bool is_first = true;
    if (c.phase == Phase::kReceive) {
        const int num_blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
        for (int unit = prim::warp_idx() * num_blocks + static_cast<int>(blockIdx.x); is_first || unit < num_units;
             unit += num_blocks * num_warps(), is_first = false)
            work(unit, is_first, [] {});
        return;
    }
#pragma unroll 1
    for (int share = block->share; share * num_warps() < num_units; share = block->share, is_first = false) {
        uint32_t next = 0;
        bool is_drawn = false;
        const auto draw = [&] {
            if (threadIdx.x == 0 && !is_drawn)
                next = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.turn->next_share, 1u);
            is_drawn = true;
        };
        const int unit = share * num_warps() + prim::warp_idx();
        if (is_first || unit < num_units) work(unit, is_first, draw);
        draw();
        __syncthreads();  // everybody knows the share before
        if (threadIdx.x == 0) block->share = static_cast<int>(next);
        __syncthreads();
    }
}

// How many warps share one of `num_items`, so that all warps of the grid have work; at most `most`.
EP_DEVICE int warps_for_item(int num_items, int most) {
    const int wanted = num_items > 0 ? static_cast<int>(gridDim.x) * num_warps() / num_items : 1;
    return wanted < 1 ? 1 : wanted > most ? most : wanted;
}

// All threads of all blocks, last. The block that ends last adds the longest waits to the caller's statistics. Every
// block's atomics have returned when it counts itself, so no order is needed.
EP_DEVICE void add_statistics(const Context& c, Block* block) {
    if (!c.receives() || c.call.wait_stats == nullptr) return;
    __syncthreads();
    if (threadIdx.x == 0)
        block->share = static_cast<int>(
            prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.watch.words.local->low_latency_done_blocks, 1u));
    __syncthreads();
    if (block->share + 1 != static_cast<int>(gridDim.x)) return;
    if (threadIdx.x == 0) prim::store<Order::kRelaxed, Scope::kGpu>(&c.watch.words.local->low_latency_done_blocks, 0u);
    for (int peer = static_cast<int>(threadIdx.x); peer < c.num_ranks(); peer += static_cast<int>(blockDim.x)) {
        c.call.wait_stats[peer] +=
            static_cast<int64_t>(prim::load<Order::kRelaxed, Scope::kGpu>(&c.call.wait_ns[peer]));
        prim::store<Order::kRelaxed, Scope::kGpu>(&c.call.wait_ns[peer], uint64_t{0});
    }
}

// All threads of all blocks of a launch that only receives. Where a later call has begun already, the next one takes this
// bank: its send phase would wait until the peers have begun it too, were they told of this one's end only then. So the
// block that ends last tells them now.
EP_DEVICE void end_receive(const Context& c, uint64_t last_call, Block* block) {
    if (last_call == c.watch.call) return;
    __syncthreads();
    // Every block's reads, the last one's release.
    if (threadIdx.x == 0)
        block->share = static_cast<int>(
            prim::fetch_add<Order::kAcqRel, Scope::kGpu>(&c.watch.words.local->low_latency_read_blocks, 1u));
    __syncthreads();
    if (block->share + 1 != static_cast<int>(gridDim.x)) return;
    if (threadIdx.x == 0) prim::store<Order::kRelaxed, Scope::kGpu>(&c.watch.words.local->low_latency_read_blocks, 0u);
    // Pairs with: is_bank_free at the peer.
    for (int peer = first_of_block(); peer < c.num_ranks(); peer += step_of_block())
        if (!is_masked(c.call, peer))
            prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.received(peer, c.bank, c.rank()), c.watch.call);
}

// The kernels of an operation. With a hook its two launches are of the same one, so that a profiler has one name for the
// call; registers and instructions of a phase are its own all the same.
enum class Launches { kPhases, kWhole };

// All threads: what a launch does, by `send(context, block)` and `receive(context, block)`.
template <Launches kLaunches, bool kUsesPackets = false, class Send, class Receive>
EP_DEVICE void run_launch(const LowLatencyCall& call, layout::Operation operation, Block* block, const Send& send,
                          const Receive& receive) {
    if (kLaunches == Launches::kWhole) {
        const Context context = make_context(call, operation, Phase::kBoth, kUsesPackets);
        send(context, block);
        if (block->receives != 0) receive(context, block);
        add_statistics(context, block);
    } else if (call.phase == Phase::kSend) {
        send(make_context(call, operation, Phase::kSend, kUsesPackets), block);
    } else {
        const Context context = make_context(call, operation, Phase::kReceive, kUsesPackets);
        // Only send phases change it, and they come before or after the whole launch.
        const uint64_t last_call =
            prim::load<Order::kRelaxed, Scope::kGpu>(&context.watch.words.local->num_low_latency_sends);
        begin_receive(context, block);
        receive(context, block);
        end_receive(context, last_call, block);
        add_statistics(context, block);
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
