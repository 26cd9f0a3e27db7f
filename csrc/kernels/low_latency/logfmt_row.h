// Rows of combine in the logarithmic format: a thread holds sixteen channels, eight threads share a scale.
#pragma once

#include "device/algo/logfmt.h"
#include "device/prim.h"
#include "layout/low_latency.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

constexpr int kLogUnit = static_cast<int>(layout::LogfmtRow::kUnit);
constexpr int kLogLanes = static_cast<int>(layout::LogfmtRow::kGroupSize) / kLogUnit;

// The whole warp: its lanes hold neighbouring units. Lanes behind the end of the row hold zeros and `is_inside` = false.
EP_DEVICE void store_logfmt(const float (&values)[kLogUnit], uint8_t* slot, const layout::LogfmtRow& row, int unit,
                            bool is_inside) {
    algo::LogRange range;
#pragma unroll
    for (float value : values) range.add(value);
#pragma unroll
    for (int distance = 1; distance < kLogLanes; distance *= 2) {
        const uint32_t lowest = __shfl_xor_sync(prim::kFullMask, range.lowest, distance);
        const uint32_t highest = __shfl_xor_sync(prim::kFullMask, range.highest, distance);
        range.lowest = lowest < range.lowest ? lowest : range.lowest;
        range.highest = highest > range.highest ? highest : range.highest;
    }
    if (!is_inside) return;
    const algo::LogScale scale = algo::log_scale(range);
    const algo::LogDivisor divisor = algo::log_divisor(scale.step);
    prim::Vec16 low = {};
    uint32_t high = 0;
#pragma unroll
    for (int i = 0; i < kLogUnit; ++i) {
        const uint32_t code = algo::log_encode(values[i], scale, divisor);
        low.word[i / 4] |= (code & 0xffu) << (8 * (i % 4));
        high |= code >> 8 << (2 * i);
    }
    const auto idx = static_cast<uint64_t>(unit);
    prim::store_streaming(reinterpret_cast<prim::Vec16*>(slot + row.low.at(idx * kLogUnit)), low);
    *reinterpret_cast<uint32_t*>(slot + row.high.at(idx)) = high;
    if (unit % kLogLanes != 0) return;
    auto* words = reinterpret_cast<uint32_t*>(slot + row.scales.at(2 * (idx / kLogLanes)));
    words[0] = scale.lowest;
    words[1] = scale.step;
}

// This thread; an acquire must come first.
EP_DEVICE void load_logfmt(float (&values)[kLogUnit], const uint8_t* slot, const layout::LogfmtRow& row, int unit) {
    const auto idx = static_cast<uint64_t>(unit);
    const prim::Vec16 low =
        prim::load_shared_with_peers(reinterpret_cast<const prim::Vec16*>(slot + row.low.at(idx * kLogUnit)));
    const uint32_t high = *reinterpret_cast<const uint32_t*>(slot + row.high.at(idx));
    const auto* words = reinterpret_cast<const uint32_t*>(slot + row.scales.at(2 * (idx / kLogLanes)));
    const algo::LogScale scale{words[0], words[1]};
#pragma unroll
    for (int i = 0; i < kLogUnit; ++i)
        values[i] = algo::log_decode((low.word[i / 4] >> (8 * (i % 4)) & 0xffu) | (high >> (2 * i) & 3u) << 8, scale);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
