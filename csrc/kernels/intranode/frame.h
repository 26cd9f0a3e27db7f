// How every main kernel of the high-throughput mode begins: one warp of each block makes sure that the call can run.
#pragma once

#include "device/algo/call.h"
#include "device/algo/loan.h"
#include "kernels/intranode/routing.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// What a main kernel needs to know before it touches data.
struct CallFrame {
    bool is_first_kernel;      // of the call: it announces the call
    bool may_lend;             // some rank may: loans are exchanged
    int num_rows_held;         // that the outputs, or the input, have room for
    const layout::Loan* loan;  // ours
};

// Shared memory of a block.
struct FrameState {
    int is_ready;
    uint32_t has_failed;  // not zero: some warp gave up
};

// One warp of each block.
EP_DEVICE bool enter_call(const algo::Watch& watch, const RowMap& rows, const CallFrame& frame) {
    const int self = watch.heap.rank();
    if (frame.is_first_kernel && blockIdx.x == 0) algo::announce_start(watch);
    const int num_rows = rows.total_rows(self);
    const uint64_t abort_code = algo::abort_code(watch);
    bool is_ok = algo::wait_for_banks(watch);  // its first look is under way together with the two loads above
    // Some other rank may have given up already: then this one says so as well.
    if (abort_code != 0) is_ok &= algo::may_go_on(watch, {layout::Stage::kStart, self}, prim::clock_ns(), 0, 0);
    is_ok = __all_sync(prim::kFullMask, is_ok);
    if (is_ok && num_rows > frame.num_rows_held) {
        if (prim::lane_idx() == 0)
            algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kCapacity, 0},
                       static_cast<uint64_t>(frame.num_rows_held), static_cast<uint64_t>(num_rows), 0);
        return false;
    }
    if (!is_ok || !frame.may_lend) return is_ok;
    if (blockIdx.x == 0) algo::state_loan(watch, *frame.loan);
    return algo::wait_for_loans(watch);
}

// All threads of the block. False: do nothing but finish the call.
EP_DEVICE bool begin_call(const algo::Watch& watch, const RowMap& rows, const CallFrame& frame, FrameState& state) {
    if (prim::warp_idx() == 0) {
        const bool is_ok = enter_call(watch, rows, frame);
        if (prim::lane_idx() == 0) state = {is_ok ? 1 : 0, 0};
    }
    __syncthreads();
    return state.is_ready != 0;
}

// The first `num_warps` warps of the block have done with what peers lend, each of them well (`is_ok`) or not; then nobody
// is told, for this rank has reported a failure. A lender's own kernel ends when everything is back.
EP_DEVICE void end_loans(const algo::Watch& watch, const CallFrame& frame, int num_warps, bool is_ok,
                         FrameState& state) {
    constexpr int kBarrier = 1;
    if (!frame.may_lend) return;
    if (!is_ok && prim::lane_idx() == 0) prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(&state.has_failed, 1u);
    prim::barrier_sync(kBarrier, num_warps * prim::kWarpSize);
    if (prim::warp_idx() != 0 || state.has_failed != 0) return;
    algo::return_loans(watch);
    if (blockIdx.x == 0 && frame.loan->x != 0) algo::wait_for_returns(watch);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
