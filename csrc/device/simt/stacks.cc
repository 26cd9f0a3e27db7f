#include "device/simt/stacks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "core/error.h"
#include "device/simt/context.h"
#include "device/simt/happens_before.h"

#if defined(EP_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace deep_ep::simt {
namespace {
constexpr uint64_t kCanary = 0x5afec0de5afec0deull;
}

StackSlab::StackSlab(int count, size_t stack_bytes) : count_(count), stack_bytes_(stack_bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    EP_ENSURE(stack_bytes_ % page == 0 && stack_bytes_ >= 2 * page, "stack_bytes must be a multiple of ", page,
              " and at least twice that, got ", stack_bytes_);
    // Below stack 0: a spare stack, which an overflow may damage without harm, then a page that traps.
    mapped_bytes_ = page + stack_bytes_ * (static_cast<size_t>(count_) + 1);
    void* mapping = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (mapping == MAP_FAILED) {
        throw Error(
            concat("cannot map ", mapped_bytes_, " bytes of stacks for ", count_, " fibers: ", std::strerror(errno)));
    }
    mapping_ = static_cast<char*>(mapping);
    mprotect(mapping_, page, PROT_NONE);
    stacks_ = mapping_ + page + stack_bytes_;
}

StackSlab::~StackSlab() {
    unpoison();  // whatever is mapped here next
    munmap(mapping_, mapped_bytes_);
}

// The last frame of a fiber never returns, so what AddressSanitizer marked around it stays marked.
void StackSlab::unpoison() {
#if defined(EP_SIMT_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(stacks_ - stack_bytes_, stack_bytes_ * (static_cast<size_t>(count_) + 1));
#endif
}

void StackSlab::arm_canaries() {
    unpoison();
    for (int i = 0; i < count_; ++i) {
        auto* words = reinterpret_cast<uint64_t*>(low(i) + stack_bytes_ - kCanaryBytes);
        for (size_t w = 0; w < kCanaryBytes / sizeof(uint64_t); ++w) words[w] = kCanary;
    }
}

int StackSlab::find_overflow() const {
    for (int i = 0; i + 1 < count_; ++i) {
        const auto* words = reinterpret_cast<const uint64_t*>(low(i) + stack_bytes_ - kCanaryBytes);
        for (size_t w = 0; w < kCanaryBytes / sizeof(uint64_t); ++w) {
            if (words[w] != kCanary) return i + 1;
        }
    }
    return -1;
}

std::unique_ptr<StackSlab> StackPool::take(int count, size_t stack_bytes) {
    auto& slabs = free_[{count, stack_bytes}];
    std::unique_ptr<StackSlab> slab;
    if (slabs.empty()) {
        slab = std::make_unique<StackSlab>(count, stack_bytes);
    } else {
        slab = std::move(slabs.back());
        slabs.pop_back();
        num_pooled_ -= static_cast<size_t>(count);
    }
    slab->arm_canaries();
    return slab;
}

void StackPool::give_back(std::unique_ptr<StackSlab> slab) {
    if (hb::kIsEnabled) return;  // ThreadSanitizer would take the next owner of these addresses for the last one
    const auto count = static_cast<size_t>(slab->count());
    if (num_pooled_ + count > kMaxPooledStacks) return;
    num_pooled_ += count;
    free_[{slab->count(), slab->stack_bytes()}].push_back(std::move(slab));
}

}  // namespace deep_ep::simt
