// What both halves of combine work with.
#pragma once

#include "device/algo/group.h"
#include "device/algo/ring.h"
#include "device/algo/watch.h"
#include "kernels/intranode/flag_warp.h"
#include "kernels/intranode/refusals.h"
#include "kernels/intranode/routing.h"
#include "kernels/params.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Vec16;

struct CombineContext {
    const CombineParams& p;
    const algo::Watch& watch;
    const algo::Ring& ring;
    RowMap rows;
};

// Where `rank` has its rows of `owner` for us to read, the first one foremost: in our own input, or in the one that it lends.
// Null: it sends them into slots.
EP_DEVICE const uint8_t* direct_rows(const CombineContext& c, int owner, int rank) {
    const CombineParams& p = c.p;
    const int64_t offset = static_cast<int64_t>(c.rows.first_row(owner, rank)) * p.row_bytes;
    if (rank == c.watch.heap.rank()) return p.x + offset;
    const uint64_t lent = p.may_lend ? algo::loan_of(c.watch, rank).x : 0;
    return lent == 0 ? nullptr : c.watch.heap.at(rank, lent) + offset;
}

// The same for the weights of a rank with direct rows.
EP_DEVICE const float* direct_weights(const CombineContext& c, int owner, int rank) {
    const CombineParams& p = c.p;
    const int64_t offset = static_cast<int64_t>(c.rows.first_row(owner, rank)) * p.num_topk;
    if (rank == c.watch.heap.rank()) return p.topk_weights + offset;
    return reinterpret_cast<const float*>(c.watch.heap.at(rank, algo::loan_of(c.watch, rank).topk_weights)) + offset;
}

// Of our own rows, inside a node.
EP_DEVICE const uint8_t* direct_rows(const CombineContext& c, int rank) {
    return direct_rows(c, c.watch.heap.rank(), rank);
}
EP_DEVICE const float* direct_weights(const CombineContext& c, int rank) {
    return direct_weights(c, c.watch.heap.rank(), rank);
}

// The token has a row at `rank`: then it is one of those that stand there for us.
EP_DEVICE bool is_stated(const CombineContext& c, int rank, int token, int position) {
    if (position < 0) return true;
    const int num_rows = c.rows.num_rows(c.watch.heap.rank(), rank);
    return position < num_rows || refuse_position(c.watch, rank, token, position, num_rows);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
