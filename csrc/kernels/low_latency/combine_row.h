// Rows of combine: chunks of bfloat16 on the way in, sums in FP32, rounded or packed on the way to their owner.
#pragma once

#include <type_traits>

#include "device/algo/bf16.h"
#include "kernels/low_latency/logfmt_row.h"
#include "kernels/low_latency/row.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

constexpr int kPairs = 4;  // of bfloat16 in 16 bytes
static_assert(kVecsOfPiece * 2 * kPairs == kLogUnit);

template <bool kIsLogfmt> constexpr Pieces kPieces = kIsLogfmt ? Pieces::kNeighbours : Pieces::kHalves;

// Of a piece.
struct Sums {
    float low[kVecsOfPiece][kPairs];
    float high[kVecsOfPiece][kPairs];
};

EP_DEVICE void add(Sums& sums, const Piece& piece, float weight) {
#pragma unroll
    for (int i = 0; i < kVecsOfPiece; ++i)
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            sums.low[i][pair] += weight * algo::bf16_low(piece.vec[i].word[pair]);
            sums.high[i][pair] += weight * algo::bf16_high(piece.vec[i].word[pair]);
        }
}

EP_DEVICE Piece rounded(const Sums& sums) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < kVecsOfPiece; ++i)
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair)
            piece.vec[i].word[pair] = prim::round_to_bf16x2(sums.low[i][pair], sums.high[i][pair]);
    return piece;
}

// Of a row of bfloat16 that begins at `row`.
template <bool kIsLogfmt>
EP_DEVICE void store_rounded(const LowLatencyCall& call, const Sums& sums, int chunk, uint8_t* row) {
    store_piece(kPieces<kIsLogfmt>, num_chunk_vecs(call, chunk), rounded(sums),
                reinterpret_cast<Vec16*>(row) + chunk * kChunkVecs);
}

EP_DEVICE layout::LogfmtRow logfmt_row(const LowLatencyCall& call) {
    return layout::LogfmtRow::make(static_cast<uint64_t>(call.hidden));
}

EP_DEVICE int log_unit(int chunk) { return chunk * kWarpSize + prim::lane_idx(); }

// The whole warp.
EP_DEVICE void store_packed(const LowLatencyCall& call, const Sums& sums, int chunk, uint8_t* slot) {
    const auto row = logfmt_row(call);
    float values[kLogUnit];
#pragma unroll
    for (int i = 0; i < kLogUnit / 2; ++i) {
        values[2 * i] = sums.low[i / kPairs][i % kPairs];
        values[2 * i + 1] = sums.high[i / kPairs][i % kPairs];
    }
    store_logfmt(values, slot, row, log_unit(chunk), log_unit(chunk) < static_cast<int>(row.high.count));
}

// The whole warp: a part of the token's sum, to its owner's slot.
template <bool kIsLogfmt>
EP_DEVICE void store_part(const LowLatencyCall& call, const Sums& sums, int chunk, uint8_t* slot) {
    if constexpr (kIsLogfmt)
        store_packed(call, sums, chunk, slot);
    else
        store_rounded<false>(call, sums, chunk, slot);
}

// What a lane reads of such a part.
template <bool kIsLogfmt> using Part = std::conditional_t<kIsLogfmt, LogPiece, Piece>;

// This thread; an acquire must come first.
template <bool kIsLogfmt>
EP_DEVICE Part<kIsLogfmt> load_part(const LowLatencyCall& call, const uint8_t* slot, int chunk) {
    if constexpr (kIsLogfmt) {
        const auto row = logfmt_row(call);
        return log_unit(chunk) < static_cast<int>(row.high.count) ? load_logfmt(slot, row, log_unit(chunk))
                                                                  : LogPiece{};
    } else {
        const auto* vecs = reinterpret_cast<const Vec16*>(slot) + chunk * kChunkVecs;
        return load_piece(Pieces::kHalves, num_chunk_vecs(call, chunk),
                          [&](int vec) { return prim::load_shared_with_peers(vecs + vec); });
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

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
