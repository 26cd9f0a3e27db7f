// Waiting with a deadline and a failure record. Every wait between blocks or ranks goes through here.
//
// A wait that fails writes one record for the host, tells every peer to give up, and returns false; the kernel then
// runs to its end without touching data. Nothing traps: the context stays usable, the Buffer does not.
#pragma once

#include "device/algo/heap.h"
#include "device/prim.h"
#include "layout/status.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// One kernel's view of its deadlines, heap and call.
struct Watch {
    WatchWords words;
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
EP_DEVICE bool record_failure(const WatchWords& words, const Report& report) {
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

// The first failure of this rank is recorded and spread over its node; later ones only return. Bad input comes with ranks of
// all nodes.
EP_DEVICE void fail(const Watch& watch, layout::FailureKind kind, WaitSite site, uint64_t expected, uint64_t seen,
                    uint64_t waited_ns) {
    if (kind != layout::FailureKind::kBadInput) site = among_all(watch, site);
    if (!record_failure(watch.words, {kind, watch.operation, site, watch.call, expected, seen, waited_ns})) return;
    const int self = watch.heap.first_rank() + watch.heap.rank();
    const uint64_t code = kind == layout::FailureKind::kAborted
                              ? seen
                              : layout::make_abort_code(self, kind == layout::FailureKind::kTimeout ? site.peer : self);
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
        const uint64_t warned = prim::load<Order::kRelaxed, Scope::kGpu>(&watch.words.local->warned_call);
        if (warned < watch.call && prim::compare_swap<Order::kRelaxed, Scope::kGpu>(&watch.words.local->warned_call,
                                                                                    warned, watch.call) == warned)
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

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
