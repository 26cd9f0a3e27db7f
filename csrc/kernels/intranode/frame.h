// How every main kernel of the high-throughput mode begins and ends.
#pragma once

#include "device/algo/call.h"
#include "device/algo/loan.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// Shared memory of a block.
struct FrameState {
    int is_ready;
    uint32_t has_failed;  // not zero: some warp gave up in the middle of its work
    algo::LaunchEnd end;

    // Any thread at work.
    EP_DEVICE void note_failure() { prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(&has_failed, 1u); }
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

// One thread. False, and the call fails: token `token` is the one at `position` (from 0) of those that go to `rank`, and
// fewer are stated: whoever wrote or read its row would do so beyond what is there.
EP_DEVICE_COLD bool refuse_position(algo::Watch watch, int rank, int token, int position, int num_stated) {
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kPosition, rank, token},
               static_cast<uint64_t>(num_stated), static_cast<uint64_t>(position) + 1, 0);
    return false;
}

// One thread. False, and the call fails: the rows from `source` to `destination`, of `num_rows` in all, cannot be there.
EP_DEVICE_COLD bool refuse_rows(algo::Watch watch, int source, int destination, int first, int end, int num_rows) {
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kRows, source, destination},
               static_cast<uint64_t>(num_rows), layout::make_row_span(first, end), 0);
    return false;
}

// All threads of one block. Every byte is 0xff: not a number in each floating format, and -1 as an index.
EP_DEVICE void void_output(void* output, int64_t num_bytes) {
    if (output == nullptr) return;
    auto* words = static_cast<uint32_t*>(output);
    for (int64_t i = threadIdx.x; i < num_bytes / 4; i += static_cast<int64_t>(blockDim.x)) words[i] = ~0u;
}

// All threads of all blocks, last. `has_begun`: the block went to work; a warp that failed there has said so in `state`. The
// block that comes last returns what was borrowed and waits for what `is_lender` has lent. If anything failed, it calls
// void_outputs(), with all threads: what has been written must not pass for results.
template <class VoidOutputs>
EP_DEVICE void finish_call(const algo::Watch& watch, bool has_begun, bool may_lend, bool is_lender, FrameState& state,
                           const VoidOutputs& void_outputs) {
    using algo::LaunchEnd;
    __syncthreads();  // what all warps did, and whether one failed
    if (prim::warp_idx() == 0) {
        LaunchEnd end = algo::count_block(watch, !has_begun || state.has_failed != 0);
        if (end != LaunchEnd::kOthersGoOn && may_lend) {
            algo::return_loans(watch, end == LaunchEnd::kFailed);
            if (end == LaunchEnd::kDone && is_lender && !algo::wait_for_returns(watch)) end = LaunchEnd::kFailed;
            if (end == LaunchEnd::kFailed && is_lender) algo::wait_for_quiet(watch);
        }
        if (prim::lane_idx() == 0) {
            if (end != LaunchEnd::kOthersGoOn) algo::count_call(watch);
            state.end = end;
        }
    }
    __syncthreads();
    if (state.end == LaunchEnd::kFailed) void_outputs();
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
