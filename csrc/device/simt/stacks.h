// Stacks for the fibers of a block: one mapping for all of them, reused between launches. Memory is touched lazily, so
// a stack costs one page until a kernel needs more.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include "core/non_copyable.h"

namespace deep_ep::simt {

class StackSlab : NonCopyable {
public:
    StackSlab(int count, size_t stack_bytes);
    ~StackSlab();

    int count() const { return count_; }
    size_t stack_bytes() const { return stack_bytes_; }

    // Bounds of one fiber's stack. Tops are staggered: equal ones would share a few cache sets and halve the speed.
    char* low(int index) const { return stacks_ + stack_bytes_ * static_cast<size_t>(index); }
    char* top(int index) const { return low(index) + stack_bytes_ - kCanaryBytes - kStaggerBytes * (index % 16); }

    void arm_canaries();
    // Index of a stack whose owner ran over its end, or -1. The canary above stack i is hit by fiber i + 1.
    int find_overflow() const;

private:
    void unpoison();

    static constexpr size_t kCanaryBytes = 64;
    static constexpr size_t kStaggerBytes = 128;

    int count_;
    size_t stack_bytes_;
    size_t mapped_bytes_;
    char* mapping_;
    char* stacks_;
};

class StackPool {
public:
    std::unique_ptr<StackSlab> take(int count, size_t stack_bytes);
    void give_back(std::unique_ptr<StackSlab> slab);

private:
    static constexpr size_t kMaxPooledStacks = 131072;
    std::map<std::pair<int, size_t>, std::vector<std::unique_ptr<StackSlab>>> free_;
    size_t num_pooled_ = 0;
};

}  // namespace deep_ep::simt
