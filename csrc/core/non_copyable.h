// Base of classes that own something, or that change something for as long as they live: there is one of each.
#pragma once

namespace deep_ep {

class NonCopyable {
protected:
    NonCopyable() = default;
    ~NonCopyable() = default;

public:
    NonCopyable(const NonCopyable&) = delete;
    NonCopyable& operator=(const NonCopyable&) = delete;
};

}  // namespace deep_ep
