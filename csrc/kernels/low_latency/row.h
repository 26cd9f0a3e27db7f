// Rows of bfloat16, as a warp works on them: a chunk of 512 channels at a time, sixteen of them in each lane.
#pragma once

#include "kernels/low_latency/frame.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

constexpr int kVecsOfPiece = 2;                       // that a lane has of a chunk
constexpr int kChunkVecs = kVecsOfPiece * kWarpSize;  // that a warp works on at once

// One lane's part of a chunk.
struct Piece {
    Vec16 vec[kVecsOfPiece];
};

// Which vectors of a chunk a lane has.
enum class Pieces {
    kHalves,      // one of each half of the chunk: what a warp reads or writes at once stands together
    kNeighbours,  // sixteen channels that stand together, for formats that pack them
};

EP_DEVICE int piece_vec(Pieces pieces, int i) {
    return pieces == Pieces::kNeighbours ? prim::lane_idx() * kVecsOfPiece + i : i * kWarpSize + prim::lane_idx();
}

EP_DEVICE int num_row_vecs(const LowLatencyCall& call) { return call.hidden * 2 / static_cast<int>(sizeof(Vec16)); }
EP_DEVICE int num_chunks(const LowLatencyCall& call) { return (num_row_vecs(call) + kChunkVecs - 1) / kChunkVecs; }

// Vectors of this chunk: the last one may be short.
EP_DEVICE int num_chunk_vecs(const LowLatencyCall& call, int chunk) {
    const int rest = num_row_vecs(call) - chunk * kChunkVecs;
    return rest < kChunkVecs ? rest : kChunkVecs;
}

// This lane's piece, by `load(vector)`. Behind the end of the row: zeros.
template <class Load> EP_DEVICE Piece load_piece(Pieces pieces, int num_vecs, const Load& load) {
    Piece piece = {};
#pragma unroll
    for (int i = 0; i < kVecsOfPiece; ++i)
        if (const int vec = piece_vec(pieces, i); vec < num_vecs) piece.vec[i] = load(vec);
    return piece;
}

// To a chunk at `target`.
EP_DEVICE void store_piece(Pieces pieces, int num_vecs, const Piece& piece, Vec16* target) {
#pragma unroll
    for (int i = 0; i < kVecsOfPiece; ++i)
        if (const int vec = piece_vec(pieces, i); vec < num_vecs) prim::store_streaming(target + vec, piece.vec[i]);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
