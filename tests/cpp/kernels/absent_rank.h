// Ranks that do not take part in a call, as those that do tell of them.
#pragma once

#include <doctest/doctest.h>

#include <initializer_list>
#include <string>

#include "core/error.h"
#include "support/world.h"

namespace deep_ep::test {

inline void check_absent_is_named(World& world, std::initializer_list<int> callers, int absent) {
    const std::string words = concat("never entered this call: rank ", absent);
    for (const int rank : callers) {
        CAPTURE(rank);
        CHECK_THROWS_WITH_AS(world.buffer(rank).check(), doctest::Contains(words.c_str()), TimeoutError);
    }
}

}  // namespace deep_ep::test
