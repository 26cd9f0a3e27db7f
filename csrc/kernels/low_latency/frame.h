// What the two low-latency kernels share: numbering calls, waiting for a peer that may be left out, where things are in
// a message, and how a call ends.
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
    const algo::Watch& watch;
    int bank;

    EP_DEVICE int rank() const { return watch.heap.rank(); }
    EP_DEVICE int num_ranks() const { return watch.heap.num_ranks(); }
    EP_DEVICE int num_local_experts() const { return call.num_experts / num_ranks(); }
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
    EP_DEVICE int num_tokens_of(int source) const {
        return *reinterpret_cast<const int*>(message(rank(), source) + call.message.num_tokens.offset);
    }
};

// The call that this launch works on. Send phases count calls; a receive phase looks `lag` calls back. Device
// counters, not host numbers: a CUDA graph replays its launches, and every replay is a new call.
EP_DEVICE uint64_t call_number(const LowLatencyCall& call) {
    const uint64_t sent = prim::load<Order::kRelaxed, Scope::kGpu>(&call.watch.local->num_low_latency_sends);
    return call.phase == Phase::kReceive ? sent - call.lag : sent + 1;
}

EP_DEVICE bool is_masked(const LowLatencyCall& call, int peer) {
    return call.is_shrinkable && prim::load<Order::kRelaxed, Scope::kGpu>(&call.masked[peer]) != 0;
}

// One thread; acquire. False: do without the peer, because it is masked, or has just been, or the call is aborted.
EP_DEVICE bool wait_for_peer(const Context& c, Stage stage, int peer, const uint64_t* flag, uint64_t expected) {
    if (is_masked(c.call, peer)) return false;
    const auto on_timeout = c.call.is_shrinkable ? algo::OnTimeout::kGiveUp : algo::OnTimeout::kFail;
    if (algo::wait_at_least(c.watch, {stage, peer}, flag, expected, on_timeout)) return true;
    if (c.call.is_shrinkable) prim::store<Order::kRelaxed, Scope::kGpu>(&c.call.masked[peer], 1);
    return false;
}

// The same, and notes how long it took: the longest wait for each source shows which rank is slow.
EP_DEVICE bool wait_for_source(const Context& c, Stage stage, int source, const uint64_t* flag) {
    if (prim::load<Order::kAcquire, Scope::kSys>(flag) >= c.watch.call) return true;
    const uint64_t start_ns = prim::clock_ns();
    const bool is_here = wait_for_peer(c, stage, source, flag, c.watch.call);
    const uint64_t waited_ns = prim::clock_ns() - start_ns;
    uint64_t* longest = &c.call.wait_ns[source];
    uint64_t seen = prim::load<Order::kRelaxed, Scope::kGpu>(longest);
    while (seen < waited_ns) {
        const uint64_t old = prim::compare_swap<Order::kRelaxed, Scope::kGpu>(longest, seen, waited_ns);
        if (old == seen) break;
        seen = old;
    }
    return is_here;
}

// One thread; acquire: does the routing table of `source` count in this call? The same answer for every thread that asks.
// Where the source may be left out, it could come just as the deadline passes, or be masked already and come all the same:
// some warps would then count its rows and others not, and no row of any source would be where both expect it.
EP_DEVICE bool wait_for_table(const Context& c, int source) {
    const uint64_t* flag = c.watch.heap.table_full(c.rank(), c.bank, source);
    if (!c.call.is_shrinkable) return wait_for_source(c, Stage::kTable, source, flag);
    uint64_t* decision = &c.call.decisions[source];
    uint64_t seen = prim::load<Order::kRelaxed, Scope::kGpu>(decision);
    if (seen / 2 != c.watch.call) {
        const bool is_here = !is_masked(c.call, source) && wait_for_source(c, Stage::kTable, source, flag);
        const uint64_t mine = c.watch.call * 2 + (is_here ? 1 : 0);
        // Whoever is first decides.
        const uint64_t old = prim::compare_swap<Order::kRelaxed, Scope::kGpu>(decision, seen, mine);
        seen = old == seen ? mine : old;
    }
    // Where the answer is yes the flag is there already; this thread acquires it for itself.
    return seen % 2 == 1 && wait_for_source(c, Stage::kTable, source, flag);
}

// What the block knows once it has begun; shared memory.
struct Beginning {
    int is_ready;  // zero: some rank has given up, do nothing
    int is_first;  // this block began before all others of its grid
};

// All threads of the block. Waits until no peer reads this call's bank any more: it was last used two calls ago.
EP_DEVICE void begin_send(const Context& c, Beginning* beginning) {
    if (prim::warp_idx() == 0) {
        int order = 0;
        if (prim::lane_idx() == 0)
            order = static_cast<int>(
                prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&c.watch.words.local->low_latency_begun_blocks, 1u));
        order = __shfl_sync(kFullMask, order, 0);
        for (int peer = prim::lane_idx(); peer < c.num_ranks(); peer += kWarpSize) {
            if (order == 0)
                prim::store<Order::kRelaxed, Scope::kSys>(c.watch.heap.low_latency_started(peer, c.rank()),
                                                          c.watch.call);
            if (c.watch.call > layout::kNumLowLatencyBanks)
                wait_for_peer(c, Stage::kStart, peer, c.watch.heap.received(c.rank(), c.bank, peer),
                              c.watch.call - layout::kNumLowLatencyBanks);
        }
        const bool may_go_on = algo::may_go_on(c.watch, {Stage::kStart, c.rank()}, prim::clock_ns(), 0, 0);
        const bool all = __all_sync(kFullMask, may_go_on);
        if (prim::lane_idx() == 0) *beginning = {all ? 1 : 0, order == 0 ? 1 : 0};
    }
    __syncthreads();  // each lane's acquire, the block's stores
}

// All threads of the block that began first: our routing table to every rank. Peers wait for it in their send phases, so
// it must not depend on a block that may not be resident yet.
EP_DEVICE void send_tables(const Context& c, const void* topk_idx, int idx_bytes, const float* topk_weights,
                           int num_tokens) {
    const int num_entries = num_tokens * c.call.num_topk;
    for (int peer = 0; peer < c.num_ranks(); ++peer) {
        uint8_t* message = c.message(peer, c.rank());
        auto* idx_table = reinterpret_cast<int*>(message + c.call.message.topk_idx.offset);
        auto* weight_table = reinterpret_cast<float*>(message + c.call.message.topk_weights.offset);
        for (int i = static_cast<int>(threadIdx.x); i < num_entries; i += static_cast<int>(blockDim.x)) {
            const int64_t id = load_expert_id(topk_idx, idx_bytes, i);
            // An id out of range reaches no rank; the table must agree, whatever the low half of a 64-bit id says.
            idx_table[i] = id >= 0 && id < c.call.num_experts ? static_cast<int>(id) : -1;
            if (topk_weights != nullptr) weight_table[i] = topk_weights[i];
        }
        if (threadIdx.x == 0) *reinterpret_cast<int*>(message + c.call.message.num_tokens.offset) = num_tokens;
    }
    __syncthreads();
    // Release: the tables. Pairs with: wait_for_source(kTable) at the peer.
    for (int peer = static_cast<int>(threadIdx.x); peer < c.num_ranks(); peer += static_cast<int>(blockDim.x))
        prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.table_full(peer, c.bank, c.rank()), c.watch.call);
}

// This lane's rank among 32 from `first_rank`: does it own one of the token's experts?
EP_DEVICE bool is_destination(const Context& c, const void* topk_idx, int idx_bytes, int token, int first_rank) {
    const int rank = first_rank + prim::lane_idx();
    if (rank >= c.num_ranks() || is_masked(c.call, rank)) return false;
    const int64_t first = static_cast<int64_t>(rank) * c.num_local_experts();
    bool is_found = false;
    for (int k = 0; k < c.call.num_topk; ++k) {
        const int64_t id = load_expert_id(topk_idx, idx_bytes, static_cast<int64_t>(token) * c.call.num_topk + k);
        is_found |= id >= first && id < first + c.num_local_experts();
    }
    return is_found;
}

// Warp 0, last: tells the peers that the bank has been read, and adds the longest waits to the caller's statistics.
EP_DEVICE void publish_received(const Context& c) {
    for (int peer = prim::lane_idx(); peer < c.num_ranks(); peer += kWarpSize) {
        // Release: all blocks' reads of the bank. Pairs with: begin_send at the peer, two calls later.
        prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.received(peer, c.bank, c.rank()), c.watch.call);
        if (c.call.wait_stats != nullptr)
            c.call.wait_stats[peer] +=
                static_cast<int64_t>(prim::load<Order::kRelaxed, Scope::kGpu>(&c.call.wait_ns[peer]));
        prim::store<Order::kRelaxed, Scope::kGpu>(&c.call.wait_ns[peer], uint64_t{0});
    }
}

// All threads of all blocks, last. The block that ends last counts the phase as done.
EP_DEVICE void finish_phase(const Context& c, int* is_last_block) {
    layout::LocalState* local = c.watch.words.local;
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t done = prim::fetch_add<Order::kAcqRel, Scope::kGpu>(&local->low_latency_done_blocks, 1u) + 1;
        *is_last_block = done == gridDim.x ? 1 : 0;
    }
    __syncthreads();
    if (*is_last_block == 0 || prim::warp_idx() != 0) return;
    if (c.call.phase == Phase::kReceive) publish_received(c);
    if (prim::lane_idx() != 0) return;
    prim::store<Order::kRelaxed, Scope::kGpu>(&local->low_latency_begun_blocks, 0u);
    prim::store<Order::kRelaxed, Scope::kGpu>(&local->low_latency_done_blocks, 0u);
    if (c.call.phase == Phase::kSend)
        prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_sends, c.watch.call);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
