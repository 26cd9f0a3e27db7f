// What every primitive tells the executor: "about to synchronise" and "this is what I saw". Inline, because polling
// loops spend their time here. Outside a kernel (a host thread that peeks at a flag) all of it does nothing.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

// Code of the executor that is inlined into kernels, which ThreadSanitizer must not see.
#if defined(EP_SIMT_TSAN)
#define EP_SIMT_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define EP_SIMT_UNSEEN
#endif

namespace deep_ep::simt {

// Which memory a fiber looked at since its last pause. Two pauses in a row with equal records and nothing changed by
// anybody in between: the fiber will go on like this for ever.
struct PollRecord {
    uint64_t hash = 0;  // of every (address, value) seen
    const void* address = nullptr;
    uint64_t value = 0;
    uint32_t num_loads = 0;
    uint32_t num_repeats = 0;  // of the last of them, in a row
    bool has_read_clock = false;
    bool has_changed_memory = false;
};

struct Running {
    PollRecord* poll;  // of the running fiber; null outside kernels
    bool is_seeded;    // yield at random before accesses
};
extern __thread Running running;

// Seeded schedules: lets others run first, at random.
void perturb();

// Fibers give way only where they say so: a thread that looks at one word this often in a row would go on for ever.
constexpr uint32_t kMaxSpins = 1 << 20;
[[noreturn]] void report_spin(const void* ptr);

[[noreturn]] void report_misaligned(const void* ptr, size_t alignment);

inline void check_aligned(const void* ptr, size_t alignment) {
    if (__builtin_expect(reinterpret_cast<uintptr_t>(ptr) % alignment != 0, 0)) report_misaligned(ptr, alignment);
}

EP_SIMT_UNSEEN inline void before_access(const void* ptr, size_t alignment) {
    check_aligned(ptr, alignment);
    if (__builtin_expect(running.is_seeded, 0)) perturb();
    std::atomic_signal_fence(std::memory_order_seq_cst);
}

EP_SIMT_UNSEEN inline void note_load(const void* ptr, uint64_t value) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    PollRecord* poll = running.poll;
    if (poll == nullptr) return;
    poll->hash = (poll->hash ^ reinterpret_cast<uintptr_t>(ptr)) * 0x9e3779b97f4a7c15ull + value;
    if (poll->address == ptr && poll->value == value) {
        if (++poll->num_repeats == kMaxSpins) report_spin(ptr);
    } else {
        poll->num_repeats = 0;
    }
    poll->address = ptr;
    poll->value = value;
    ++poll->num_loads;
}

EP_SIMT_UNSEEN inline void note_change() {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (running.poll != nullptr) running.poll->has_changed_memory = true;
}

// --- primitives that are too large to inline; see prim.h for their contracts ------------------------------------
enum class BulkPart { kRead, kAll };

void mbarrier_init(uint64_t* state, uint32_t arrivals);
void mbarrier_arrive(uint64_t* state, bool has_bytes, uint32_t bytes);
bool mbarrier_try_wait(uint64_t* state, uint32_t phase_parity);
void bulk_load(void* shared_dst, const void* global_src, uint32_t bytes, uint64_t* mbarrier_state);
void bulk_store(void* global_dst, const void* shared_src, uint32_t bytes);
void bulk_commit();
void bulk_wait(int max_unfinished, BulkPart part);
bool has_bulk_copy();
uint64_t clock_ns();
void expect_warp(const char* what);
void expect_block(const char* what);
void pause();
void wake_host(uint32_t* is_asleep, int event);
void* dynamic_shared();

// Says in words what the running fiber waits for, for deadlock reports; cleared by its next pause-free stretch. `what`
// must live for ever (a literal).
void describe_wait(const char* what, int64_t detail = 0);

}  // namespace deep_ep::simt
