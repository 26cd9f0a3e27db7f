// Sums of rows in FP32, as both phases of combine make them: sixteen channels of a chunk in each lane.
#pragma once

#include "device/algo/formats.h"
#include "kernels/low_latency/bf16_row.h"
#include "kernels/low_latency/logfmt_row.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

using algo::kPairs;
using Sums = algo::Bf16Sums;

constexpr int kRowsAhead = 4;                          // loads of so many rows are under way at once
static_assert(kVecsOfPiece * 2 * kPairs == kLogUnit);  // a piece is a unit of the logarithmic format

// The logarithmic format packs channels that stand together.
template <bool kIsLogfmt> constexpr Pieces kPieces = kIsLogfmt ? Pieces::kNeighbours : Pieces::kInterleaved;

EP_DEVICE void copy_values(const Sums (&sums)[kVecsOfPiece], float (&values)[kLogUnit]) {
#pragma unroll
    for (int i = 0; i < kLogUnit / 2; ++i) {
        values[2 * i] = sums[i / kPairs].low[i % kPairs];
        values[2 * i + 1] = sums[i / kPairs].high[i % kPairs];
    }
}

EP_DEVICE void add_values(Sums (&sums)[kVecsOfPiece], const float (&values)[kLogUnit]) {
#pragma unroll
    for (int i = 0; i < kLogUnit / 2; ++i) {
        sums[i / kPairs].low[i % kPairs] += values[2 * i];
        sums[i / kPairs].high[i % kPairs] += values[2 * i + 1];
    }
}

// This lane's vector of a chunk, in its row.
template <bool kIsLogfmt> EP_DEVICE int lane_vec(Warp warp, int chunk, int i) {
    return chunk * kChunkVecs + algo::piece_vec<kVecsOfPiece>(warp, kPieces<kIsLogfmt>, i);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
