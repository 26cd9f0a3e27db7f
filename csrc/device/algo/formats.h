// Numbers by their bits: bfloat16, FP8, and ten bits on a logarithmic scale. The same rounding on every device.
#pragma once

#include <cstdint>
#include <cstring>

#include "device/compiler.h"
#include "device/prim.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// -- bfloat16 in pairs -----------------------------------------------------------------------------------------------

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

// -- Sums of bfloat16 in FP32, eight at a time: what a lane makes of sixteen bytes of each row -----------------------

constexpr int kPairs = 4;  // of bfloat16 in 16 bytes

struct Bf16Sums {
    float low[kPairs];
    float high[kPairs];

    EP_DEVICE void add(const prim::Vec16& value) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            low[pair] += bf16_low(value.word[pair]);
            high[pair] += bf16_high(value.word[pair]);
        }
    }

    EP_DEVICE void add(const prim::Vec16& value, float weight) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            low[pair] += weight * bf16_low(value.word[pair]);
            high[pair] += weight * bf16_high(value.word[pair]);
        }
    }

    EP_DEVICE prim::Vec16 rounded() const {
        prim::Vec16 value;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) value.word[pair] = prim::round_to_bf16x2(low[pair], high[pair]);
        return value;
    }
};

// -- FP8 (E4M3, no infinities) ---------------------------------------------------------------------------------------

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

// -- Ten bits on a logarithmic scale, for rows that are summed at the other end --------------------------------------
// A sign, and a 9-bit step on a scale that is even in the logarithm of the magnitude and fitted to the 128 channels of a group.
//
// The logarithm is that which floating-point numbers carry: the bits of a positive float, as an integer, are 2^23 times
// its base-2 logarithm, drawn straight between powers of two. Hence integers all the way, the same on every device.
//
//   code 0         zero
//   codes 1..510   bits = lowest + (code - 1) * step
//   code 511       not finite: NaN, and infinities become NaN
//
// The scale spans from the smallest to the largest magnitude of the group, kLogOctaves octaves at most; what is smaller
// becomes zero or the lowest step, whichever is nearer. Error: see logfmt_test.cc and docs/protocols/low_latency.md.

constexpr uint32_t kLogOctaves = 12;
constexpr uint32_t kLogSteps = 509;
constexpr uint32_t kLogNotFinite = 511;
constexpr uint32_t kLogSign = 512;
constexpr uint32_t kFloatOctave = 1u << 23;
constexpr uint32_t kFloatInfinity = 0x7f800000u;

struct LogScale {
    uint32_t lowest;  // bits of the magnitude of code 1
    uint32_t step;
};

// The magnitudes of a group that count for its scale: the smallest that is not zero, and the largest; finite ones only.
struct LogRange {
    uint32_t lowest = 0xffffffffu;
    uint32_t highest = 0;

    EP_HOST_DEVICE void add(float value) {
        const uint32_t magnitude = bits_from_float(value) & 0x7fffffffu;
        if (magnitude == 0 || magnitude >= kFloatInfinity) return;
        lowest = magnitude < lowest ? magnitude : lowest;
        highest = magnitude > highest ? magnitude : highest;
    }
};

EP_HOST_DEVICE LogScale log_scale(const LogRange& range) {
    if (range.highest == 0) return {1, 1};
    constexpr uint32_t kSpan = kLogOctaves * kFloatOctave;
    const uint32_t floor = range.highest > kSpan ? range.highest - kSpan : 0;
    const uint32_t lowest = range.lowest > floor ? range.lowest : floor;
    const uint32_t step = (range.highest - lowest + kLogSteps - 1) / kLogSteps;
    return {lowest, step > 0 ? step : 1};
}

// Divides by the step of a scale: a multiplication and a shift for each channel, where a division is twenty instructions.
// Exact for dividends below 2^27, and a group spans less: the factor is 2^(27 + shift) / step, rounded up, and 2^shift
// the power of two from the step on.
struct LogDivisor {
    uint32_t factor;  // at most 2^28
    uint32_t shift;

    EP_HOST_DEVICE uint32_t quotient(uint32_t dividend) const {
        return static_cast<uint32_t>(static_cast<uint64_t>(dividend << 5) * factor >> 32) >> shift;
    }
};
constexpr uint32_t kLogDividendBits = 27;
static_assert(kLogOctaves * kFloatOctave + kLogOctaves * kFloatOctave / kLogSteps < 1u << kLogDividendBits);

EP_HOST_DEVICE LogDivisor log_divisor(uint32_t step) {
    // The exponent of a float, for want of an instruction that host and device share.
    const uint32_t shift = (bits_from_float(static_cast<float>(2 * step - 1)) >> 23) - 127;
    // 2^(27 + shift) has up to 46 bits: divided in two pieces.
    const uint32_t exponent = kLogDividendBits + shift;
    const uint32_t first = exponent < 31 ? exponent : 31;
    const uint32_t high = (1u << first) / step;
    const uint32_t rest = ((1u << first) - high * step) << (exponent - first);
    const uint32_t low = rest / step;
    return {(high << (exponent - first)) + low + (low * step != rest ? 1 : 0), shift};
}

EP_HOST_DEVICE uint32_t log_encode(float value, const LogScale& scale, const LogDivisor& divisor) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t sign = bits >> 31 != 0 ? kLogSign : 0;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude >= kFloatInfinity) return kLogNotFinite;
    // Half of the lowest step's value is an octave below it.
    if (magnitude < scale.lowest) return sign | (magnitude == 0 || magnitude + kFloatOctave < scale.lowest ? 0u : 1u);
    return sign | (1 + divisor.quotient(magnitude - scale.lowest + scale.step / 2));
}

EP_HOST_DEVICE float log_decode(uint32_t code, const LogScale& scale) {
    const uint32_t sign = (code & kLogSign) << 22;
    const uint32_t step = code & (kLogSign - 1);
    if (step == 0) return float_from_bits(sign);
    if (step == kLogNotFinite) return float_from_bits(0x7fc00000u);
    const uint32_t magnitude = scale.lowest + (step - 1) * scale.step;
    return float_from_bits(sign | (magnitude < kFloatInfinity ? magnitude : kFloatInfinity - 1));
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
