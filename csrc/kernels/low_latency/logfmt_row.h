// Rows of combine in the logarithmic format: a thread holds sixteen channels, eight threads share a scale.
#pragma once

#include "device/algo/formats.h"
#include "device/algo/group.h"
#include "device/prim.h"
#include "layout/heap.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

constexpr int kLogUnit = static_cast<int>(layout::LogfmtRow::kUnit);
constexpr int kLogLanes = static_cast<int>(layout::LogfmtRow::kGroupSize) / kLogUnit;

// One unit in codes.
struct LogUnit {
    prim::Vec16 low;
    uint32_t high;
    algo::LogScale scale;  // of its group
};

// The lanes hold neighbouring units; those behind the end of the row hold zeros.
EP_DEVICE LogUnit encode_logfmt(algo::Warp warp, const float (&values)[kLogUnit]) {
    warp.expect();
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
    LogUnit codes = {{}, 0, algo::log_scale(range)};
    const algo::LogDivisor divisor = algo::log_divisor(codes.scale.step);
#pragma unroll
    for (int i = 0; i < kLogUnit; ++i) {
        const uint32_t code = algo::log_encode(values[i], codes.scale, divisor);
        codes.low.word[i / 4] |= (code & 0xffu) << (8 * (i % 4));
        codes.high |= code >> 8 << (2 * i);
    }
    return codes;
}

EP_DEVICE void decode_logfmt(float (&values)[kLogUnit], const LogUnit& codes) {
#pragma unroll
    for (int i = 0; i < kLogUnit; ++i)
        values[i] = algo::log_decode(
            (codes.low.word[i / 4] >> (8 * (i % 4)) & 0xffu) | (codes.high >> (2 * i) & 3u) << 8, codes.scale);
}

// As encode_logfmt. Lanes behind the end of the row have `is_inside` = false.
EP_DEVICE void store_logfmt(algo::Warp warp, const float (&values)[kLogUnit], uint8_t* slot,
                            const layout::LogfmtRow& row, int unit, bool is_inside) {
    const LogUnit codes = encode_logfmt(warp, values);
    if (!is_inside) return;
    const auto idx = static_cast<uint64_t>(unit);
    prim::store_streaming(reinterpret_cast<prim::Vec16*>(slot + row.low.at(idx * kLogUnit)), codes.low);
    *reinterpret_cast<uint32_t*>(slot + row.high.at(idx)) = codes.high;
    if (unit % kLogLanes != 0) return;
    auto* words = reinterpret_cast<uint32_t*>(slot + row.scales.at(2 * (idx / kLogLanes)));
    words[0] = codes.scale.lowest;
    words[1] = codes.scale.step;
}

// This thread; an acquire must come first.
EP_DEVICE LogUnit load_logfmt(const uint8_t* slot, const layout::LogfmtRow& row, int unit) {
    const auto idx = static_cast<uint64_t>(unit);
    const auto* words = reinterpret_cast<const uint32_t*>(slot + row.scales.at(2 * (idx / kLogLanes)));
    return {prim::load_shared_with_peers(reinterpret_cast<const prim::Vec16*>(slot + row.low.at(idx * kLogUnit))),
            *reinterpret_cast<const uint32_t*>(slot + row.high.at(idx)),
            {words[0], words[1]}};
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
