// FP8 (E4M3, no infinities) by bits: the same rounding on every device.
#pragma once

#include <cstdint>

#include "device/algo/bf16.h"
#include "device/prim.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

constexpr float kFp8Max = 448.0f;

// Round to nearest, ties to even; saturates at 448; any NaN becomes 0x7f. Format: OCP 8-bit floating point, E4M3.
EP_HOST_DEVICE uint32_t fp8_e4m3_from_float(float value) {
    constexpr uint32_t kSmallestNormal = 0x3c800000u;  // 2^-6
    constexpr uint32_t kLargest = 0x7eu;
    const uint32_t bits = bits_from_float(value);
    const uint32_t sign = bits >> 24 & 0x80u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fu;
    if (magnitude < kSmallestNormal) {
        // Subnormal steps are 2^-9: the unit in the last place of 2^14 in FP32, so the addition rounds for us.
        const float shifted = float_from_bits(magnitude) + 16384.0f;
        return sign | (bits_from_float(shifted) - bits_from_float(16384.0f));
    }
    magnitude += 0x7ffffu + (magnitude >> 20 & 1u);
    const uint32_t rounded = (magnitude >> 20) - ((127u - 7u) << 3);
    return sign | (rounded < kLargest ? rounded : kLargest);
}

// Two at once, `low` in the lower byte; by the hardware where it can: the same bits.
EP_DEVICE uint32_t fp8_e4m3_pair(float low, float high) {
    if (prim::has_fp8_rounding()) return prim::round_to_e4m3x2(low, high);
    return fp8_e4m3_from_float(low) | fp8_e4m3_from_float(high) << 8;
}

// How one group of channels is scaled so that its largest element becomes 448: `inverse` is multiplied with, `scale` is
// sent along.
struct Fp8Scale {
    float scale;
    float inverse;
};

// `rounds_up`: the scale becomes a power of two, which costs range but no bits. A group of zeros is not divided by zero.
EP_HOST_DEVICE Fp8Scale fp8_scale(float largest, bool rounds_up) {
    constexpr float kSmallest = 1e-4f;
    largest = largest > kSmallest ? largest : kSmallest;
    const float scale = largest / kFp8Max;
    if (!rounds_up) return {scale, kFp8Max / largest};
    const uint32_t bits = bits_from_float(scale);
    const float power = float_from_bits((bits & 0x7fffffu) == 0 ? bits : (bits & 0x7f800000u) + 0x800000u);
    return {power, 1.0f / power};
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
