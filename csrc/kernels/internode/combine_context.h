// What the roles of combine across nodes work with, and sums of rows wherever they stand.
#pragma once

#include "device/algo/formats.h"
#include "device/algo/group.h"
#include "kernels/internode/stated_rows.h"
#include "kernels/internode/token_streams.h"
#include "kernels/intranode/call_session.h"
#include "kernels/intranode/combine_reduce.h"

namespace deep_ep::kernels::internode::combine {
inline namespace EP_BACKEND {

using kernels::combine::CombineContext;
using prim::Vec16;

// Shared memory of a block.
struct State {
    CallState call;
    int num_sent[layout::kMaxNodes];  // tokens of ours for each node, each of which one sum comes back
};

struct Context {
    const InternodeCombineParams& p;
    const CombineContext& local;  // of this node
    const RailLink& link;
    RailMap rail;
    const int* num_sent;

    EP_DEVICE int num_ranks() const { return local.watch.heap.num_ranks(); }
    EP_DEVICE int self() const { return local.watch.heap.first_rank() + local.watch.heap.rank(); }  // among all
};

// Rows of one owner at a rank of this node, as this rank, the owner or its forwarder, gets them.
struct RowSource {
    int owner;  // of all ranks
    int node;   // its
    int rank;   // of this node
};

// Has the row come? A rank that lends its rows, or this one's own, never makes anybody wait.
EP_DEVICE algo::FlagTest row_is_here(const Context& c, const RowSource& source, int position) {
    if (kernels::combine::direct_rows(c.local, source.owner, source.rank) != nullptr) return {nullptr, 0};
    return c.local.ring.from(source.rank, source.node).row_is_here(position);
}

EP_DEVICE const uint8_t* row_at(const Context& c, const RowSource& source, int position) {
    const uint8_t* rows = kernels::combine::direct_rows(c.local, source.owner, source.rank);
    return rows != nullptr ? rows + static_cast<int64_t>(position) * c.p.row_bytes
                           : c.local.ring.from(source.rank, source.node).slot(position);
}

EP_DEVICE const float* weights_at(const Context& c, const RowSource& source, int position) {
    if (kernels::combine::direct_rows(c.local, source.owner, source.rank) != nullptr)
        return kernels::combine::direct_weights(c.local, source.owner, source.rank) +
               static_cast<int64_t>(position) * c.p.num_topk;
    return reinterpret_cast<const float*>(c.local.ring.from(source.rank, source.node).slot(position) +
                                          c.p.slot.topk_weights.offset);
}

// After every lane's reads, and a sync().
EP_DEVICE void give_slot_back(const Context& c, const RowSource& source, int position) {
    if (kernels::combine::direct_rows(c.local, source.owner, source.rank) == nullptr)
        c.local.ring.from(source.rank, source.node)
            .give_back(position, c.local.rows.num_rows(source.owner, source.rank));
}

// False: the row at `position` is none of those that the owner has there.
EP_DEVICE bool is_stated(const Context& c, const RowSource& source, int token, int position) {
    const int num_rows = c.local.rows.num_rows(source.owner, source.rank);
    return position < num_rows ||
           refuse_position(c.local.watch, c.local.watch.heap.first_rank() + source.rank, token, position, num_rows);
}

// Calls use(i, pointer) for each of `num_sources` whose `pointer_of(i)`, of which each lane finds one at a time, is not null, in
// ascending order.
template <class PointerOf, class Use>
EP_DEVICE void for_each_source(algo::Warp warp, int num_sources, const PointerOf& pointer_of, const Use& use) {
    for (int first = 0; first < num_sources; first += kWarpSize) {
        const int mine = first + warp.thread_rank();
        const auto* pointer = mine < num_sources ? pointer_of(mine) : nullptr;
        for (uint32_t rest = __ballot_sync(kFullMask, pointer != nullptr); rest != 0; rest &= rest - 1)
            use(algo::broadcast_pointer(warp, pointer, __ffs(static_cast<int>(rest)) - 1));
    }
}

// The FP32 sum of the sources' rows, in their order, rounded once.
template <class PointerOf>
EP_DEVICE void sum_rows(algo::Warp warp, int num_sources, uint32_t row_bytes, const PointerOf& pointer_of,
                        uint8_t* target) {
    constexpr int kVecs = 4;
    constexpr auto kPieces = algo::Pieces::kInterleaved;
    const int num_vecs = static_cast<int>(row_bytes / sizeof(Vec16));
    for (int base = 0; base < num_vecs; base += algo::kChunkVecs<kVecs>) {
        const int end = num_vecs - base;
        algo::Bf16Sums sums[kVecs] = {};
        for_each_source(warp, num_sources, pointer_of, [&](const uint8_t* row) {
            const auto* vecs = reinterpret_cast<const Vec16*>(row) + base;
            algo::Piece<kVecs> piece = {};
            algo::load_piece(warp, kPieces, piece, end, [&](int i) { return prim::load_shared_with_peers(vecs + i); });
#pragma unroll
            for (int i = 0; i < kVecs; ++i) sums[i].add(piece.vec[i]);
        });
        auto* out = reinterpret_cast<Vec16*>(target) + base;
        algo::for_piece<kVecs>(warp, kPieces, end,
                               [&](int i, int vec) { prim::store_streaming(out + vec, sums[i].rounded()); });
    }
}

template <class PointerOf>
EP_DEVICE void sum_weights(algo::Warp warp, int num_sources, int num_topk, const PointerOf& pointer_of, float* target) {
    for (int first = 0; first < num_topk; first += kWarpSize) {
        const int k = first + warp.thread_rank();
        float sum = 0.0f;
        for_each_source(warp, num_sources, pointer_of,
                        [&](const float* weights) { sum += k < num_topk ? weights[k] : 0.0f; });
        if (k < num_topk) target[k] = sum;
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::combine
