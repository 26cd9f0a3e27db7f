// What was complained of.
#pragma once

#include <functional>
#include <string>

#include "core/error.h"
#include "support/testing.h"

namespace deep_ep::testing {

// What `work` throws, or "".
inline std::string error_of(const std::function<void()>& work) {
    try {
        work();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

inline bool contains(const std::string& text, const std::string& part) {
    const bool is_there = text.find(part) != std::string::npos;
    if (!is_there) MESSAGE("got: " << text);
    return is_there;
}

}  // namespace deep_ep::testing
