// Sums of bfloat16 in FP32, eight at a time: what a lane makes of sixteen bytes of each row.
#pragma once

#include "device/algo/bf16.h"
#include "device/prim.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

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

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
