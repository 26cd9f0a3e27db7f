// The receiving role of dispatch, of a rank that does not lend its outputs: slots to final rows, one stream of rows for each
// source.
#pragma once

#include "device/algo/group.h"
#include "device/algo/ring.h"
#include "kernels/intranode/dispatch_context.h"

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

// Row `position` of the `num_rows` of a source to final row `row`.
template <class Context>
EP_DEVICE void receive_row(algo::Warp warp, const Context& c, const algo::Port& port, int position, int num_rows,
                           int64_t row) {
    const DispatchParams& p = c.p;
    const uint8_t* slot = port.slot(position);
    algo::copy_row<algo::SourceKind::kFromPeer, kUnroll>(warp, reinterpret_cast<Vec16*>(p.recv_x + row * p.row_bytes),
                                                         reinterpret_cast<const Vec16*>(slot),
                                                         static_cast<int>(p.row_bytes / sizeof(Vec16)));
    deliver_slot_metadata(warp, c, c.watch.heap.rank(), row, slot);
    warp.sync();  // every lane's reads, one lane's release
    if (warp.thread_rank() == 0) port.give_back(position, num_rows);
}

EP_DEVICE bool receive(algo::Warp warp, const DispatchContext& c, int warp_idx, int num_warps) {
    const int self = c.watch.heap.rank();
    const algo::RowStream stream = algo::deal_stream(warp, warp_idx, num_warps, self, c.watch.heap.num_ranks(),
                                                     [&](int source) { return c.rows.num_rows_from(source); });
    return algo::serve_streams(
        warp, c.watch, Stage::kRow, stream,
        [&](int source, int position) { return c.ring.from(source).row_is_here(position); },
        [&](int source, int position, int count) {
            receive_row(warp, c, c.ring.from(source), position, count, c.rows.first_row_from(source) + position);
        });
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch
