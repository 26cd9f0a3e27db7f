// How every main kernel of the high-throughput mode begins and ends.
#pragma once

#include "device/algo/call.h"
#include "device/algo/loan.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// Shared memory of a block.
struct FrameState {
    int is_ready;
    uint32_t has_failed;  // not zero: some warp gave up
};

// One warp of each block. Afterwards peers' banks may be written. `is_first_kernel`: of the call, so it announces the call.
EP_DEVICE bool enter_call(const algo::Watch& watch, bool is_first_kernel) {
    const int self = watch.heap.rank();
    if (is_first_kernel && blockIdx.x == 0) algo::announce_start(watch);
    const uint64_t abort_code = algo::abort_code(watch);
    bool is_ok = algo::wait_for_banks(watch);  // its first look is under way together with the load above
    // Some other rank may have given up already: then this one says so as well.
    if (abort_code != 0) is_ok &= algo::may_go_on(watch, {layout::Stage::kStart, self}, prim::clock_ns(), 0, 0);
    return __all_sync(prim::kFullMask, is_ok) != 0;
}

// One thread. False: `num_rows` belong to this rank, and its tensors hold fewer.
EP_DEVICE bool has_room(const algo::Watch& watch, int num_rows_held, int num_rows) {
    if (num_rows <= num_rows_held) return true;
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kCapacity, 0},
               static_cast<uint64_t>(num_rows_held), static_cast<uint64_t>(num_rows), 0);
    return false;
}

// The first `num_warps` warps of the block have done with what peers lend, each of them well (`is_ok`) or not; then nobody
// is told, for this rank has reported a failure. A lender's own kernel ends when everything is back.
EP_DEVICE void end_loans(const algo::Watch& watch, const layout::Loan& loan, int num_warps, bool is_ok,
                         FrameState& state) {
    constexpr int kBarrier = 1;
    if (!is_ok && prim::lane_idx() == 0) prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(&state.has_failed, 1u);
    prim::barrier_sync(kBarrier, num_warps * prim::kWarpSize);
    if (prim::warp_idx() != 0 || state.has_failed != 0) return;
    algo::return_loans(watch);
    if (blockIdx.x == 0 && loan.x != 0) algo::wait_for_returns(watch);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
