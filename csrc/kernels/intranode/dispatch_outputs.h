// Outputs of dispatch that no row has come for.
#pragma once

#include "device/algo/group.h"
#include "device/algo/watch.h"
#include "kernels/params.h"

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

// Rows behind the `num_rows` that come must not look like tokens.
EP_DEVICE void mark_unused_rows(algo::Grid grid, const DispatchParams& p, int num_rows) {
    const int64_t begin = static_cast<int64_t>(num_rows) * p.num_topk;
    const int64_t end = static_cast<int64_t>(p.num_recv_rows) * p.num_topk;
    algo::for_each(grid, end - begin, [&](int64_t i) {
        algo::store_expert_id(p.recv_topk_idx, p.idx_bytes, begin + i, -1);
        p.recv_topk_weights[begin + i] = 0.0f;
    });
}

// All of them, of a call that has failed.
EP_DEVICE void void_dispatch(algo::Block block, const DispatchParams& p) {
    const int64_t num_rows = p.num_recv_rows;
    const int64_t num_entries = num_rows * p.num_topk;
    algo::void_output(block, p.recv_x, num_rows * p.row_bytes);
    algo::void_output(block, p.recv_scales, num_rows * p.num_scales * 4);
    algo::void_output(block, p.recv_topk_idx, num_entries * p.idx_bytes);
    algo::void_output(block, p.recv_topk_weights, num_entries * 4);
    algo::void_output(block, p.recv_src_idx, num_rows * 4);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch
