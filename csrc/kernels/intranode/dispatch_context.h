// What both roles of dispatch work with: where the rows of a rank go, and what goes along with them.
#pragma once

#include "device/algo/group.h"
#include "device/algo/ring.h"
#include "device/algo/watch.h"
#include "kernels/intranode/dispatch_begin.h"

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

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch
