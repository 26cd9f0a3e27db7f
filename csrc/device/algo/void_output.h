// What a call that fails leaves in its outputs: nothing that passes for a result.
#pragma once

#include "device/algo/group.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// NaN in bfloat16, float32, E4M3 and, as exponents, UE8M0; -1 as an index.
constexpr uint32_t kVoidWord = 0xffffffffu;

EP_DEVICE prim::Vec16 void_vec() { return {{kVoidWord, kVoidWord, kVoidWord, kVoidWord}}; }

// Null: there is no such output.
template <class Group> EP_DEVICE void void_output(const Group& group, void* output, int64_t num_bytes) {
    if (output == nullptr) return;
    auto* words = static_cast<uint32_t*>(output);
    for_each(group, num_bytes / 4, [&](int64_t i) { words[i] = kVoidWord; });
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
