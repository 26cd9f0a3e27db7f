// A 10-bit logarithmic format for rows that are summed at the other end: a sign, and a 9-bit step on a scale that is
// even in the logarithm of the magnitude and fitted to the 128 channels of a group.
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
#pragma once

#include <cstdint>

#include "device/algo/bf16.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

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
