// bfloat16 in pairs, by bits: the same rounding on every device.
#pragma once

#include <cstdint>
#include <cstring>

#include "device/compiler.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

EP_HOST_DEVICE float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

EP_HOST_DEVICE uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

EP_HOST_DEVICE float bf16_low(uint32_t pair) { return float_from_bits(pair << 16); }
EP_HOST_DEVICE float bf16_high(uint32_t pair) { return float_from_bits(pair & 0xffff0000u); }

// What prim::round_to_bf16x2 does to each half, for host code: nearest, ties to even; any NaN becomes 0x7fff.
EP_HOST_DEVICE uint32_t bf16_from_float(float value) {
    const uint32_t bits = bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
