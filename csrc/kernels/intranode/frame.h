// How every main kernel of the high-throughput mode begins: one warp of each block makes sure that the call can run.
#pragma once

#include "device/algo/call.h"
#include "kernels/intranode/routing.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// All threads of the block. `is_ready` is shared memory. False: do nothing but finish the call.
EP_DEVICE bool begin_call(const algo::Watch& watch, const RowMap& rows, bool is_first_kernel, int num_rows_held,
                          int* is_ready) {
    if (prim::warp_idx() == 0) {
        if (is_first_kernel && blockIdx.x == 0) algo::announce_start(watch);
        // Some other rank may have given up already: then this one says so as well.
        bool is_ok = algo::may_go_on(watch, {layout::Stage::kStart, watch.heap.rank()}, prim::clock_ns(), 0, 0);
        is_ok = __all_sync(prim::kFullMask, is_ok) && algo::wait_for_banks(watch);
        if (is_ok && rows.total_rows(watch.heap.rank()) > num_rows_held) {
            if (prim::lane_idx() == 0)
                algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kCapacity, 0},
                           static_cast<uint64_t>(num_rows_held),
                           static_cast<uint64_t>(rows.total_rows(watch.heap.rank())), 0);
            is_ok = false;
        }
        if (prim::lane_idx() == 0) *is_ready = is_ok ? 1 : 0;
    }
    __syncthreads();
    return *is_ready != 0;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
