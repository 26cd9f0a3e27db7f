// Memory that a rank lends to its peers for the length of one call.
//
// In a dispatch peers write rows into the lender's outputs, in a combine they read rows of the lender's input: no slot in
// between, and nothing to wait for row by row. The lender states its loan when its kernel begins, and its kernel ends
// when every borrower has returned it. See docs/protocols/intranode.md.
#pragma once

#include "device/algo/call.h"
#include "device/algo/watch.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// One warp of one block, after wait_for_banks.
EP_DEVICE void state_loan(const Watch& watch, const layout::Loan& loan) {
    const Heap& heap = watch.heap;
    const int bank = bank_of(watch.call);
    for (int peer = prim::lane_idx(); peer < heap.num_ranks(); peer += prim::kWarpSize) {
        *heap.loan(peer, bank, heap.rank()) = loan;
        // Release: the loan, and what earlier kernels did with the memory lent. Pairs with: wait_for_loans at the peer.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(heap.loan_flag(peer, bank, heap.rank()), watch.call);
    }
}

// One thread. True once `lender` has stated its loan; other threads may look at it after a barrier of the block.
EP_DEVICE bool wait_for_loan(const Watch& watch, int lender) {
    const Heap& heap = watch.heap;
    return wait_at_least(watch, {layout::Stage::kLoan, lender},
                         heap.loan_flag(heap.rank(), bank_of(watch.call), lender), watch.call);
}

// One warp: for the loans of all ranks.
EP_DEVICE bool wait_for_loans(const Watch& watch) {
    bool is_here = true;
    for (int lender = prim::lane_idx(); lender < watch.heap.num_ranks(); lender += prim::kWarpSize)
        is_here &= wait_for_loan(watch, lender);
    return __all_sync(prim::kFullMask, is_here);
}

// What `lender` lends for this call, after wait_for_loan.
EP_DEVICE const layout::Loan& loan_of(const Watch& watch, int lender) {
    return *watch.heap.loan(watch.heap.rank(), bank_of(watch.call), lender);
}

// Counts blocks of this launch at `counter`; true on every lane of the calling warp in the block that comes last, which
// has then acquired what the others did before. The counter is ready for the next launch.
EP_DEVICE bool is_last_block(uint32_t* counter) {
    using prim::Order;
    using prim::Scope;
    int is_last = 0;
    if (prim::lane_idx() == 0) {
        is_last = prim::fetch_add<Order::kAcqRel, Scope::kGpu>(counter, 1u) + 1 == gridDim.x ? 1 : 0;
        if (is_last != 0) prim::store<Order::kRelaxed, Scope::kGpu>(counter, 0u);
    }
    is_last = __shfl_sync(prim::kFullMask, is_last, 0);
    __syncwarp();  // one lane's acquire, each lane's releases
    return is_last != 0;
}

// One warp of the block that comes last: all blocks have done with what peers lend. `has_failed`: this rank may not have
// heard of all loans, so it tells everybody.
EP_DEVICE void return_loans(const Watch& watch, bool has_failed) {
    const Heap& heap = watch.heap;
    for (int lender = prim::lane_idx(); lender < heap.num_ranks(); lender += prim::kWarpSize)
        if (lender != heap.rank() && (has_failed || loan_of(watch, lender).x != 0))
            // Release: rows written, or reads done. Pairs with: wait_for_returns, wait_for_quiet at the lender.
            prim::store<prim::Order::kRelease, prim::Scope::kSys>(heap.returned(lender, heap.rank()), watch.call);
}

// One warp of a lender, last: its peers have written all rows, or read them.
EP_DEVICE bool wait_for_returns(const Watch& watch) {
    const Heap& heap = watch.heap;
    bool is_back = true;
    for (int borrower = prim::lane_idx(); borrower < heap.num_ranks(); borrower += prim::kWarpSize)
        if (borrower != heap.rank())
            is_back &= wait_at_least(watch, {layout::Stage::kReturn, borrower}, heap.returned(heap.rank(), borrower),
                                     watch.call);
    return __all_sync(prim::kFullMask, is_back);
}

// One warp of a lender whose call has failed: peers that have entered the call no longer touch what it lends. They have all
// been told of the failure, so a peer that has not come to an end after a second is not waited for. A barrier must follow.
EP_DEVICE_COLD void wait_for_quiet(Watch watch) {
    using prim::Order;
    using prim::Scope;
    constexpr uint64_t kPatienceNs = 1'000'000'000;
    const Heap& heap = watch.heap;
    const uint64_t start_ns = prim::clock_ns();
    for (int peer = prim::lane_idx(); peer < heap.num_ranks(); peer += prim::kWarpSize) {
        if (peer == heap.rank()) continue;
        while (prim::load<Order::kAcquire, Scope::kSys>(heap.returned(heap.rank(), peer)) < watch.call &&
               prim::load<Order::kRelaxed, Scope::kSys>(heap.started(heap.rank(), peer)) >= watch.call &&
               ns_since(start_ns) < kPatienceNs)
            prim::pause();
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
