// What the roles of dispatch work with: where the rows of a rank go, and what goes along with them; and the receiving role.
#pragma once

#include "device/algo/group.h"
#include "device/algo/ring.h"
#include "device/algo/watch.h"
#include "kernels/intranode/dispatch_begin.h"
#include "kernels/params.h"

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

using prim::kFullMask;
using prim::Vec16;

constexpr int kUnroll = 7;  // 7168 bytes: two rounds; 14336: four

struct DispatchContext {
    const DispatchParams& p;
    const algo::Watch& watch;
    const algo::Ring& ring;
    const RowTable& rows;
    int* bad_token;  // shared memory: see DispatchState
};

// What travels is the expert's global id: the same bytes to every destination. get_dispatch_layout has refused an id
// that is out of range, so one that is found here has changed since.
EP_DEVICE int checked_expert(const DispatchContext& c, int token, int64_t id) {
    if (is_expert(c.p, id)) return static_cast<int>(id);
    prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(c.bad_token, token);
    return -1;
}

// The expert as `rank` counts its own, or -1.
EP_DEVICE int local_expert(const DispatchParams& p, int id, int rank) {
    const int local = id - (p.heap.first_rank + rank) * p.num_local_experts;
    return local >= 0 && local < p.num_local_experts ? local : -1;
}

EP_DEVICE int64_t input_expert(const DispatchParams& p, int token, int k) {
    return algo::load_expert_id(p.topk_idx, p.idx_bytes, static_cast<int64_t>(token) * p.num_topk + k);
}

EP_DEVICE float input_weight(const DispatchParams& p, int token, int k) {
    return p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k];
}

EP_DEVICE uint32_t input_scale(const DispatchParams& p, int token, int i) {
    return p.scales[token * p.scale_stride_token + i * p.scale_stride_scale];
}

// The outputs of a rank that are not rows; null: it wants none.
struct MetadataOutputs {
    uint32_t* scales;
    void* topk_idx;
    float* topk_weights;
    int* src_idx;
};

// Our own, or those that `rank` lends us.
template <class Context> EP_DEVICE MetadataOutputs metadata_outputs(const Context& c, int rank) {
    const DispatchParams& p = c.p;
    if (rank == c.watch.heap.rank()) return {p.recv_scales, p.recv_topk_idx, p.recv_topk_weights, p.recv_src_idx};
    const layout::Loan& loan = algo::loan_of(c.watch, rank);
    auto lent = [&](uint64_t offset) { return offset == 0 ? nullptr : c.watch.heap.at(rank, offset); };
    return {reinterpret_cast<uint32_t*>(lent(loan.scales)), lent(loan.topk_idx),
            reinterpret_cast<float*>(lent(loan.topk_weights)), reinterpret_cast<int*>(lent(loan.src_idx))};
}

// Where this lane's rank wants its rows, if they go straight there; null: into slots, or nowhere.
template <class Context> EP_DEVICE uint8_t* direct_rows(const Context& c, int rank) {
    const int self = c.watch.heap.rank();
    if (rank == self) return c.p.recv_x;
    if (!c.p.may_lend || rank >= c.watch.heap.num_ranks()) return nullptr;
    const uint64_t offset = algo::loan_of(c.watch, rank).x;
    return offset == 0 ? nullptr : c.watch.heap.at(rank, offset);
}

// Everything of an output row but the row itself.
template <class Expert, class Weight, class Scale>
EP_DEVICE void deliver_metadata(algo::Warp warp, const DispatchParams& p, const MetadataOutputs& out, int64_t row,
                                int src_idx, const Expert& expert, const Weight& weight, const Scale& scale) {
    warp.expect();
    if (warp.thread_rank() == 0 && out.src_idx != nullptr) out.src_idx[row] = src_idx;
    for (int k = warp.thread_rank(); k < p.num_topk; k += warp.size()) {
        const int id = expert(k);
        algo::store_expert_id(out.topk_idx, p.idx_bytes, row * p.num_topk + k, id);
        out.topk_weights[row * p.num_topk + k] = id >= 0 ? weight(k) : 0.0f;
    }
    for (int i = warp.thread_rank(); i < p.num_scales; i += warp.size()) {
        out.scales[row * p.num_scales + i] = scale(i);
    }
}

// From a slot, or from the image of one in shared memory, to the final row at `rank`.
template <class Context>
EP_DEVICE void deliver_slot_metadata(algo::Warp warp, const Context& c, int rank, int64_t row, const uint8_t* slot) {
    const DispatchParams& p = c.p;
    const auto* ids = reinterpret_cast<const int*>(slot + p.slot.topk_idx.offset);
    const auto* weights = reinterpret_cast<const float*>(slot + p.slot.topk_weights.offset);
    const auto* scales = reinterpret_cast<const uint32_t*>(slot + p.slot.scales.offset);
    deliver_metadata(
        warp, p, metadata_outputs(c, rank), row, *reinterpret_cast<const int*>(slot + p.slot.src_idx.offset),
        [&](int k) { return local_expert(p, ids[k], rank); }, [&](int k) { return weights[k]; },
        [&](int i) { return scales[i]; });
}

// -- The receiving role, of a rank that does not lend its outputs: slots to final rows, one stream of rows for each source

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

// -- Outputs that no row has come for --------------------------------------------------------------------------------

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
