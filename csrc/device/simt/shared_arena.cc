#include "device/simt/shared_arena.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "device/simt/context.h"
#include "device/simt/happens_before.h"

#if defined(EP_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#define EP_SIMT_GUARDS_TRAP true
#else
#define EP_SIMT_GUARDS_TRAP false
#define ASAN_POISON_MEMORY_REGION(addr, size) ((void)(addr), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(addr, size) ((void)(addr), (void)(size))
#endif

namespace deep_ep::simt {
namespace {

constexpr size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

[[maybe_unused]] bool is_intact(const unsigned char* begin, const unsigned char* end, unsigned char expected) {
    for (const unsigned char* p = begin; p != end; ++p) {
        if (*p != expected) return false;
    }
    return true;
}

}  // namespace

void SharedArena::Release::operator()(unsigned char* ptr) const { std::free(ptr); }

// guard | static | padding = guard | dynamic | guard
void SharedArena::prepare(size_t static_bytes, size_t dynamic_bytes) {
    static_bytes_ = static_bytes;
    dynamic_bytes_ = dynamic_bytes;
    const size_t needed = round_up(static_bytes, kAlignment) + round_up(dynamic_bytes, kAlignment) + 3 * kGuardBytes;
    if (needed > capacity_ || hb::kIsEnabled) {  // fresh memory for ThreadSanitizer: blocks are not ordered
        void* memory = std::aligned_alloc(kAlignment, needed);
        if (memory == nullptr) throw std::bad_alloc();
        memory_.reset(static_cast<unsigned char*>(memory));
        capacity_ = needed;
    }
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), capacity_);
    static_ = memory_.get() + kGuardBytes;
    dynamic_ = static_ + round_up(static_bytes, kAlignment) + kGuardBytes;
    std::memset(static_, kPattern, static_bytes);
    std::memset(dynamic_, kPattern, dynamic_bytes);
    fill_guards();
}

void SharedArena::fill_guards() {
    unsigned char* const end = dynamic_ + round_up(dynamic_bytes_, kAlignment) + kGuardBytes;
    std::memset(memory_.get(), kGuard, kGuardBytes);
    std::memset(static_ + static_bytes_, kGuard, static_cast<size_t>(dynamic_ - static_) - static_bytes_);
    std::memset(dynamic_ + dynamic_bytes_, kGuard, static_cast<size_t>(end - dynamic_) - dynamic_bytes_);
    ASAN_POISON_MEMORY_REGION(memory_.get(), kGuardBytes);
    ASAN_POISON_MEMORY_REGION(static_ + static_bytes_, static_cast<size_t>(dynamic_ - static_) - static_bytes_);
    ASAN_POISON_MEMORY_REGION(dynamic_ + dynamic_bytes_, static_cast<size_t>(end - dynamic_) - dynamic_bytes_);
}

bool SharedArena::contains(const void* ptr, size_t bytes) const {
    const auto* begin = static_cast<const unsigned char*>(ptr);
    const auto lies_in = [&](const unsigned char* part, size_t part_bytes) {
        return begin >= part && begin <= part + part_bytes && bytes <= static_cast<size_t>(part + part_bytes - begin);
    };
    return lies_in(static_, static_bytes_) || lies_in(dynamic_, dynamic_bytes_);
}

const char* SharedArena::find_damage() const {
    if (EP_SIMT_GUARDS_TRAP) return nullptr;  // they are poisoned: the access itself was reported
    const unsigned char* const end = dynamic_ + round_up(dynamic_bytes_, kAlignment) + kGuardBytes;
    if (!is_intact(memory_.get(), static_, kGuard)) return "before the static part";
    if (!is_intact(static_ + static_bytes_, dynamic_, kGuard)) return "after the static part (before the dynamic part)";
    if (!is_intact(dynamic_ + dynamic_bytes_, end, kGuard)) return "after the dynamic part";
    return nullptr;
}

}  // namespace deep_ep::simt
