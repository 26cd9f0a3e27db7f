// Rows of combine, as a warp works on them: a chunk of 512 channels at a time, sixteen of them in each lane.
#pragma once

#include <type_traits>

#include "device/algo/bf16.h"
#include "kernels/low_latency/frame.h"
#include "kernels/low_latency/logfmt_row.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

using Params = LowLatencyCombineParams;

constexpr int kPairs = 4;                             // of bfloat16 in 16 bytes
constexpr int kVecsOfPiece = 2;                       // that a lane has of a chunk
constexpr int kChunkVecs = kVecsOfPiece * kWarpSize;  // that a warp works on at once
static_assert(kVecsOfPiece * 2 * kPairs == kLogUnit);
static_assert(kChunkVecs * sizeof(Vec16) == layout::kLowLatencyChunkBytes);

// One lane's part of a chunk.
struct Piece {
    Vec16 vec[kVecsOfPiece];
};

// The same, as FP32 sums.
struct Sums {
    float low[kVecsOfPiece][kPairs];
    float high[kVecsOfPiece][kPairs];
};

EP_DEVICE int num_vecs(const Params& p) { return p.call.hidden * 2 / static_cast<int>(sizeof(Vec16)); }
EP_DEVICE int num_chunks(const Params& p) { return (num_vecs(p) + kChunkVecs - 1) / kChunkVecs; }

// Which vectors of a chunk a lane has: two neighbours in the logarithmic format, or one in each half of the chunk.
template <bool kIsLogfmt> EP_DEVICE int piece_vec(int i) {
    return kIsLogfmt ? prim::lane_idx() * kVecsOfPiece + i : i * kWarpSize + prim::lane_idx();
}

// This lane's piece, by `load(vector of the chunk)`. Behind the end of the row: zeros.
template <bool kIsLogfmt, class Load> EP_DEVICE Piece load_piece(const Params& p, int chunk, const Load& load) {
    Piece piece = {};
#pragma unroll
    for (int i = 0; i < kVecsOfPiece; ++i) {
        const int vec = piece_vec<kIsLogfmt>(i);
        if (chunk * kChunkVecs + vec < num_vecs(p)) piece.vec[i] = load(vec);
    }
    return piece;
}

EP_DEVICE void add(Sums& sums, const Piece& piece, float weight) {
#pragma unroll
    for (int i = 0; i < kVecsOfPiece; ++i)
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            sums.low[i][pair] += weight * algo::bf16_low(piece.vec[i].word[pair]);
            sums.high[i][pair] += weight * algo::bf16_high(piece.vec[i].word[pair]);
        }
}

// Rounded to bfloat16, to a row at `target`. `kIsLogfmt`: which channels the lane has.
template <bool kIsLogfmt> EP_DEVICE void store_rounded(const Params& p, const Sums& sums, int chunk, uint8_t* target) {
#pragma unroll
    for (int i = 0; i < kVecsOfPiece; ++i) {
        const int vec = chunk * kChunkVecs + piece_vec<kIsLogfmt>(i);
        Vec16 value;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair)
            value.word[pair] = prim::round_to_bf16x2(sums.low[i][pair], sums.high[i][pair]);
        if (vec < num_vecs(p)) prim::store_streaming(reinterpret_cast<Vec16*>(target) + vec, value);
    }
}

EP_DEVICE layout::LogfmtRow logfmt_row(const Params& p) {
    return layout::LogfmtRow::make(static_cast<uint64_t>(p.call.hidden));
}

// The whole warp: packed, to a slot.
EP_DEVICE void store_packed(const Params& p, const Sums& sums, int chunk, uint8_t* slot) {
    const auto row = logfmt_row(p);
    const int unit = chunk * kWarpSize + prim::lane_idx();
    float values[kLogUnit];
#pragma unroll
    for (int i = 0; i < kLogUnit / 2; ++i) {
        values[2 * i] = sums.low[i / kPairs][i % kPairs];
        values[2 * i + 1] = sums.high[i / kPairs][i % kPairs];
    }
    store_logfmt(values, slot, row, unit, unit < static_cast<int>(row.high.count));
}

// What one rank has sent, as a lane holds it: rounded or packed.
template <bool kIsLogfmt> using Part = std::conditional_t<kIsLogfmt, LogPiece, Piece>;

// This thread; an acquire must come first.
template <bool kIsLogfmt> EP_DEVICE Part<kIsLogfmt> load_part(const Params& p, const uint8_t* slot, int chunk) {
    if constexpr (kIsLogfmt) {
        const auto row = logfmt_row(p);
        const int unit = chunk * kWarpSize + prim::lane_idx();
        return unit < static_cast<int>(row.high.count) ? load_logfmt(slot, row, unit) : LogPiece{};
    } else {
        const auto* vecs = reinterpret_cast<const Vec16*>(slot) + chunk * kChunkVecs;
        return load_piece<false>(p, chunk, [&](int vec) { return prim::load_shared_with_peers(vecs + vec); });
    }
}

EP_DEVICE void add_part(Sums& sums, const Piece& part) { add(sums, part, 1.0f); }

EP_DEVICE void add_part(Sums& sums, const LogPiece& part) {
#pragma unroll
    for (int i = 0; i < kLogUnit / 2; ++i) {
        sums.low[i / kPairs][i % kPairs] += part.decode(2 * i);
        sums.high[i / kPairs][i % kPairs] += part.decode(2 * i + 1);
    }
}

// The whole warp: to a slot.
template <bool kIsLogfmt> EP_DEVICE void store_part(const Params& p, const Sums& sums, int chunk, uint8_t* slot) {
    if constexpr (kIsLogfmt)
        store_packed(p, sums, chunk, slot);
    else
        store_rounded<false>(p, sums, chunk, slot);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
