// What every layout promises of its fields.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "layout/heap.h"

namespace deep_ep::layout {

inline void check_disjoint(std::vector<Field> fields, uint64_t total) {
    std::sort(fields.begin(), fields.end(), [](const Field& a, const Field& b) { return a.offset < b.offset; });
    for (size_t i = 1; i < fields.size(); ++i) CHECK_LE(fields[i - 1].end(), fields[i].offset);
    CHECK_LE(fields.back().end(), total);
}

}  // namespace deep_ep::layout
