// Rows of bfloat16, as a warp of these kernels works on them: a chunk of 512 channels at a time, sixteen of them in each lane.
#pragma once

#include "device/algo/group.h"
#include "kernels/low_latency/call_context.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

using algo::Pieces;

constexpr int kVecsOfPiece = 2;  // that a lane has of a chunk
constexpr int kChunkVecs = algo::kChunkVecs<kVecsOfPiece>;

using Piece = algo::Piece<kVecsOfPiece>;

EP_DEVICE int num_row_vecs(const LowLatencyCall& call) { return call.hidden * 2 / static_cast<int>(sizeof(Vec16)); }
EP_DEVICE int num_chunks(const LowLatencyCall& call) { return (num_row_vecs(call) + kChunkVecs - 1) / kChunkVecs; }

// Vectors of this chunk: the last one may be short.
EP_DEVICE int num_chunk_vecs(const LowLatencyCall& call, int chunk) {
    const int rest = num_row_vecs(call) - chunk * kChunkVecs;
    return rest < kChunkVecs ? rest : kChunkVecs;
}

// This lane's piece of a row, by `load(vector)`, both counted from the row's begin. Behind the end of the row: zeros.
template <class Load>
EP_DEVICE Piece load_chunk(Warp warp, Pieces pieces, const LowLatencyCall& call, int chunk, const Load& load) {
    Piece piece = {};
    algo::load_piece(warp, pieces, piece, num_chunk_vecs(call, chunk),
                     [&](int vec) { return load(chunk * kChunkVecs + vec); });
    return piece;
}

// To a row at `target`.
EP_DEVICE void store_chunk(Warp warp, Pieces pieces, const LowLatencyCall& call, int chunk, const Piece& piece,
                           void* target) {
    algo::store_piece(warp, pieces, piece, num_chunk_vecs(call, chunk),
                      static_cast<Vec16*>(target) + chunk * kChunkVecs);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
