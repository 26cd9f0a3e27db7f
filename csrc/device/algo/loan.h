// Memory that a rank lends to its peers for the length of one call.
//
// In a dispatch peers write rows into the lender's outputs, in a combine they read rows of the lender's input: no slot in
// between, and nothing to wait for row by row. The lender states its loan when its kernel begins, and its kernel ends
// when every borrower has returned it. See docs/protocols/intranode.md.
#pragma once

#include "device/algo/call.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

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
        [&](int lender) { return lender != heap.rank() && (has_failed || loan_of(watch, lender).x != 0); },
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
