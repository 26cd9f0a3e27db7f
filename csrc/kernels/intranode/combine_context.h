// What both halves of combine work with.
#pragma once

#include "device/algo/group.h"
#include "device/algo/loan.h"
#include "device/algo/ring.h"
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

// Where `rank` has its rows for us to read, our first one foremost: in our own input, or in the one that it lends. Null:
// it sends them into slots.
EP_DEVICE const uint8_t* direct_rows(const CombineContext& c, int rank) {
    const CombineParams& p = c.p;
    const int self = c.watch.heap.rank();
    const int64_t offset = static_cast<int64_t>(c.rows.first_row(self, rank)) * p.row_bytes;
    if (rank == self) return p.x + offset;
    const uint64_t lent = p.may_lend ? algo::loan_of(c.watch, rank).x : 0;
    return lent == 0 ? nullptr : c.watch.heap.at(rank, lent) + offset;
}

// The same for the weights of a rank with direct rows.
EP_DEVICE const float* direct_weights(const CombineContext& c, int rank) {
    const CombineParams& p = c.p;
    const int self = c.watch.heap.rank();
    const int64_t offset = static_cast<int64_t>(c.rows.first_row(self, rank)) * p.num_topk;
    if (rank == self) return p.topk_weights + offset;
    return reinterpret_cast<const float*>(c.watch.heap.at(rank, algo::loan_of(c.watch, rank).topk_weights)) + offset;
}

// The token has a row at `rank`: then it is one of those that stand there for us.
EP_DEVICE bool is_stated(const CombineContext& c, int rank, int token, int position) {
    if (position < 0) return true;
    const int num_rows = c.rows.num_rows(c.watch.heap.rank(), rank);
    return position < num_rows || refuse_position(c.watch, rank, token, position, num_rows);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
