// What the two low-latency kernels share: numbering calls, where things are in a message, waiting for a peer that may be
// left out, and the ids of experts.
#pragma once

#include "device/algo/group.h"
#include "device/algo/watch.h"
#include "kernels/low_latency/far_ranks.h"
#include "kernels/params.h"
#include "kernels/params_low_latency.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

using algo::Block;
using algo::Warp;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Vec16;

struct CallContext {
    const LowLatencyCall& call;
    algo::Watch watch;
    // Constants where they are made, so that code for the other phases, and for weights with flags, is left out.
    Phase phase;
    bool uses_packets;                            // for the weights of combine, as call.uses_packets
    layout::LowLatencyLaunchState* launch_state;  // of this launch
    int bank;

    EP_DEVICE int rank() const { return first_near(watch) + watch.heap.rank(); }
    EP_DEVICE int num_ranks() const { return kAcrossNodes ? watch.heap.num_sources() : watch.heap.num_ranks(); }
    // Ranks that stores reach: near_rank(0), near_rank(1), …
    EP_DEVICE int num_near() const { return watch.heap.num_ranks(); }
    EP_DEVICE int near_rank(int idx) const { return first_near(watch) + idx; }
    EP_DEVICE int near_index(int rank) const { return rank - first_near(watch); }
    EP_DEVICE bool is_far(int rank) const { return low_latency::is_far(watch, rank); }
    EP_DEVICE FarRanks far() const { return {call, watch}; }
    EP_DEVICE int num_local_experts() const { return call.num_local_experts; }
    EP_DEVICE int first_expert() const { return rank() * num_local_experts(); }
    EP_DEVICE int num_rows_of_expert() const { return num_ranks() * call.num_max_tokens; }
    // Every launch sends, or receives, or both.
    EP_DEVICE bool sends() const { return phase != Phase::kReceive; }
    EP_DEVICE bool receives() const { return phase != Phase::kSend; }
    // The message that `source` has written (or is writing) into `owner`'s memory, where the two are near, or `owner` is this
    // rank.
    EP_DEVICE uint8_t* message(int owner, int source) const {
        if constexpr (kAcrossNodes)
            if (is_far(source)) return far().at<uint8_t>(far_message(rank(), source));
        return watch.heap.at(near_index(owner), call.data_offset + call.region.offset(bank, near_index(source)));
    }
    EP_DEVICE uint8_t* slot(int owner, int source, int token) const {
        return message(owner, source) + call.message.slots.at(token);
    }
    // Combine in packets: the slot of an entry of `owner`, for parts of near ranks.
    EP_DEVICE uint8_t* entry_slot(int owner, int token, int k) const {
        const auto idx = static_cast<uint64_t>(token) * call.num_topk + k;
        return watch.heap.at(near_index(owner),
                             call.data_offset + call.region.entry_offset(bank, idx, call.entry_slot_bytes));
    }
    // The same of this rank, for a part of `source`.
    EP_DEVICE uint8_t* part_slot(int source, int token, int k) const {
        if constexpr (kAcrossNodes)
            if (is_far(source)) return far().at<uint8_t>(far_entry_slot(token * call.num_topk + k));
        return entry_slot(rank(), token, k);
    }
    // Behind a row that lies in a slot by entry as it is: the expert that it is of.
    EP_DEVICE int* expert_behind(uint8_t* slot) const {
        return reinterpret_cast<int*>(slot +
                                      layout::LowLatencyEntrySlots::expert_offset(static_cast<uint64_t>(call.hidden)));
    }

    // Flags that `source` writes here.
    EP_DEVICE const uint64_t* received_flag(int in_bank, int source) const {
        if constexpr (kAcrossNodes)
            if (is_far(source)) return far().at<const uint64_t>(far().received(in_bank, source));
        return watch.heap.received(watch.heap.rank(), in_bank, near_index(source));
    }
    EP_DEVICE const uint64_t* table_flag(int in_bank, int source) const {
        if constexpr (kAcrossNodes)
            if (is_far(source)) return far().at<const uint64_t>(far().table_full(in_bank, source));
        return watch.heap.table_full(watch.heap.rank(), in_bank, near_index(source));
    }
    EP_DEVICE const uint64_t* token_flag(int in_bank, int source, int token) const {
        if constexpr (kAcrossNodes)
            if (is_far(source)) return far().at<const uint64_t>(far().token_full(in_bank, source, token));
        return watch.heap.token_full(watch.heap.rank(), in_bank, near_index(source), token);
    }
    // The same of a dispatch's row for this rank, which may lie in a neighbour's window.
    EP_DEVICE const uint64_t* row_flag(int in_bank, int source, int token) const {
        if constexpr (kAcrossNodes)
            if (is_far(source))
                return far().at_holder<const uint64_t>(source, far().token_full(in_bank, source, token));
        return token_flag(in_bank, source, token);
    }
    EP_DEVICE const uint8_t* row_slot(int source, int token) const {
        if constexpr (kAcrossNodes)
            if (is_far(source))
                return far().at_holder<const uint8_t>(source,
                                                      far_message(rank(), source) + call.message.slots.at(token));
        return slot(rank(), source, token);
    }
    // The flag of a token at a near rank.
    EP_DEVICE uint64_t* token_flag_at(int owner, int token) const {
        return watch.heap.token_full(near_index(owner), bank, watch.heap.rank(), token);
    }

    // -- Across nodes: places in the window, ours and that of any far rank -------------------------------------------------

    // Where the message of `source` lies at `owner`, who are far from each other. Combine by entry has tables side by side, and
    // its slots behind them.
    EP_DEVICE uint64_t far_message(int owner, int source) const {
        const FarRanks ranks = far();
        return ranks.receive(bank) +
               ranks.index(source, owner) * (uses_packets ? call.message.slots.offset : ranks.source_bytes());
    }
    EP_DEVICE uint64_t far_entry_slot(int entry) const {
        const FarRanks ranks = far();
        return ranks.receive(bank) + static_cast<uint64_t>(ranks.count()) * call.message.slots.offset +
               static_cast<uint64_t>(entry) * call.entry_slot_bytes;
    }
    // What is put from: a table for all far ranks, then slots.
    EP_DEVICE uint64_t staged_table() const { return far().staging(bank); }
    EP_DEVICE uint64_t staged_slot(int idx) const {
        const uint64_t slot_bytes = uses_packets ? call.entry_slot_bytes : call.message.slots.element_bytes;
        return staged_table() + call.message.slots.offset + static_cast<uint64_t>(idx) * slot_bytes;
    }

    EP_DEVICE const int* table(int source) const {
        return reinterpret_cast<const int*>(message(rank(), source) + call.message.topk_idx.offset);
    }
    EP_DEVICE const float* weight_table(int source) const {
        return reinterpret_cast<const float*>(message(rank(), source) + call.message.topk_weights.offset);
    }
    // Rows that `source` has for each of our experts.
    EP_DEVICE const int* row_counts(int source) const {
        const auto* counts = reinterpret_cast<const int*>(message(rank(), source) + call.message.num_rows.offset);
        return kAcrossNodes ? counts + first_expert() : counts;
    }
    EP_DEVICE int num_tokens_of(int source) const {
        return *reinterpret_cast<const int*>(message(rank(), source) + call.message.num_tokens.offset);
    }
    // What `source` has sent, or sends, to `owner` in packets.
    EP_DEVICE prim::Packet* packets(int owner, int source) const {
        return watch.heap.low_latency_packets(near_index(owner), bank, near_index(source));
    }
    // Of an entry: its expert, then its weight.
    EP_DEVICE const prim::Packet* entry_packets(int source, int token, int k) const {
        return packets(rank(), source) + 2 * (static_cast<int64_t>(token) * call.num_topk + k);
    }
    // Of the packets of this call. Their places belong to its bank, which every second call uses; so a word that nobody has
    // written since would look new only to the call that comes exactly 2^32 calls later. Never 0.
    EP_DEVICE uint32_t epoch() const { return static_cast<uint32_t>(watch.call >> 1) | 1u << 31; }
};

EP_DEVICE int bank_of(uint64_t call) { return static_cast<int>(call % layout::kNumLowLatencyBanks); }

// This lane's of the words that say which call this launch works on. Send phases count calls, on the device: a CUDA graph replays
// its launches, and every replay is a new call. A receive phase finds the number where its send phase has left it. Lane 1 has
// the number of launches, the others the call's. (Were they the same in all lanes, the compiler would move them to registers
// of the warp at once, and wait for that.)
struct LaunchWords {
    uint64_t word;
};

EP_DEVICE LaunchWords load_launch_words(Warp warp, const LowLatencyCall& call, Phase phase) {
    const layout::LocalState* local = call.watch.local;
    const uint64_t* number = phase == Phase::kReceive ? call.number : &local->num_low_latency_sends;
    return {
        prim::load<Order::kRelaxed, Scope::kGpu>(warp.thread_rank() == 1 ? &local->num_low_latency_launches : number)};
}

EP_DEVICE bool is_masked(const LowLatencyCall& call, int peer) {
    return call.is_shrinkable && prim::load<Order::kRelaxed, Scope::kGpu>(&call.masked[peer]) != 0;
}

// After a wait that has failed: because the call has, and not because a peer is masked.
EP_DEVICE_COLD bool has_failed(algo::Watch watch) {
    return algo::abort_code(watch) != 0 ||
           prim::load<Order::kRelaxed, Scope::kGpu>(&watch.words.local->failure_claimed) != 0;
}

// Waits that do not end at the first look are calls: their code, many times inlined, would fill the instruction cache.

// Acquire: waits until the flag is one from `expected` to `last`. False: do without the peer, because it is
// masked, or has just been, or the call is aborted.
EP_DEVICE_COLD bool wait_for_peer(const LowLatencyCall* call, algo::Watch watch, Stage stage, int peer,
                                  const uint64_t* flag, uint64_t expected, uint64_t last) {
    if (is_masked(*call, peer)) return false;
    const auto on_timeout = call->is_shrinkable ? algo::OnTimeout::kGiveUp : algo::OnTimeout::kFail;
    const algo::WaitSite site = site_of(watch, stage, peer);
    FarAbort abort;
    const auto look = [&](uint64_t& seen) {
        seen = prim::load<Order::kAcquire, Scope::kSys>(flag);
        const bool is_here = seen >= expected && seen <= last;
        if (is_here) confirm_far(*call, watch, peer, flag, seen);
        return is_here || abort.look(*call, watch, peer);
    };
    if (algo::wait_until(watch, site, expected, look, on_timeout)) return !abort.has_ended(watch, site, expected);
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

// One look at a flag of `source`; acquire. One of another call, earlier or later, says nothing of this one.
EP_DEVICE bool is_set(const LowLatencyCall& call, const algo::Watch& watch, int source, const uint64_t* flag) {
    const bool is_here = prim::load<Order::kAcquire, Scope::kSys>(flag) == watch.call;
    if (is_here) confirm_far(call, watch, source, flag, watch.call);
    return is_here;
}

// As wait_for_peer, for a flag of this very call; notes how long it took.
EP_DEVICE_COLD bool wait_for_late_source(const LowLatencyCall* call, algo::Watch watch, Stage stage, int source,
                                         const uint64_t* flag) {
    const uint64_t start_ns = prim::clock_ns();
    const bool is_here = wait_for_peer(call, watch, stage, source, flag, watch.call, watch.call);
    note_wait(*call, source, algo::ns_since(start_ns));
    return is_here;
}

// The same for the flag of a part of combine in entry slots, which says more than its call: *seen.
EP_DEVICE_COLD bool wait_for_late_part(const LowLatencyCall* call, algo::Watch watch, int source, const uint64_t* flag,
                                       uint64_t* seen) {
    const uint64_t start_ns = prim::clock_ns();
    const algo::WaitSite site = site_of(watch, Stage::kRow, source);
    FarAbort abort;
    const bool has_ended = algo::wait_until(watch, site, watch.call, [&](uint64_t& seen_call) {
        *seen = prim::load<Order::kAcquire, Scope::kSys>(flag);
        seen_call = layout::LowLatencyEntrySlots::call_of(*seen);
        if (seen_call == watch.call) confirm_far(*call, watch, source, flag, *seen);
        return seen_call == watch.call || abort.look(*call, watch, source);
    });
    note_wait(*call, source, algo::ns_since(start_ns));
    return has_ended && !abort.has_ended(watch, site, watch.call);
}

// What a source states becomes part of an address only if it can be true: from 0 to `most`.
EP_DEVICE bool may_be(int stated, int most) { return stated >= 0 && stated <= most; }

EP_DEVICE bool wait_for_source(const LowLatencyCall& call, const algo::Watch& watch, Stage stage, int source,
                               const uint64_t* flag) {
    return is_set(call, watch, source, flag) || wait_for_late_source(&call, watch, stage, source, flag);
}

// Acquire: does the routing table of `source` count in this call? The same answer for every thread that asks.
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

// One look: is the packet of this call there?
EP_DEVICE bool look_at_packet(const CallContext& c, const prim::Packet* packet, int& value) {
    uint32_t data = 0;
    const bool is_here = prim::load_packet<Scope::kSys>(packet, c.epoch(), data);
    value = static_cast<int>(data);
    return is_here;
}

// Notes how long it took. False: the call is aborted, and the value is 0.
EP_DEVICE_COLD bool wait_for_late_packet(const LowLatencyCall* call, algo::Watch watch, uint32_t epoch, int source,
                                         const prim::Packet* packet, int* value) {
    const uint64_t start_ns = prim::clock_ns();
    uint32_t data = 0;
    const bool is_here = algo::wait_until(watch, site_of(watch, Stage::kTable, source), watch.call, [&](uint64_t&) {
        return prim::load_packet<Scope::kSys>(packet, epoch, data);
    });
    note_wait(*call, source, algo::ns_since(start_ns));
    *value = is_here ? static_cast<int>(data) : 0;
    return is_here;
}

EP_DEVICE bool wait_for_packet(const CallContext& c, int source, const prim::Packet* packet, int& value) {
    return wait_for_late_packet(&c.call, c.watch, c.epoch(), source, packet, &value);
}

EP_DEVICE void send_packet(const CallContext& c, prim::Packet* packet, int value) {
    prim::store_packet<Scope::kSys>(packet, c.epoch(), static_cast<uint32_t>(value));
}

EP_DEVICE bool wait_for_table(const CallContext& c, int source) {
    const uint64_t* flag = c.table_flag(c.bank, source);
    if (c.call.is_shrinkable) return decide_on_table(&c.call, c.watch, source, flag);
    return wait_for_source(c.call, c.watch, Stage::kTable, source, flag);
}

// Before the number of the call is known.
EP_DEVICE CallContext make_context(const LowLatencyCall& call, layout::Operation operation, Phase phase,
                                   bool uses_packets) {
    return {call, {call.watch, call.heap, operation, 0}, phase, uses_packets, nullptr, 0};
}

EP_DEVICE void take_number(Warp warp, CallContext& c, const LaunchWords& words) {
    warp.expect();
    const uint64_t number = __shfl_sync(kFullMask, words.word, 0), num_launches = __shfl_sync(kFullMask, words.word, 1);
    c.watch.call = c.phase == Phase::kReceive ? number : number + 1;
    c.bank = bank_of(c.watch.call);
    c.launch_state = &c.call.watch.local->low_latency_launch_states[num_launches % 2];
}

// -1 where the id is none of an expert, whatever the low half of a 64-bit id says.
EP_DEVICE int checked_expert(const CallContext& c, int64_t id) {
    return id >= 0 && id < c.call.num_experts ? static_cast<int>(id) : -1;
}

// The rank that has the expert; -1: none, as of no expert.
EP_DEVICE int owner_of(const CallContext& c, int expert) {
    return expert >= 0 ? c.call.by_local_experts.quotient(expert) : -1;
}

// The expert as this rank counts its own; -1: it is none of them, or none at all.
EP_DEVICE int local_expert(const CallContext& c, int expert) {
    const int local = expert - c.first_expert();
    return local >= 0 && local < c.num_local_experts() ? local : -1;
}

// The call fails, since topk_idx or the handle of a combine are not those of one dispatch.
EP_DEVICE_COLD void refuse_entries(algo::Watch watch, int source, int token) {
    algo::fail(watch, layout::FailureKind::kBadInput, {Stage::kEntry, source}, static_cast<uint64_t>(token), 0, 0);
}

// A caller's top-k ids, and how wide they are.
struct Ids {
    const void* ids;
    int bytes;

    // This lane's entry of the token, from `first_k` on; -1: there is none.
    EP_DEVICE int64_t load(Warp warp, const CallContext& c, int token, int first_k) const {
        const int k = first_k + warp.thread_rank();
        const bool is_one = k < c.call.num_topk;
        return is_one ? algo::load_expert_id(ids, bytes, static_cast<int64_t>(token) * c.call.num_topk + k) : -1;
    }
};

// Which of the first 32 entries have experts of this lane's rank, among 32 from `first_rank`? `id`: this lane's.
EP_DEVICE uint32_t entries_of_rank(Warp warp, const CallContext& c, int64_t id, int first_rank) {
    warp.expect();
    const int rank = first_rank + warp.thread_rank();
    const int expert = checked_expert(c, id);
    const int owner = owner_of(c, expert);
    const int count = c.call.num_topk < kWarpSize ? c.call.num_topk : kWarpSize;
    uint32_t entries = 0;
#pragma unroll 4
    for (int lane = 0; lane < count; ++lane) entries |= (__shfl_sync(kFullMask, owner, lane) == rank ? 1u : 0u) << lane;
    return rank < c.num_ranks() ? entries : 0;
}

// Does this lane's rank, among 32 from `first_rank`, own one of the token's experts? `id`: this lane's of the first 32
// entries. `leaves_out(rank)`: it does without.
template <class LeavesOut>
EP_DEVICE bool is_destination(Warp warp, const CallContext& c, const Ids& ids, int64_t id, int token, int first_rank,
                              const LeavesOut& leaves_out) {
    warp.expect();
    const int rank = first_rank + warp.thread_rank();
    bool is_found = false;
#pragma unroll 1
    for (int first = 0; first < c.call.num_topk; first += kWarpSize) {
        if (first > 0) id = ids.load(warp, c, token, first);
        const int expert = checked_expert(c, id);
        const int owner = owner_of(c, expert);
        const int count = c.call.num_topk - first < kWarpSize ? c.call.num_topk - first : kWarpSize;
#pragma unroll 4
        for (int lane = 0; lane < count; ++lane) is_found |= __shfl_sync(kFullMask, owner, lane) == rank;
    }
    return is_found && rank < c.num_ranks() && !leaves_out(rank);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
