// Rows of 16-byte vectors, as a warp works on them: a chunk at a time, of which each lane has a piece.
#pragma once

#include "device/algo/group.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// Which vectors of a chunk a lane has.
enum class Pieces {
    kInterleaved,  // every 32nd: what a warp reads or writes at once stands together
    kNeighbours,   // vectors that stand together, for formats that pack them
};

// One lane's part of a chunk.
template <int kVecs> struct Piece { prim::Vec16 vec[kVecs]; };

template <int kVecs> constexpr int kChunkVecs = kVecs* prim::kWarpSize;  // that a warp works on at once

// Where vector `i` of this lane's piece stands in its chunk.
template <int kVecs> EP_DEVICE int piece_vec(Warp warp, Pieces pieces, int i) {
    return pieces == Pieces::kNeighbours ? warp.thread_rank() * kVecs + i : i * prim::kWarpSize + warp.thread_rank();
}

// Calls `work(i, vec)` for each vector of this lane's piece that lies before `end`, both counted from the chunk's begin.
template <int kVecs, class Work> EP_DEVICE void for_piece(Warp warp, Pieces pieces, int end, const Work& work) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
        if (const int vec = piece_vec<kVecs>(warp, pieces, i); vec < end) work(i, vec);
}

// By `load(vec)`. Behind `end` the piece is what it was.
template <int kVecs, class Load>
EP_DEVICE void load_piece(Warp warp, Pieces pieces, Piece<kVecs>& piece, int end, const Load& load) {
    for_piece<kVecs>(warp, pieces, end, [&](int i, int vec) { piece.vec[i] = load(vec); });
}

// To a chunk at `target`.
template <int kVecs>
EP_DEVICE void store_piece(Warp warp, Pieces pieces, const Piece<kVecs>& piece, int end, prim::Vec16* target) {
    for_piece<kVecs>(warp, pieces, end, [&](int i, int vec) { prim::store_streaming(target + vec, piece.vec[i]); });
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
