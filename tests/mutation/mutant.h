// What generated copies of the kernels ask: is the mutant of this number the one that runs?
#pragma once

#include "device/prim.h"

namespace deep_ep::mutant {

constexpr int kMaxMutants = 4096;

inline int active = 0;  // 0: none, the kernels are as written
inline bool was_reached[kMaxMutants];

// Says so for one mutant, and notes that its place was reached. Not for ThreadSanitizer to look at.
#if defined(__clang__)
__attribute__((disable_sanitizer_instrumentation, noinline))
#endif
inline bool
is_active(int number) {
    was_reached[number] = true;
    return active == number;
}

}  // namespace deep_ep::mutant
