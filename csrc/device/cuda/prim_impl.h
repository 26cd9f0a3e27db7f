// The CUDA half of device/prim.h, and the only inline PTX of the project. Contracts are in prim.h; here stands what the
// instructions need.
//
// Every asm statement is volatile and clobbers memory: `volatile` alone keeps statements in order among themselves, but
// the compiler may still move plain loads and stores across them.
//
// State spaces: kCta accesses use generic addresses (shared or global memory); kGpu and kSys accesses are global,
// because nobody outside the block reaches its shared memory.
//
// Below sm_90 (or with DISABLE_SM90_FEATURES) there are no bulk copies and no transaction barriers: has_bulk_copy() is
// false and the calls trap. DISABLE_AGGRESSIVE_PTX_INSTRS replaces the cache-hinted accesses by plain ones.
#pragma once

#include <type_traits>

#include "device/prim.h"

// Build switches, under the names the build gives them and the names that callers who compile these sources themselves have
// always used.
#if defined(DISABLE_SM90_FEATURES) || (defined(EP_DISABLE_SM90_FEATURES) && EP_DISABLE_SM90_FEATURES)
#define EP_HAS_SM90_FEATURES 0
#else
#define EP_HAS_SM90_FEATURES 1
#endif
#if defined(DISABLE_AGGRESSIVE_PTX_INSTRS) || (defined(EP_DISABLE_AGGRESSIVE_PTX) && EP_DISABLE_AGGRESSIVE_PTX)
#define EP_HAS_CACHE_HINTS 0
#else
#define EP_HAS_CACHE_HINTS 1
#endif

// An instruction of sm_90, which its caller asks has_bulk_copy() for, and a fence that is needed where that is true.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && EP_HAS_SM90_FEATURES
#define EP_PTX_HAS_BULK 1
#define EP_BULK_ASM(...) asm volatile(__VA_ARGS__)
#define EP_BULK_FENCE(text) asm volatile(text ::: "memory")
#else
#define EP_PTX_HAS_BULK 0
#define EP_BULK_ASM(...) ptx::trap_unsupported()
#define EP_BULK_FENCE(text) asm volatile("" ::: "memory")
#endif

namespace deep_ep::prim {
inline namespace EP_BACKEND {
namespace ptx {

// The register type of a 4- or 8-byte integer.
template <class T> struct Raw {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a 4- or 8-byte integer");
    using type = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
};
template <class T> using raw_t = typename Raw<T>::type;

// The address an instruction with this scope takes: generic for kCta, global otherwise.
template <Scope S> EP_DEVICE uint64_t address_of(const void* ptr) {
    if constexpr (S == Scope::kCta) return reinterpret_cast<uint64_t>(ptr);
    return static_cast<uint64_t>(__cvta_generic_to_global(ptr));
}

EP_DEVICE uint64_t global_address(const void* ptr) { return static_cast<uint64_t>(__cvta_generic_to_global(ptr)); }

EP_DEVICE uint32_t shared_address(const void* ptr) { return static_cast<uint32_t>(__cvta_generic_to_shared(ptr)); }

// A call that this build or this GPU cannot execute: a bug of the caller, who has to ask has_bulk_copy() first.
EP_DEVICE void trap_unsupported() { asm volatile("trap;" ::: "memory"); }

}  // namespace ptx

// ---------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------

// Order, scope and size are parts of an instruction's name, and an asm statement takes a literal. So each macro `emit(order,
// place, width, reg)` is one statement, and these choose among its spellings at compile time; "reg" is the constraint of a register
// of so many bits. (The "C" constraint, which pastes constants into the text, would be shorter; CUDA 12.4 does not know it.)
#define EP_PTX_BY_SIZE(emit, order, place) \
    if constexpr (sizeof(T) == 4) {        \
        emit(order, place, "32", "r")      \
    } else {                               \
        emit(order, place, "64", "l")      \
    }
#define EP_PTX_BY_SCOPE(emit, order)               \
    if constexpr (S == Scope::kCta) {              \
        EP_PTX_BY_SIZE(emit, order, ".cta")        \
    } else if constexpr (S == Scope::kGpu) {       \
        EP_PTX_BY_SIZE(emit, order, ".gpu.global") \
    } else {                                       \
        static_assert(S == Scope::kSys);           \
        EP_PTX_BY_SIZE(emit, order, ".sys.global") \
    }
#define EP_PTX_BY_ORDER_AND_SCOPE(emit)          \
    if constexpr (O == Order::kRelaxed) {        \
        EP_PTX_BY_SCOPE(emit, ".relaxed")        \
    } else if constexpr (O == Order::kAcquire) { \
        EP_PTX_BY_SCOPE(emit, ".acquire")        \
    } else if constexpr (O == Order::kRelease) { \
        EP_PTX_BY_SCOPE(emit, ".release")        \
    } else {                                     \
        static_assert(O == Order::kAcqRel);      \
        EP_PTX_BY_SCOPE(emit, ".acq_rel")        \
    }

// ld.{relaxed,acquire}.scope: sm_70
template <Order O, Scope S, class T> EP_DEVICE T load(const T* ptr) {
    static_assert(O == Order::kRelaxed || O == Order::kAcquire, "a load is relaxed or acquire");
    const uint64_t address = ptx::address_of<S>(ptr);
    ptx::raw_t<T> value;
#define EP_PTX_LOAD(order, place, width, reg) \
    asm volatile("ld" order place ".b" width " %0, [%1];" : "=" reg(value) : "l"(address) : "memory");
    EP_PTX_BY_ORDER_AND_SCOPE(EP_PTX_LOAD)
#undef EP_PTX_LOAD
    return static_cast<T>(value);
}

// st.{relaxed,release}.scope: sm_70
template <Order O, Scope S, class T> EP_DEVICE void store(T* ptr, T value) {
    static_assert(O == Order::kRelaxed || O == Order::kRelease, "a store is relaxed or release");
    const uint64_t address = ptx::address_of<S>(ptr);
    const auto raw = static_cast<ptx::raw_t<T>>(value);
#define EP_PTX_STORE(order, place, width, reg) \
    asm volatile("st" order place ".b" width " [%0], %1;" ::"l"(address), reg(raw) : "memory");
    EP_PTX_BY_ORDER_AND_SCOPE(EP_PTX_STORE)
#undef EP_PTX_STORE
}

// An atomic operation with one operand; gives what was there before.
#define EP_PTX_ATOM(operation, order, place, width, reg, operand)    \
    asm volatile("atom" order place operation width " %0, [%1], %2;" \
                 : "=" reg(old)                                      \
                 : "l"(address), reg(operand)                        \
                 : "memory");

// atom.add: unsigned, because two's complement makes signed addition the same. sm_70
template <Order O, Scope S, class T> EP_DEVICE T fetch_add(T* ptr, T value) {
    const uint64_t address = ptx::address_of<S>(ptr);
    ptx::raw_t<T> old;
#define EP_PTX_ADD(order, place, width, reg) \
    EP_PTX_ATOM(".add.u", order, place, width, reg, static_cast<ptx::raw_t<T>>(value))
    EP_PTX_BY_ORDER_AND_SCOPE(EP_PTX_ADD)
#undef EP_PTX_ADD
    return static_cast<T>(old);
}

// atom.inc: with a limit that no count reaches; without one it is an addition to the compiler. sm_70
template <Order O, Scope S, class T> EP_DEVICE T fetch_increment(T* count) {
    static_assert(sizeof(T) == 4, "the instruction counts in 32 bits");
    const uint64_t address = ptx::address_of<S>(count);
    ptx::raw_t<T> old;
#define EP_PTX_INCREMENT(order, place, width, reg) EP_PTX_ATOM(".inc.u", order, place, width, reg, T{0x7fffffff})
    EP_PTX_BY_ORDER_AND_SCOPE(EP_PTX_INCREMENT)
#undef EP_PTX_INCREMENT
    return old;
}

// atom.or: sm_70
template <Order O, Scope S, class T> EP_DEVICE T fetch_or(T* ptr, T bits) {
    const uint64_t address = ptx::address_of<S>(ptr);
    ptx::raw_t<T> old;
#define EP_PTX_OR(order, place, width, reg) \
    EP_PTX_ATOM(".or.b", order, place, width, reg, static_cast<ptx::raw_t<T>>(bits))
    EP_PTX_BY_ORDER_AND_SCOPE(EP_PTX_OR)
#undef EP_PTX_OR
    return static_cast<T>(old);
}

// atom.cas: sm_70
template <Order O, Scope S, class T> EP_DEVICE T compare_swap(T* ptr, T expected, T desired) {
    const uint64_t address = ptx::address_of<S>(ptr);
    const auto raw_expected = static_cast<ptx::raw_t<T>>(expected);
    const auto raw_desired = static_cast<ptx::raw_t<T>>(desired);
    ptx::raw_t<T> old;
#define EP_PTX_CAS(order, place, width, reg)                            \
    asm volatile("atom" order place ".cas.b" width " %0, [%1], %2, %3;" \
                 : "=" reg(old)                                         \
                 : "l"(address), reg(raw_expected), reg(raw_desired)    \
                 : "memory");
    EP_PTX_BY_ORDER_AND_SCOPE(EP_PTX_CAS)
#undef EP_PTX_CAS
    return static_cast<T>(old);
}

#undef EP_PTX_ATOM
#undef EP_PTX_BY_ORDER_AND_SCOPE
#undef EP_PTX_BY_SCOPE
#undef EP_PTX_BY_SIZE

// fence.acq_rel.scope: sm_70
template <Order O, Scope S> EP_DEVICE void fence() {
    static_assert(O == Order::kAcqRel, "a fence is acq_rel");
    if constexpr (S == Scope::kCta) {
        asm volatile("fence.acq_rel.cta;" ::: "memory");
    } else if constexpr (S == Scope::kGpu) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
    } else {
        static_assert(S == Scope::kSys);
        asm volatile("fence.acq_rel.sys;" ::: "memory");
    }
}

// The comparison waits for the load only where its outcome is used, so that a thread may have many under way.
template <Scope S> EP_DEVICE void store_packet(Packet* ptr, uint32_t epoch, uint32_t data) {
    store<Order::kRelaxed, S>(&ptr->bits, static_cast<uint64_t>(epoch) << 32 | data);
}

template <Scope S> EP_DEVICE bool load_packet(const Packet* ptr, uint32_t epoch, uint32_t& data) {
    const uint64_t bits = load<Order::kRelaxed, S>(&ptr->bits);
    data = static_cast<uint32_t>(bits);
    return static_cast<uint32_t>(bits >> 32) == epoch;
}

#if EP_HAS_CACHE_HINTS
#define EP_PTX_LOAD_INPUT "ld.global.nc.L1::no_allocate.v4.b32"
#define EP_PTX_LOAD_SHARED_WITH_PEERS "ld.global.L1::no_allocate.v4.b32"
#define EP_PTX_STORE_STREAMING "st.global.L1::no_allocate.v4.b32"
#else
#define EP_PTX_LOAD_INPUT "ld.global.v4.b32"
#define EP_PTX_LOAD_SHARED_WITH_PEERS "ld.global.v4.b32"
#define EP_PTX_STORE_STREAMING "st.global.v4.b32"
#endif

// A vector from `address`, of the kind that the instruction takes.
#define EP_LOAD_VEC(instruction, constraint, address)                                 \
    Vec16 v;                                                                          \
    asm volatile(instruction " {%0, %1, %2, %3}, [%4];"                               \
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) \
                 : constraint(address)                                                \
                 : "memory");                                                         \
    return v

EP_DEVICE Vec16 load_input(const Vec16* ptr) { EP_LOAD_VEC(EP_PTX_LOAD_INPUT, "l", ptx::global_address(ptr)); }

EP_DEVICE Vec16 load_shared_with_peers(const Vec16* ptr) {
    EP_LOAD_VEC(EP_PTX_LOAD_SHARED_WITH_PEERS, "l", ptx::global_address(ptr));
}

EP_DEVICE Vec16 load_shared(const Vec16* ptr) { EP_LOAD_VEC("ld.shared.v4.u32", "r", ptx::shared_address(ptr)); }

#undef EP_LOAD_VEC

EP_DEVICE void store_streaming(Vec16* ptr, Vec16 value) {
    asm volatile(EP_PTX_STORE_STREAMING " [%0], {%1, %2, %3, %4};" ::"l"(ptx::global_address(ptr)), "r"(value.word[0]),
                 "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
}

// red .v4.bf16x2: sm_90, PTX 8.1
#if EP_PTX_HAS_BULK && (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 1))
#define EP_PTX_HAS_BF16_ADD 1
#else
#define EP_PTX_HAS_BF16_ADD 0
#endif
EP_DEVICE bool has_bf16_add() { return EP_PTX_HAS_BF16_ADD != 0; }
EP_DEVICE void add_bf16([[maybe_unused]] Vec16* ptr, [[maybe_unused]] Vec16 value) {
#if EP_PTX_HAS_BF16_ADD
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(ptx::global_address(ptr)),
                 "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
#else
    ptx::trap_unsupported();
#endif
}
#undef EP_PTX_HAS_BF16_ADD

#undef EP_PTX_LOAD_INPUT
#undef EP_PTX_LOAD_SHARED_WITH_PEERS
#undef EP_PTX_STORE_STREAMING

// cvt.rn.bf16x2.f32: sm_80
EP_DEVICE uint32_t round_to_bf16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define EP_PTX_HAS_FP8 1
#else
#define EP_PTX_HAS_FP8 0
#endif

EP_DEVICE bool has_fp8_rounding() { return EP_PTX_HAS_FP8 != 0; }

// cvt.rn.satfinite.e4m3x2.f32: sm_89
EP_DEVICE uint32_t round_to_e4m3x2([[maybe_unused]] float low, [[maybe_unused]] float high) {
#if EP_PTX_HAS_FP8
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    ptx::trap_unsupported();
    return 0;
#endif
}

#undef EP_PTX_HAS_FP8

// ---------------------------------------------------------------------------------------------------------------
// mbarriers
// ---------------------------------------------------------------------------------------------------------------

// mbarrier.init: sm_80
EP_DEVICE void mbarrier_init(MBarrier* bar, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ptx::shared_address(bar)), "r"(arrivals) : "memory");
}

// fence.mbarrier_init, fence.proxy.async: sm_90. Before that there is no async proxy, and the __syncthreads that
// follows does all that is needed.
EP_DEVICE void mbarrier_init_fence() {
    EP_BULK_FENCE("fence.mbarrier_init.release.cluster;");
    EP_BULK_FENCE("fence.proxy.async.shared::cta;");
}

// mbarrier.arrive (release, cta): sm_80
EP_DEVICE void mbarrier_arrive(MBarrier* bar) {
    [[maybe_unused]] uint64_t state;
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(ptx::shared_address(bar)) : "memory");
}

// mbarrier.arrive.expect_tx (release, cta): sm_90
EP_DEVICE void mbarrier_arrive_expect_tx([[maybe_unused]] MBarrier* bar, [[maybe_unused]] uint32_t bytes) {
    [[maybe_unused]] uint64_t state;
    EP_BULK_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 %0, [%1], %2;"
                : "=l"(state)
                : "r"(ptx::shared_address(bar)), "r"(bytes)
                : "memory");
}

// Acquire, cta.
#if EP_PTX_HAS_BULK
#define EP_MBARRIER_WAIT "mbarrier.try_wait"  // sm_90
#else
#define EP_MBARRIER_WAIT "mbarrier.test_wait"  // sm_80; does not suspend
#endif
EP_DEVICE bool mbarrier_try_wait(MBarrier* bar, uint32_t phase_parity) {
    uint32_t is_complete;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n" EP_MBARRIER_WAIT
        ".parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(is_complete)
        : "r"(ptx::shared_address(bar)), "r"(phase_parity)
        : "memory");
    return is_complete != 0;
}
#undef EP_MBARRIER_WAIT

// ---------------------------------------------------------------------------------------------------------------
// Bulk copies: sm_90
// ---------------------------------------------------------------------------------------------------------------

EP_DEVICE bool has_bulk_copy() { return EP_PTX_HAS_BULK != 0; }

// A block outside a cluster is a cluster of its own, so its shared::cta address is a shared::cluster address too.
EP_DEVICE void bulk_load([[maybe_unused]] void* shared_dst, [[maybe_unused]] const void* global_src,
                         [[maybe_unused]] uint32_t bytes, [[maybe_unused]] MBarrier* bar) {
    EP_BULK_ASM("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                    ptx::shared_address(shared_dst)),
                "l"(ptx::global_address(global_src)), "r"(bytes), "r"(ptx::shared_address(bar))
                : "memory");
}

EP_DEVICE void bulk_store([[maybe_unused]] void* global_dst, [[maybe_unused]] const void* shared_src,
                          [[maybe_unused]] uint32_t bytes) {
    EP_BULK_ASM("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(ptx::global_address(global_dst)),
                "r"(ptx::shared_address(shared_src)), "r"(bytes)
                : "memory");
}

EP_DEVICE void bulk_commit() { EP_BULK_ASM("cp.async.bulk.commit_group;" ::: "memory"); }

template <int N> EP_DEVICE void bulk_wait() {
    static_assert(N >= 0, "a number of groups");
    EP_BULK_ASM("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

template <int N> EP_DEVICE void bulk_wait_read() {
    static_assert(N >= 0, "a number of groups");
    EP_BULK_ASM("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

EP_DEVICE void fence_async_shared() { EP_BULK_FENCE("fence.proxy.async.shared::cta;"); }

EP_DEVICE void fence_async_global() { EP_BULK_FENCE("fence.proxy.async.global;"); }

// ---------------------------------------------------------------------------------------------------------------
// Execution
// ---------------------------------------------------------------------------------------------------------------

// Not the .aligned form: the lanes of a warp need not arrive converged.
EP_DEVICE void barrier_sync(int id, int num_threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

EP_DEVICE void sync_warp(const char*, int) { __syncwarp(); }
EP_DEVICE void sync_block(const char*, int) { __syncthreads(); }
EP_DEVICE bool sync_block_any(bool answer, const char*, int) { return __syncthreads_or(answer ? 1 : 0) != 0; }
EP_DEVICE void expect_warp(const char*) {}
EP_DEVICE void expect_block(const char*) {}

EP_DEVICE uint64_t clock_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

// Short against a flag's flight over NVLink (about a microsecond), long against an issue slot.
EP_DEVICE void pause() { asm volatile("nanosleep.u32 20;" ::: "memory"); }

EP_DEVICE constexpr uint32_t polls_per_check() { return 8; }

template <class T> EP_DEVICE T load_from_host(const T* ptr) { return load<Order::kAcquire, Scope::kSys>(ptr); }

EP_DEVICE void wake_host(uint32_t*, int) {}

EP_DEVICE void* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char ep_dynamic_shared[];
    return ep_dynamic_shared;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::prim

#undef EP_BULK_FENCE
#undef EP_BULK_ASM
#undef EP_PTX_HAS_BULK
