// The SIMT half of prim.h: compiler builtins plus notes to the executor.
#pragma once

#include <cstring>

#include "core/error.h"
#include "device/simt/access.h"
#include "device/simt/cuda_names.h"
#include "device/simt/happens_before.h"

namespace deep_ep::prim {
inline namespace EP_BACKEND {
namespace detail {

// For ThreadSanitizer kernels synchronise through happens_before.h alone, which knows scopes; what a host thread may
// take up with an atomic of its own is still released the usual way.
constexpr int builtin_order(Order order, Scope scope) {
    if (simt::hb::kIsEnabled) {
        const bool is_release = order == Order::kRelease || order == Order::kAcqRel;
        return is_release && scope == Scope::kSys ? __ATOMIC_RELEASE : __ATOMIC_RELAXED;
    }
    switch (order) {
        case Order::kRelaxed: return __ATOMIC_RELAXED;
        case Order::kAcquire: return __ATOMIC_ACQUIRE;
        case Order::kRelease: return __ATOMIC_RELEASE;
        case Order::kAcqRel: return __ATOMIC_ACQ_REL;
    }
    return __ATOMIC_SEQ_CST;
}

constexpr bool is_acquire(Order order) { return order == Order::kAcquire || order == Order::kAcqRel; }
constexpr bool is_release(Order order) { return order == Order::kRelease || order == Order::kAcqRel; }

template <class T> constexpr void check_word() {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "4- or 8-byte integers only");
}

}  // namespace detail

template <Order O, Scope S, class T> EP_DEVICE T load(const T* ptr) {
    detail::check_word<T>();
    static_assert(O == Order::kRelaxed || O == Order::kAcquire);
    simt::before_access(ptr, sizeof(T));
    const T value = __atomic_load_n(ptr, detail::builtin_order(O, S));
    simt::hb::on_load(ptr, detail::is_acquire(O), static_cast<int>(S));
    simt::note_load(ptr, static_cast<uint64_t>(value));
    return value;
}

template <Order O, Scope S, class T> EP_DEVICE void store(T* ptr, T value) {
    detail::check_word<T>();
    static_assert(O == Order::kRelaxed || O == Order::kRelease);
    simt::before_access(ptr, sizeof(T));
    const T old = __atomic_load_n(ptr, __ATOMIC_RELAXED);
    simt::hb::on_store(ptr, detail::is_release(O), static_cast<int>(S));
    __atomic_store_n(ptr, value, detail::builtin_order(O, S));
    if (old != value) simt::note_change();
}

namespace detail {

// An atomic operation; what was there before.
template <Order O, Scope S, class T, class Operation> EP_DEVICE T update(T* ptr, const Operation& operation) {
    check_word<T>();
    simt::before_access(ptr, sizeof(T));
    simt::hb::on_update(ptr, is_acquire(O), is_release(O), static_cast<int>(S));
    const T old = operation();
    simt::note_load(ptr, static_cast<uint64_t>(old));
    return old;
}

}  // namespace detail

template <Order O, Scope S, class T> EP_DEVICE T fetch_add(T* ptr, T value) {
    constexpr int kOrder = detail::builtin_order(O, S);
    const T old = detail::update<O, S>(ptr, [&] { return __atomic_fetch_add(ptr, value, kOrder); });
    if (value != 0) simt::note_change();
    return old;
}

template <Order O, Scope S, class T> EP_DEVICE T fetch_increment(T* count) {
    static_assert(sizeof(T) == 4, "the instruction counts in 32 bits");
    return fetch_add<O, S>(count, T{1});
}

template <Order O, Scope S, class T> EP_DEVICE T fetch_or(T* ptr, T bits) {
    constexpr int kOrder = detail::builtin_order(O, S);
    const T old = detail::update<O, S>(ptr, [&] { return __atomic_fetch_or(ptr, bits, kOrder); });
    if ((old | bits) != old) simt::note_change();
    return old;
}

template <Order O, Scope S, class T> EP_DEVICE T compare_swap(T* ptr, T expected, T desired) {
    detail::check_word<T>();
    constexpr int kOnFailure = detail::is_acquire(O) && !simt::hb::kIsEnabled ? __ATOMIC_ACQUIRE : __ATOMIC_RELAXED;
    simt::before_access(ptr, sizeof(T));
    T old = expected;
    const bool is_stored =
        __atomic_compare_exchange_n(ptr, &old, desired, false, detail::builtin_order(O, S), kOnFailure);
    if (is_stored) {
        simt::hb::on_update(ptr, detail::is_acquire(O), detail::is_release(O), static_cast<int>(S));
    } else {
        simt::hb::on_load(ptr, detail::is_acquire(O), static_cast<int>(S));
    }
    simt::note_load(ptr, static_cast<uint64_t>(old));
    if (is_stored && expected != desired) simt::note_change();
    return old;
}

template <Order O, Scope S> EP_DEVICE void fence() {
    static_assert(O == Order::kAcqRel);
    std::atomic_thread_fence(std::memory_order_acq_rel);
    simt::hb::on_fence(static_cast<int>(S));
}

namespace detail {

// What a load_packet that finds none gives, so that a kernel that does not ask is wrong in every schedule.
constexpr uint32_t kNoData = 0xa5a5a5a5u;

}  // namespace detail

template <Scope S> EP_DEVICE void store_packet(Packet* ptr, uint32_t epoch, uint32_t data) {
    EP_ENSURE(epoch != 0, "store_packet: epoch 0 is that of memory which nobody has written");
    simt::before_access(ptr, sizeof(Packet));
    const uint64_t bits = static_cast<uint64_t>(epoch) << 32 | data;
    const uint64_t old = __atomic_load_n(&ptr->bits, __ATOMIC_RELAXED);
    simt::hb::on_packet_store(ptr, static_cast<int>(S));
    __atomic_store_n(&ptr->bits, bits, __ATOMIC_RELAXED);
    if (old != bits) simt::note_change();
}

template <Scope S> EP_DEVICE bool load_packet(const Packet* ptr, uint32_t epoch, uint32_t& data) {
    simt::before_access(ptr, sizeof(Packet));
    const uint64_t bits = __atomic_load_n(&ptr->bits, __ATOMIC_RELAXED);
    simt::note_load(ptr, bits);
    const bool is_here = epoch != 0 && static_cast<uint32_t>(bits >> 32) == epoch;
    if (is_here) simt::hb::on_packet_load(ptr, static_cast<int>(S));
    data = is_here ? static_cast<uint32_t>(bits) : detail::kNoData;
    return is_here;
}

// Copied through bytes: the words of a Vec16 may hold values of any type.
EP_DEVICE Vec16 load_input(const Vec16* ptr) {
    simt::check_aligned(ptr, sizeof(Vec16));
    Vec16 value;
    std::memcpy(&value, ptr, sizeof(Vec16));
    return value;
}

EP_DEVICE Vec16 load_shared_with_peers(const Vec16* ptr) { return load_input(ptr); }

EP_DEVICE Vec16 load_shared(const Vec16* ptr) { return load_input(ptr); }

EP_DEVICE void store_streaming(Vec16* ptr, Vec16 value) {
    simt::check_aligned(ptr, sizeof(Vec16));
    std::memcpy(ptr, &value, sizeof(Vec16));
}

namespace detail {

inline uint32_t round_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

}  // namespace detail

EP_DEVICE uint32_t round_to_bf16x2(float low, float high) {
    return detail::round_to_bf16(low) | detail::round_to_bf16(high) << 16;
}

// The sum of two in FP32 has the same bits when it is rounded: FP32 has more than twice the digits.
EP_DEVICE bool has_bf16_add() { return true; }
EP_DEVICE void add_bf16(Vec16* ptr, Vec16 value) {
    simt::check_aligned(ptr, sizeof(Vec16));
    uint16_t sums[8], addends[8];
    std::memcpy(sums, ptr, sizeof(sums));
    std::memcpy(addends, &value, sizeof(addends));
    const auto to_float = [](uint16_t bits) {
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        float result;
        std::memcpy(&result, &word, sizeof(result));
        return result;
    };
    for (int i = 0; i < 8; ++i)
        sums[i] = static_cast<uint16_t>(detail::round_to_bf16(to_float(sums[i]) + to_float(addends[i])));
    std::memcpy(ptr, sums, sizeof(sums));
}

EP_DEVICE bool has_fp8_rounding() { return false; }
EP_DEVICE uint32_t round_to_e4m3x2(float, float) { return 0; }

EP_DEVICE void mbarrier_init(MBarrier* bar, uint32_t arrivals) { simt::mbarrier_init(&bar->state, arrivals); }
EP_DEVICE void mbarrier_init_fence() { simt::hb::on_proxy_fence(); }
EP_DEVICE void mbarrier_arrive(MBarrier* bar) { simt::mbarrier_arrive(&bar->state, false, 0); }
EP_DEVICE void mbarrier_arrive_expect_tx(MBarrier* bar, uint32_t bytes) {
    simt::mbarrier_arrive(&bar->state, true, bytes);
}
EP_DEVICE bool mbarrier_try_wait(MBarrier* bar, uint32_t phase_parity) {
    return simt::mbarrier_try_wait(&bar->state, phase_parity);
}

EP_DEVICE bool has_bulk_copy() { return simt::has_bulk_copy(); }
EP_DEVICE void bulk_load(void* shared_dst, const void* global_src, uint32_t bytes, MBarrier* bar) {
    simt::bulk_load(shared_dst, global_src, bytes, &bar->state);
}
EP_DEVICE void bulk_store(void* global_dst, const void* shared_src, uint32_t bytes) {
    simt::bulk_store(global_dst, shared_src, bytes);
}
EP_DEVICE void bulk_commit() { simt::bulk_commit(); }
template <int N> EP_DEVICE void bulk_wait() { simt::bulk_wait(N, simt::BulkPart::kAll); }
template <int N> EP_DEVICE void bulk_wait_read() { simt::bulk_wait(N, simt::BulkPart::kRead); }

// Bulk copies are memcpy here; only under ThreadSanitizer does a missing proxy fence show.
EP_DEVICE void fence_async_shared() { simt::hb::on_proxy_fence(); }
EP_DEVICE void fence_async_global() { simt::hb::on_proxy_fence(); }

EP_DEVICE void barrier_sync(int id, int num_threads) { simt::block_barrier(id, num_threads, "prim::barrier_sync", 0); }
EP_DEVICE void sync_warp(const char* file, int line) { __syncwarp(kFullMask, file, line); }
EP_DEVICE void sync_block(const char* file, int line) { __syncthreads(file, line); }
EP_DEVICE bool sync_block_any(bool answer, const char* file, int line) {
    return __syncthreads_or(answer ? 1 : 0, file, line) != 0;
}
EP_DEVICE void expect_warp(const char* what) { simt::expect_warp(what); }
EP_DEVICE void expect_block(const char* what) { simt::expect_block(what); }
EP_DEVICE uint64_t clock_ns() { return simt::clock_ns(); }
EP_DEVICE void pause() { simt::pause(); }
// A deadlock is proven by two equal polls of everybody: all that a wait looks at must be in each.
EP_DEVICE constexpr uint32_t polls_per_check() { return 1; }

// The compiler's own acquire too: ThreadSanitizer knows what a host thread has released from nowhere else.
template <class T> EP_DEVICE T load_from_host(const T* ptr) {
    detail::check_word<T>();
    simt::before_access(ptr, sizeof(T));
    const T value = __atomic_load_n(ptr, __ATOMIC_ACQUIRE);
    simt::hb::on_load(ptr, true, static_cast<int>(Scope::kSys));
    simt::note_load(ptr, static_cast<uint64_t>(value));
    return value;
}

EP_DEVICE void wake_host(uint32_t* is_asleep, int event) { simt::wake_host(is_asleep, event); }

EP_DEVICE void* dynamic_shared() { return simt::dynamic_shared(); }

}  // namespace EP_BACKEND
}  // namespace deep_ep::prim
