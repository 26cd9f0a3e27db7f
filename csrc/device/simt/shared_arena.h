// The shared memory of one block: static and dynamic part, each filled with a pattern and fenced by guard bytes.
#pragma once

#include <cstddef>
#include <memory>

namespace deep_ep::simt {

class SharedArena {
public:
    // The pattern reads as NaN in every floating-point type in use and as -1 in every integer type.
    static constexpr unsigned char kPattern = 0xff;

    void prepare(size_t static_bytes, size_t dynamic_bytes);
    void* static_part() const { return static_; }
    void* dynamic_part() const { return dynamic_; }
    bool contains(const void* ptr, size_t bytes) const;
    // Null, or which guard a kernel has written to.
    const char* find_damage() const;

private:
    struct Release {
        void operator()(unsigned char* ptr) const;
    };
    void fill_guards();

    static constexpr size_t kGuardBytes = 128;
    static constexpr size_t kAlignment = 128;
    static constexpr unsigned char kGuard = 0xb7;
    size_t capacity_ = 0;
    size_t static_bytes_ = 0;
    size_t dynamic_bytes_ = 0;
    std::unique_ptr<unsigned char, Release> memory_;
    unsigned char* static_ = nullptr;
    unsigned char* dynamic_ = nullptr;
};

}  // namespace deep_ep::simt
