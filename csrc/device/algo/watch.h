// What the ranks of a node tell each other in their heaps, and how they wait for it: with a deadline and a failure record.
// Every wait between blocks or ranks goes through here.
//
// A wait that fails writes one record for the host, tells every peer to give up, and returns false; the kernel then
// runs to its end without touching data. Nothing traps: the context stays usable, the Buffer does not.
#pragma once

#include "device/algo/group.h"
#include "device/prim.h"
#include "layout/heap.h"
#include "layout/status.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// -- The symmetric heap, as kernels address it -----------------------------------------------------------------------

// Ranks here are those of the node, by index.
class Heap {
public:
    EP_DEVICE Heap(const layout::HeapParams& params)
        : bases_(params.bases),
          control_(&params.control),
          rank_(params.rank),
          num_ranks_(params.num_ranks),
          first_rank_(params.first_rank),
          num_nodes_(params.num_nodes) {}

    EP_DEVICE int rank() const { return rank_; }
    EP_DEVICE int num_ranks() const { return num_ranks_; }
    // Of the node, among all ranks.
    EP_DEVICE int first_rank() const { return first_rank_; }
    EP_DEVICE int num_nodes() const { return num_nodes_; }
    EP_DEVICE int num_sources() const { return num_nodes_ * num_ranks_; }

    // Each of these names a place in `owner`'s memory; see ControlLayout for who writes it.
    EP_DEVICE uint64_t* started(int owner, int source) const { return word(owner, control_->started.at(source)); }
    EP_DEVICE uint64_t* abort(int owner) const { return word(owner, control_->abort.offset); }
    // `source`: of all ranks.
    EP_DEVICE uint64_t* rank_count(int owner, int bank, int source, int destination) const {
        const uint64_t row = static_cast<uint64_t>(bank) * num_sources() + source;
        return word(owner, control_->rank_counts.at(row * num_ranks_ + destination));
    }
    EP_DEVICE uint64_t* expert_count(int owner, int bank, int source, int local_expert) const {
        const uint64_t row = static_cast<uint64_t>(bank) * num_sources() + source;
        return word(owner, control_->expert_counts.at(row * layout::kMaxLocalExperts + local_expert));
    }
    // `group`: bank * num_nodes() + node.
    EP_DEVICE uint64_t* full(int owner, int group, int source, int slot) const {
        const uint64_t row = static_cast<uint64_t>(group) * num_ranks_ + source;
        return word(owner, control_->full.at(row * layout::kMaxWindow + slot));
    }
    EP_DEVICE uint64_t* empty(int owner, int group, int destination, int slot) const {
        const uint64_t row = static_cast<uint64_t>(group) * num_ranks_ + destination;
        return word(owner, control_->empty.at(row * layout::kMaxWindow + slot));
    }
    EP_DEVICE uint8_t* slot(int owner, const layout::WindowLayout& window, int bank, int source, int slot_idx,
                            int node) const {
        return bases_[owner] + control_->bytes + window.slot_offset(bank, owner, source, slot_idx, node);
    }

    EP_DEVICE uint64_t* loan_flag(int owner, int bank, int lender) const {
        return word(owner, control_->loan_flags.at(bank * num_ranks_ + lender));
    }
    EP_DEVICE layout::Loan* loan(int owner, int bank, int lender) const {
        return reinterpret_cast<layout::Loan*>(bases_[owner] + control_->loans.at(bank * num_ranks_ + lender));
    }
    EP_DEVICE uint64_t* weight_flag(int owner, int lender) const {
        return word(owner, control_->weight_flags.at(lender));
    }
    EP_DEVICE uint64_t* returned(int owner, int borrower) const { return word(owner, control_->returned.at(borrower)); }

    // Low latency; see LowLatencyControl.
    EP_DEVICE uint64_t* low_latency_started(int owner, int source) const {
        return word(owner, control_->low_latency.started.at(source));
    }
    EP_DEVICE uint64_t* received(int owner, int bank, int peer) const {
        return word(owner, control_->low_latency.received.at(bank * num_ranks_ + peer));
    }
    EP_DEVICE uint64_t* cleaned(int owner, int source) const {
        return word(owner, control_->low_latency.cleaned.at(source));
    }
    EP_DEVICE uint64_t* table_full(int owner, int bank, int source) const {
        return word(owner, control_->low_latency.table_full.at(bank * num_ranks_ + source));
    }
    EP_DEVICE uint64_t* token_full(int owner, int bank, int source, int token) const {
        const uint64_t row = static_cast<uint64_t>(bank) * num_ranks_ + source;
        return word(owner, control_->low_latency.token_full.at(row * layout::kMaxLowLatencyTokens + token));
    }
    // The packets of `source`.
    EP_DEVICE prim::Packet* low_latency_packets(int owner, int bank, int source) const {
        const uint64_t row = static_cast<uint64_t>(bank) * num_ranks_ + source;
        return reinterpret_cast<prim::Packet*>(bases_[owner] +
                                               control_->low_latency.packets.at(row * layout::kMaxLowLatencyPackets));
    }
    EP_DEVICE uint8_t* at(int owner, uint64_t offset) const { return bases_[owner] + offset; }

private:
    EP_DEVICE uint64_t* word(int owner, uint64_t offset) const {
        return reinterpret_cast<uint64_t*>(bases_[owner] + offset);
    }

    uint8_t* const* bases_;
    const layout::ControlLayout* control_;
    int rank_;
    int num_ranks_;
    int first_rank_;
    int num_nodes_;
};

// One kernel's view of its deadlines, heap and call.
struct Watch {
    layout::WatchParams words;
    Heap heap;
    layout::Operation operation;
    uint64_t call;  // this call's number; calls count from 1
};

struct WaitSite {
    layout::Stage stage;
    int peer;
    int token = 0;  // of bad input, where it is about one
};

// What a record says, besides its state.
struct Report {
    layout::FailureKind kind;
    layout::Operation operation;
    WaitSite site;
    uint64_t call;
    uint64_t expected;
    uint64_t seen;
    uint64_t waited_ns;
};

EP_DEVICE void write_record(layout::WaitRecord* record, const Report& report) {
    using prim::Order;
    using prim::Scope;
    prim::store<Order::kRelaxed, Scope::kSys>(reinterpret_cast<uint32_t*>(&record->kind),
                                              static_cast<uint32_t>(report.kind));
    prim::store<Order::kRelaxed, Scope::kSys>(reinterpret_cast<uint32_t*>(&record->operation),
                                              static_cast<uint32_t>(report.operation));
    prim::store<Order::kRelaxed, Scope::kSys>(reinterpret_cast<uint32_t*>(&record->stage),
                                              static_cast<uint32_t>(report.site.stage));
    prim::store<Order::kRelaxed, Scope::kSys>(&record->peer, report.site.peer);
    prim::store<Order::kRelaxed, Scope::kSys>(&record->call, report.call);
    prim::store<Order::kRelaxed, Scope::kSys>(&record->expected, report.expected);
    prim::store<Order::kRelaxed, Scope::kSys>(&record->seen, report.seen);
    prim::store<Order::kRelaxed, Scope::kSys>(&record->waited_ns, report.waited_ns);
    prim::store<Order::kRelaxed, Scope::kSys>(&record->token, report.site.token);
    // Pairs with: Buffer::check on the host, which reads the record only when state is 1.
    prim::store<Order::kRelease, Scope::kSys>(&record->state, uint64_t{1});
}

// Tells the host, if this is the first failure of this rank. False: another one was.
EP_DEVICE bool record_failure(const layout::WatchParams& words, const Report& report) {
    using prim::Order;
    using prim::Scope;
    if (prim::compare_swap<Order::kRelaxed, Scope::kGpu>(&words.local->failure_claimed, 0u, 1u) != 0u) return false;
    write_record(&words.status->failure, report);
    return true;
}

// The same site with its peer as one of all ranks.
EP_DEVICE WaitSite among_all(const Watch& watch, WaitSite site) {
    if (!layout::is_rail_stage(site.stage)) site.peer += watch.heap.first_rank();
    return site;
}

// The first failure of this rank is recorded and spread over its node, unless it is this rank's alone; later ones only return.
// Bad input comes with ranks of all nodes.
EP_DEVICE void fail(const Watch& watch, layout::FailureKind kind, WaitSite site, uint64_t expected, uint64_t seen,
                    uint64_t waited_ns) {
    if (kind != layout::FailureKind::kBadInput) site = among_all(watch, site);
    if (!record_failure(watch.words, {kind, watch.operation, site, watch.call, expected, seen, waited_ns})) return;
    const int self = watch.heap.first_rank() + watch.heap.rank();
    const uint64_t code = kind == layout::FailureKind::kAborted
                              ? seen
                              : layout::make_abort_code(self, kind == layout::FailureKind::kTimeout ? site.peer : self);
    if (layout::is_lonely_abort(code)) return;
    for (int peer = 0; peer < watch.heap.num_ranks(); ++peer)
        prim::store<prim::Order::kRelaxed, prim::Scope::kSys>(watch.heap.abort(peer), code);
}

EP_DEVICE uint64_t abort_code(const Watch& watch) {
    return prim::load<prim::Order::kRelaxed, prim::Scope::kSys>(watch.heap.abort(watch.heap.rank()));
}

// kGiveUp: the deadline ends the wait and nothing else; the caller leaves the peer out.
enum class OnTimeout { kFail, kGiveUp };

// Counts a wait that goes on in the rank's WaitCells. Whole warps wait for the same rank: its cell is written again only when
// the wait has become longer by an eighth. A call, the last thing that may_still_go_on does: inlined there, or earlier, it
// costs the kernels registers.
EP_DEVICE_COLD void count_wait(layout::LocalState* local, int cell_idx, uint64_t call, uint64_t waited_ns) {
    using prim::Order;
    using prim::Scope;
    layout::WaitCell* cells = local->wait_cells;
    if (cells == nullptr) return;
    layout::WaitCell* cell = cells + cell_idx;
    const uint64_t mine = layout::make_longest_wait(call, waited_ns);
    const uint64_t seen = prim::load<Order::kRelaxed, Scope::kGpu>(&cell->longest);
    const bool is_new = !layout::is_same_call(seen, mine);
    const uint64_t counted_ns = is_new ? 0 : layout::ns_of_wait(seen);
    if (waited_ns < counted_ns + counted_ns / 8) return;
    if (prim::compare_swap<Order::kRelaxed, Scope::kGpu>(&cell->longest, seen, mine) != seen)
        return;  // another one has
    if (is_new) prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&cell->times_late, uint64_t{1});
    prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&cell->waited_ns, layout::ns_of_wait(mine) - counted_ns);
}

// What may_go_on does when something is wrong, or late.
EP_DEVICE_COLD bool may_still_go_on(Watch watch, WaitSite site, uint64_t waited_ns, uint64_t code, uint64_t expected,
                                    uint64_t seen, OnTimeout on_timeout) {
    using prim::Order;
    using prim::Scope;
    if (code != 0) {
        fail(watch, layout::FailureKind::kAborted, site, expected, code, waited_ns);
        return false;
    }
    if (waited_ns >= watch.words.timeout_ns) {
        if (on_timeout == OnTimeout::kGiveUp) return false;
        fail(watch, layout::FailureKind::kTimeout, site, expected, seen, waited_ns);
        return false;
    }
    if (waited_ns >= watch.words.local->warn_ns) {
        uint64_t* cell = &watch.words.local->warned_calls[layout::warning_cell(watch.operation, watch.call)];
        const uint64_t warned = prim::load<Order::kRelaxed, Scope::kGpu>(cell);
        if (warned < watch.call && prim::compare_swap<Order::kRelaxed, Scope::kGpu>(cell, warned, watch.call) == warned)
            write_record(&watch.words.status->warning, {layout::FailureKind::kTimeout, watch.operation,
                                                        among_all(watch, site), watch.call, expected, seen, waited_ns});
    }
    const int num_ranks = watch.heap.num_sources(), peer = among_all(watch, site).peer;
    count_wait(watch.words.local, layout::wait_cell(watch.operation, site.stage, num_ranks, peer), watch.call,
               waited_ns);
    return true;
}

// How long ago that was. The clock may step back a little, which is no time and not all time.
EP_DEVICE uint64_t ns_since(uint64_t start_ns) {
    const uint64_t now_ns = prim::clock_ns();
    return now_ns > start_ns ? now_ns - start_ns : 0;
}

// What an engine waits with for room when everything else has been given up: a second.
struct Patience {
    template <class Look> EP_DEVICE bool operator()(uint64_t, const Look& look) const {
        constexpr uint64_t kPatienceNs = 1'000'000'000;
        const uint64_t start_ns = prim::clock_ns();
        uint64_t seen = 0;
        while (!look(seen)) {
            if (ns_since(start_ns) >= kPatienceNs) return false;
            prim::pause();
        }
        return true;
    }
};

// The abort word, for the one warp that is to tell the rail peers of it; 0: this rank has not given up, or they are not to
// know, or another warp tells.
EP_DEVICE uint64_t claim_failure(Warp warp, const Watch& watch) {
    warp.expect();
    uint64_t code = 0;
    if (warp.thread_rank() == 0) {
        code = abort_code(watch);
        const bool is_to_tell = code != 0 && !layout::is_lonely_abort(code) &&
                                prim::compare_swap<prim::Order::kRelaxed, prim::Scope::kGpu>(
                                    &watch.words.local->rail_abort_claimed, 0u, 1u) == 0u;
        if (!is_to_tell) code = 0;
    }
    return __shfl_sync(prim::kFullMask, code, 0);
}

// One look at the clock; false: stop waiting. `code`: the abort word.
EP_DEVICE bool is_in_time(const Watch& watch, WaitSite site, uint64_t start_ns, uint64_t code, uint64_t expected,
                          uint64_t seen, OnTimeout on_timeout) {
    const uint64_t waited_ns = ns_since(start_ns);
    if (code == 0 && waited_ns < watch.words.late_ns && waited_ns < watch.words.timeout_ns) return true;
    return may_still_go_on(watch, site, waited_ns, code, expected, seen, on_timeout);
}

// The same with a look at the abort word.
EP_DEVICE bool may_go_on(const Watch& watch, WaitSite site, uint64_t start_ns, uint64_t expected, uint64_t seen,
                         OnTimeout on_timeout = OnTimeout::kFail) {
    return is_in_time(watch, site, start_ns, abort_code(watch), expected, seen, on_timeout);
}

// This thread looks until `look(seen)` says that it has seen what it waits for. False: the wait failed.
template <class Look>
EP_DEVICE bool wait_until(const Watch& watch, WaitSite site, uint64_t expected, const Look& look,
                          OnTimeout on_timeout = OnTimeout::kFail) {
    uint64_t seen = 0;
    uint64_t start_ns = 0;
    for (uint32_t polls = 0;; ++polls) {
        const bool checks = polls % prim::polls_per_check() == prim::polls_per_check() - 1;
        const uint64_t code = checks ? abort_code(watch) : 0;  // under way together with the look
        if (look(seen)) return true;
        if (start_ns == 0) start_ns = prim::clock_ns();
        if (!is_in_time(watch, site, start_ns, code, expected, seen, on_timeout)) return false;
        prim::pause();
    }
}

// This thread waits until *flag >= expected, with acquire at system scope; other lanes of its warp may touch what the
// flag guards only after a __syncwarp(). False: the wait failed.
//
// Every poll acquires: mostly the flag is there at the first look, and a second load would be another trip to memory. That
// empties the L1 of the SM, in which the kernels keep little.
EP_DEVICE bool wait_at_least(const Watch& watch, WaitSite site, const uint64_t* flag, uint64_t expected,
                             OnTimeout on_timeout = OnTimeout::kFail) {
    return wait_until(
        watch, site, expected,
        [&](uint64_t& seen) {
            seen = prim::load<prim::Order::kAcquire, prim::Scope::kSys>(flag);
            return seen >= expected;
        },
        on_timeout);
}

// -- One word at each rank: a group tells all of them something, or waits until all of them have told this rank ------

// Which ranks are meant.
struct AllRanks {
    EP_DEVICE bool operator()(int) const { return true; }
};
struct OtherRanks {
    int self;
    EP_DEVICE bool operator()(int rank) const { return rank != self; }
};

// Writes `value` to `*flag_of(rank)` for each rank that is meant. kRelease: the rank may then read what the group, met in a
// sync(), has written before, or write over what it has read. One release each: lanes that release together wait together.
template <prim::Order O, prim::Scope S, class Group, class IsMeant, class FlagOf>
EP_DEVICE void publish(const Group& group, int num_ranks, const IsMeant& is_meant, const FlagOf& flag_of,
                       uint64_t value) {
    group.expect();
    // Mostly once, so not worth instructions.
#pragma unroll 1
    for (int rank = static_cast<int>(group.thread_rank()); rank < num_ranks; rank += static_cast<int>(group.size()))
        if (is_meant(rank)) prim::store<O, S>(flag_of(rank), value);
}

// True on all lanes once `*flag_of(rank) >= expected` for each rank that is meant: what those have released may be touched by
// all lanes. False: a wait failed.
template <class IsMeant, class FlagOf>
EP_DEVICE bool wait_for_ranks(Warp warp, const Watch& watch, layout::Stage stage, const IsMeant& is_meant,
                              const FlagOf& flag_of, uint64_t expected) {
    bool is_here = true;
    for_each(warp, watch.heap.num_ranks(), [&](int rank) {
        if (is_meant(rank)) is_here &= wait_at_least(watch, {stage, rank}, flag_of(rank), expected);
    });
    return all(warp, is_here);
}

// -- A call of the high-throughput mode: its number, its bank, and what its ranks tell each other when they enter it -

EP_DEVICE uint64_t current_call(const layout::LocalState* local) {
    // Written by an earlier kernel of the same stream only.
    return prim::load<prim::Order::kRelaxed, prim::Scope::kGpu>(&local->num_calls) + 1;
}

EP_DEVICE int bank_of(uint64_t call) { return static_cast<int>(call % layout::kNumBanks); }

// Tells every peer that this rank has entered `watch.call`, that is: has finished the calls before it.
EP_DEVICE void announce_start(Warp warp, const Watch& watch) {
    const Heap& heap = watch.heap;
    // Release: what this rank read in earlier calls is read. Pairs with: wait_for_banks at the peer.
    algo::publish<prim::Order::kRelease, prim::Scope::kSys>(
        warp, heap.num_ranks(), AllRanks{}, [&](int peer) { return heap.started(peer, heap.rank()); }, watch.call);
}

// True once no peer still reads the bank of this call: it was last used two calls ago, so mostly at the first look.
EP_DEVICE bool wait_for_banks(Warp warp, const Watch& watch) {
    const Heap& heap = watch.heap;
    return wait_for_ranks(
        warp, watch, layout::Stage::kStart, AllRanks{}, [&](int peer) { return heap.started(heap.rank(), peer); },
        watch.call - 1);
}

// -- Memory that a rank lends to its peers for the length of one call ------------------------------------------------
// In a dispatch peers write rows into the lender's outputs, in a combine they read rows of the lender's input: no slot in
// between, and nothing to wait for row by row. The lender states its loan when its kernel begins, and its kernel ends
// when every borrower has returned it. See docs/protocols/intranode.md.

// In one block, after wait_for_banks.
EP_DEVICE void state_loan(Warp warp, const Watch& watch, const layout::Loan& loan) {
    const Heap& heap = watch.heap;
    const int bank = bank_of(watch.call);
    for_each(warp, heap.num_ranks(), [&](int peer) {
        *heap.loan(peer, bank, heap.rank()) = loan;
        // Release: the loan, and what earlier kernels did with the memory lent. Pairs with: wait_for_loans at the peer.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(heap.loan_flag(peer, bank, heap.rank()), watch.call);
    });
}

EP_DEVICE const uint64_t* loan_flag_of(const Watch& watch, int lender) {
    return watch.heap.loan_flag(watch.heap.rank(), bank_of(watch.call), lender);
}

// True once `lender` has stated its loan; other threads may look at it after a barrier of the block.
EP_DEVICE bool wait_for_loan(const Watch& watch, int lender) {
    return wait_at_least(watch, {layout::Stage::kLoan, lender}, loan_flag_of(watch, lender), watch.call);
}

// For the loans of all ranks.
EP_DEVICE bool wait_for_loans(Warp warp, const Watch& watch) {
    return wait_for_ranks(
        warp, watch, layout::Stage::kLoan, AllRanks{}, [&](int lender) { return loan_flag_of(watch, lender); },
        watch.call);
}

// What `lender` lends for this call, after wait_for_loan.
EP_DEVICE const layout::Loan& loan_of(const Watch& watch, int lender) {
    return *watch.heap.loan(watch.heap.rank(), bank_of(watch.call), lender);
}

// In the block that comes last: all blocks have done with what peers lend. `has_failed`: this rank may not have heard of all
// loans, so it tells everybody.
EP_DEVICE void return_loans(Warp warp, const Watch& watch, bool has_failed) {
    const Heap& heap = watch.heap;
    // Release: rows written, or reads done. Pairs with: wait_for_returns, wait_for_quiet at the lender.
    algo::publish<prim::Order::kRelease, prim::Scope::kSys>(
        warp, heap.num_ranks(),
        [&](int lender) { return lender != heap.rank() && (has_failed || loan_of(watch, lender).is_any()); },
        [&](int lender) { return heap.returned(lender, heap.rank()); }, watch.call);
}

// At a lender, last: its peers have written all rows, or read them.
EP_DEVICE bool wait_for_returns(Warp warp, const Watch& watch) {
    const Heap& heap = watch.heap;
    return wait_for_ranks(
        warp, watch, layout::Stage::kReturn, OtherRanks{heap.rank()},
        [&](int borrower) { return heap.returned(heap.rank(), borrower); }, watch.call);
}

// At a lender whose call has failed: peers that have entered the call no longer touch what it lends. They have all
// been told of the failure, so a peer that has not come to an end after a second is not waited for. A barrier must follow.
EP_DEVICE_COLD void wait_for_quiet(Warp warp, Watch watch) {
    using prim::Order;
    using prim::Scope;
    constexpr uint64_t kPatienceNs = 1'000'000'000;
    const Heap& heap = watch.heap;
    const uint64_t start_ns = prim::clock_ns();
    for_each(warp, heap.num_ranks(), [&](int peer) {
        if (peer == heap.rank()) return;
        while (prim::load<Order::kAcquire, Scope::kSys>(heap.returned(heap.rank(), peer)) < watch.call &&
               prim::load<Order::kRelaxed, Scope::kSys>(heap.started(heap.rank(), peer)) >= watch.call &&
               ns_since(start_ns) < kPatienceNs)
            prim::pause();
    });
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
