// Sums of rows in FP32, as both phases of combine make them: sixteen channels of a chunk in each lane.
#pragma once

#include "device/algo/bf16.h"
#include "kernels/low_latency/logfmt_row.h"
#include "kernels/low_latency/row.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

constexpr int kPairs = 4;                              // of bfloat16 in 16 bytes
constexpr int kRowsAhead = 4;                          // loads of so many rows are under way at once
static_assert(kVecsOfPiece * 2 * kPairs == kLogUnit);  // a piece is a unit of the logarithmic format

// Of eight elements.
struct Sums {
    float low[kPairs];
    float high[kPairs];
};

EP_DEVICE void add(Sums& sums, const Vec16& value, float weight) {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
        sums.low[pair] += weight * algo::bf16_low(value.word[pair]);
        sums.high[pair] += weight * algo::bf16_high(value.word[pair]);
    }
}

EP_DEVICE Vec16 rounded(const Sums& sums) {
    Vec16 value;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) value.word[pair] = prim::round_to_bf16x2(sums.low[pair], sums.high[pair]);
    return value;
}

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
template <bool kIsLogfmt> EP_DEVICE int lane_vec(int chunk, int i) {
    return chunk * kChunkVecs + piece_vec(kIsLogfmt ? Pieces::kNeighbours : Pieces::kHalves, i);
}

// This lane's piece of a row, by `load(vector)`. Behind the end of the row: zeros, for channels there share a scale with
// others.
template <bool kIsLogfmt, class Load>
EP_DEVICE Piece load_chunk(const LowLatencyCall& call, int chunk, const Load& load) {
    return load_piece(kIsLogfmt ? Pieces::kNeighbours : Pieces::kHalves, num_chunk_vecs(call, chunk),
                      [&](int vec) { return load(chunk * kChunkVecs + vec); });
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
