// Division by a number that is the same for a whole launch: a multiplication, which the host prepares. A division of integers
// takes a GPU some thirty instructions, one after the other.
#pragma once

#include <cstdint>

namespace deep_ep::kernels {

struct Divisor {
    int value;
    uint32_t factor;  // 2^31 / value, rounded up

    // `value` > 0.
    static constexpr Divisor make(int value) {
        return {value, static_cast<uint32_t>(((uint64_t{1} << 31) + static_cast<uint64_t>(value) - 1) /
                                             static_cast<uint64_t>(value))};
    }
    // Exact for n >= 0 with n * value <= 2^31: the factor is too large by less than value / 2^31 of itself.
    constexpr int quotient(int n) const {
        return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * factor >> 31);
    }
    constexpr int rest(int n) const { return n - quotient(n) * value; }
};

}  // namespace deep_ep::kernels
