// What the executor has complained of.
#pragma once

#include <doctest/doctest.h>

#include <string>

inline bool contains(const std::string& text, const std::string& part) {
    const bool is_there = text.find(part) != std::string::npos;
    if (!is_there) MESSAGE("got: " << text);
    return is_there;
}
