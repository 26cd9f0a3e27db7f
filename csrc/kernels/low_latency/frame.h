// What the two low-latency kernels share: numbering calls, waiting for a peer that may be left out, where things are in
// a message, how a launch begins and ends, and how its receive phase is shared out.
#pragma once

#include "device/algo/watch.h"
#include "kernels/context.h"
#include "kernels/params_low_latency.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Order;
using prim::Scope;
using prim::Vec16;

struct Context {
    const LowLatencyCall& call;
    algo::Watch watch;
    Phase phase;                   // that of the kernel: each has one of its own, with less code and fewer registers
    layout::LowLatencyTurn* turn;  // of this launch
    int bank;

    EP_DEVICE int rank() const { return watch.heap.rank(); }
    EP_DEVICE int num_ranks() const { return watch.heap.num_ranks(); }
    EP_DEVICE int num_local_experts() const { return call.num_local_experts; }
    EP_DEVICE int first_expert() const { return rank() * num_local_experts(); }
    EP_DEVICE int num_rows_of_expert() const { return num_ranks() * call.num_max_tokens; }
    // Every launch sends, or receives, or both.
    EP_DEVICE bool sends() const { return phase != Phase::kReceive; }
    EP_DEVICE bool receives() const { return phase != Phase::kSend; }
    // The message that `source` has written (or is writing) into `owner`'s memory.
    EP_DEVICE uint8_t* message(int owner, int source) const {
        return watch.heap.at(owner, call.data_offset + call.message.offset(call.data_bytes, bank, source));
    }
    EP_DEVICE uint8_t* slot(int owner, int source, int token) const {
        return message(owner, source) + call.message.slots.at(token);
    }
    EP_DEVICE const int* table(int source) const {
        return reinterpret_cast<const int*>(message(rank(), source) + call.message.topk_idx.offset);
    }
    EP_DEVICE const float* weight_table(int source) const {
        return reinterpret_cast<const float*>(message(rank(), source) + call.message.topk_weights.offset);
    }
    // Rows that `source` has for each of our experts.
    EP_DEVICE const int* row_counts(int source) const {
        return reinterpret_cast<const int*>(message(rank(), source) + call.message.num_rows.offset);
    }
    EP_DEVICE int num_tokens_of(int source) const {
        return *reinterpret_cast<const int*>(message(rank(), source) + call.message.num_tokens.offset);
    }
};

EP_DEVICE int bank_of(uint64_t call) { return static_cast<int>(call % layout::kNumLowLatencyBanks); }

// The call that this launch works on. Send phases count calls; a receive phase looks `lag` calls back. Device
// counters, not host numbers: a CUDA graph replays its launches, and every replay is a new call.
EP_DEVICE uint64_t call_number(const LowLatencyCall& call, Phase phase) {
    const uint64_t sent = prim::load<Order::kRelaxed, Scope::kGpu>(&call.watch.local->num_low_latency_sends);
    return phase == Phase::kReceive ? sent - call.lag : sent + 1;
}

EP_DEVICE layout::LowLatencyTurn* current_turn(const LowLatencyCall& call) {
    const uint64_t launch = prim::load<Order::kRelaxed, Scope::kGpu>(&call.watch.local->num_low_latency_launches);
    return &call.watch.local->low_latency_turns[launch % 2];
}

EP_DEVICE bool is_masked(const LowLatencyCall& call, int peer) {
    return call.is_shrinkable && prim::load<Order::kRelaxed, Scope::kGpu>(&call.masked[peer]) != 0;
}

// Waits that do not end at the first look are calls: their code, many times inlined, would fill the instruction cache.

// One thread; acquire. False: do without the peer, because it is masked, or has just been, or the call is aborted.
EP_DEVICE_COLD bool wait_for_peer(const LowLatencyCall* call, algo::Watch watch, Stage stage, int peer,
                                  const uint64_t* flag, uint64_t expected) {
    if (is_masked(*call, peer)) return false;
    const auto on_timeout = call->is_shrinkable ? algo::OnTimeout::kGiveUp : algo::OnTimeout::kFail;
    if (algo::wait_at_least(watch, {stage, peer}, flag, expected, on_timeout)) return true;
    if (call->is_shrinkable) prim::store<Order::kRelaxed, Scope::kGpu>(&call->masked[peer], 1);
    return false;
}

// The longest wait for each source shows which rank is slow.
EP_DEVICE void note_wait(const LowLatencyCall& call, int source, uint64_t waited_ns) {
    if (call.wait_stats == nullptr) return;
    uint64_t* longest = &call.wait_ns[source];
    uint64_t seen = prim::load<Order::kRelaxed, Scope::kGpu>(longest);
    while (seen < waited_ns) {
        const uint64_t old = prim::compare_swap<Order::kRelaxed, Scope::kGpu>(longest, seen, waited_ns);
        if (old == seen) break;
        seen = old;
    }
}

// As wait_for_peer, and notes how long it took.
EP_DEVICE_COLD bool wait_for_late_source(const LowLatencyCall* call, algo::Watch watch, Stage stage, int source,
                                         const uint64_t* flag) {
    const uint64_t start_ns = prim::clock_ns();
    const bool is_here = wait_for_peer(call, watch, stage, source, flag, watch.call);
    note_wait(*call, source, prim::clock_ns() - start_ns);
    return is_here;
}

// One thread, one look; acquire.
EP_DEVICE bool is_set(const algo::Watch& watch, const uint64_t* flag) {
    return prim::load<Order::kAcquire, Scope::kSys>(flag) >= watch.call;
}

EP_DEVICE bool wait_for_source(const LowLatencyCall& call, const algo::Watch& watch, Stage stage, int source,
                               const uint64_t* flag) {
    return is_set(watch, flag) || wait_for_late_source(&call, watch, stage, source, flag);
}

// One thread; acquire: does the routing table of `source` count in this call? The same answer for every thread that asks.
// Where the source may be left out, it could come just as the deadline passes, or be masked already and come all the same:
// some warps would then count its rows and others not, and no row of any source would be where both expect it.
EP_DEVICE_COLD bool decide_on_table(const LowLatencyCall* call, algo::Watch watch, int source, const uint64_t* flag) {
    uint64_t* decision = &call->decisions[source];
    uint64_t seen = prim::load<Order::kRelaxed, Scope::kGpu>(decision);
    if (seen / 2 != watch.call) {
        const bool is_here = !is_masked(*call, source) && wait_for_source(*call, watch, Stage::kTable, source, flag);
        const uint64_t mine = watch.call * 2 + (is_here ? 1 : 0);
        // Whoever is first decides.
        const uint64_t old = prim::compare_swap<Order::kRelaxed, Scope::kGpu>(decision, seen, mine);
        seen = old == seen ? mine : old;
    }
    // Where the answer is yes the flag is there already; this thread acquires it for itself.
    return seen % 2 == 1 && wait_for_source(*call, watch, Stage::kTable, source, flag);
}

// One warp: what lane 0 has found out by a look or a wait, with acquire, holds for every lane.
EP_DEVICE bool as_lane_0_says(bool answer) {
    const int known = __shfl_sync(kFullMask, answer ? 1 : 0, 0);
    __syncwarp();  // one lane's acquire, every lane's reads
    return known != 0;
}

EP_DEVICE bool wait_for_table(const Context& c, int source) {
    const uint64_t* flag = c.watch.heap.table_full(c.rank(), c.bank, source);
    if (c.call.is_shrinkable) return decide_on_table(&c.call, c.watch, source, flag);
    return wait_for_source(c.call, c.watch, Stage::kTable, source, flag);
}

// What the block knows of its launch; shared memory.
struct Block {
    uint64_t call;
    layout::LowLatencyTurn* turn;
    int is_ready;  // zero: some rank has given up, do nothing
    int is_first;  // this block began before all others of its grid
    int receives;  // it takes part in the receive phase
    int share;     // its current part of that
};

// One warp of the block that began first: tells the peers which calls this rank has received in earlier launches, so that
// the banks may be written again. Never after a wait for what a peer does once it has begun: the peer may wait for this.
EP_DEVICE void publish_ended(const Context& c) {
    constexpr int kNumBanks = layout::kNumLowLatencyBanks;
#pragma unroll 1
    for (int i = prim::lane_idx(); i < c.num_ranks() * kNumBanks; i += kWarpSize) {
        const int bank = i % kNumBanks;
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

// Warp 0. False: some rank has given up.
EP_DEVICE bool wait_for_bank(const Context& c) {
#pragma unroll 1
    for (int peer = prim::lane_idx(); peer < c.num_ranks(); peer += kWarpSize)
        if (c.watch.call > layout::kNumLowLatencyBanks)
            wait_for_peer(&c.call, c.watch, Stage::kStart, peer, c.watch.heap.received(c.rank(), c.bank, peer),
                          c.watch.call - layout::kNumLowLatencyBanks);
    return __all_sync(kFullMask, algo::may_go_on(c.watch, {Stage::kStart, c.rank()}, prim::clock_ns(), 0, 0)) != 0;
}

EP_DEVICE Context make_context(const LowLatencyCall& call, layout::Operation operation, Phase phase) {
    const uint64_t number = call_number(call, phase);
    return {call,
            {make_watch_words(call.watch), make_heap(call.heap), operation, number},
            phase,
            current_turn(call),
            bank_of(number)};
}

// All threads of a block that sends: notes the order in which blocks begin, and waits until no peer reads this bank. What
// was loaded by then is under way all the while. Numbers go on through shared memory: kept in registers from the first
// instruction on, they would be spilled there, and the spill waits for the load.
EP_DEVICE void begin_send(Context& c, Block* block) {
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
                prim::store<Order::kRelaxed, Scope::kSys>(c.watch.heap.low_latency_started(peer, c.rank()),
                                                          c.watch.call);
        if (!is_ready) {
            if (is_first) publish_ended(c);
            is_ready = wait_for_bank(c);
        }
        if (prim::lane_idx() == 0) {
            block->call = c.watch.call;
            block->turn = c.turn;
            block->is_ready = is_ready ? 1 : 0;
            block->is_first = is_first ? 1 : 0;
        }
    }
    __syncthreads();  // each lane's acquire, the block's stores
    c.watch.call = block->call;
    c.turn = block->turn;
    c.bank = bank_of(c.watch.call);
}

// One thread: counts the launch, for the next one.
EP_DEVICE void count_launch(const Context& c) {
    layout::LocalState* local = c.watch.words.local;
    layout::LowLatencyTurn* next = &local->low_latency_turns[c.turn == &local->low_latency_turns[0] ? 1 : 0];
    prim::store<Order::kRelaxed, Scope::kGpu>(&next->begun_blocks, 0u);
    prim::store<Order::kRelaxed, Scope::kGpu>(&next->settled_blocks, 0u);
    prim::store<Order::kRelaxed, Scope::kGpu>(&next->next_share, 0u);
    if (c.sends()) prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_sends, c.watch.call);
    if (c.receives()) prim::store<Order::kRelaxed, Scope::kGpu>(&local->low_latency_ended[c.bank], c.watch.call);
    const uint64_t launches = prim::load<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_launches);
    prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_launches, launches + 1);
}

EP_DEVICE bool is_last_warp() {
    return static_cast<int>(threadIdx.x) / kWarpSize == static_cast<int>(blockDim.x) / kWarpSize - 1;
}

// The last warp, when its block has read the counters that count_launch changes, and after publish_ended: nothing
// of this launch looks at what the last one to settle changes, and the end of the launch publishes it, so no order is
// needed.
EP_DEVICE void settle(const Context& c) {
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
// is there later does their part.
EP_DEVICE void end_send(const Context& c, Block* block) {
    if (is_last_warp()) settle(c);
    // Another warp than that, and than warp 0, which is busy with releases; a block may have but one.
    if (threadIdx.x == (blockDim.x > kWarpSize ? kWarpSize : 0)) {
        bool receives = c.receives() && block->is_ready != 0;
        if (receives) receives = have_all_begun(c);
        block->receives = receives ? 1 : 0;
        if (receives)
            block->share = static_cast<int>(prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.turn->next_share, 1u));
    }
    __syncthreads();
}

// All threads of a block that only receives. The last warp is the least likely to have a unit.
EP_DEVICE void begin_receive(const Context& c) {
    // No other warp depends on a counter that this changes.
    if (!is_last_warp()) return;
    uint32_t order = 0;
    if (prim::lane_idx() == 0) order = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.turn->begun_blocks, 1u);
    if (__shfl_sync(kFullMask, order, 0) == 0) publish_ended(c);
    settle(c);
}

// All threads of the blocks that receive: `work(unit, is_first, draw)` for every unit below `num_units`, a warp for each, and
// at least once for every warp, so that it may have barriers the first time: then `unit` may be beyond. Work may call
// draw() when what it waited for has come: the next share is drawn then, while this one is still worked on. Not before:
// blocks that are still sending would find no share left, and this one would do two.
template <class Work> EP_DEVICE void for_each_unit(const Context& c, Block* block, int num_units, const Work& work) {
    const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
    bool is_first = true;
    if (c.phase == Phase::kReceive) {
        const int num_blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
        for (int unit = prim::warp_idx() * num_blocks + static_cast<int>(blockIdx.x); is_first || unit < num_units;
             unit += num_blocks * num_warps, is_first = false)
            work(unit, is_first, [] {});
        return;
    }
#pragma unroll 1
    for (int share = block->share; share * num_warps < num_units; share = block->share, is_first = false) {
        uint32_t next = 0;
        bool is_drawn = false;
        const auto draw = [&] {
            if (threadIdx.x == 0 && !is_drawn)
                next = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.turn->next_share, 1u);
            is_drawn = true;
        };
        const int unit = share * num_warps + prim::warp_idx();
        if (is_first || unit < num_units) work(unit, is_first, draw);
        draw();
        __syncthreads();  // everybody knows the share before
        if (threadIdx.x == 0) block->share = static_cast<int>(next);
        __syncthreads();
    }
}

// How many warps share one of `num_items`, so that all warps of the grid have work; at most `most`.
EP_DEVICE int warps_for_item(int num_items, int most) {
    const int num_warps = static_cast<int>(gridDim.x * blockDim.x) / kWarpSize;
    const int wanted = num_items > 0 ? num_warps / num_items : 1;
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

// -1 where the id is none of an expert, whatever the low half of a 64-bit id says.
EP_DEVICE int checked_expert(const Context& c, int64_t id) {
    return id >= 0 && id < c.call.num_experts ? static_cast<int>(id) : -1;
}

// The expert as this rank counts its own; -1: it is none of them, or none at all.
EP_DEVICE int local_expert(const Context& c, int expert) {
    const int local = expert - c.first_expert();
    return local >= 0 && local < c.num_local_experts() ? local : -1;
}

// A caller's top-k ids, and how wide they are.
struct Ids {
    const void* ids;
    int bytes;

    // This lane's entry of the token, from `first_k` on; -1: there is none.
    EP_DEVICE int64_t load(const Context& c, int token, int first_k) const {
        const int k = first_k + prim::lane_idx();
        const bool is_one = k < c.call.num_topk;
        return is_one ? load_expert_id(ids, bytes, static_cast<int64_t>(token) * c.call.num_topk + k) : -1;
    }
};

// One warp: does this lane's rank, among 32 from `first_rank`, own one of the token's experts? `id`: this lane's of the
// first 32 entries.
EP_DEVICE bool is_destination(const Context& c, const Ids& ids, int64_t id, int token, int first_rank) {
    const int rank = first_rank + prim::lane_idx();
    bool is_found = false;
#pragma unroll 1
    for (int first = 0; first < c.call.num_topk; first += kWarpSize) {
        if (first > 0) id = ids.load(c, token, first);
        const int expert = checked_expert(c, id);
        const int owner = expert >= 0 ? expert / c.num_local_experts() : -1;
        const int count = c.call.num_topk - first < kWarpSize ? c.call.num_topk - first : kWarpSize;
#pragma unroll 1
        for (int lane = 0; lane < count; ++lane) is_found |= __shfl_sync(kFullMask, owner, lane) == rank;
    }
    return is_found && rank < c.num_ranks() && !is_masked(c.call, rank);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
