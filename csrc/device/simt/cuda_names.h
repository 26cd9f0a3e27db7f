// The plain CUDA names that kernels use, for the host compiler: thread coordinates, warp collectives, bit counting.
//
// A collective is called by every lane of its mask from the same line; lanes wait for each other (nobody else), and a
// mask that overlaps another one in use, a different operation or line, or a lane that has returned is reported.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace deep_ep::simt {

struct Index3 {
    unsigned x, y, z;
};

// Where the running fiber is. Written by the executor at every switch; a block never leaves its OS thread.
extern __thread Index3 threadIdx;
extern __thread Index3 blockIdx;
extern __thread Index3 blockDim;
extern __thread Index3 gridDim;

enum class WarpOp : uint8_t { kSync, kBallot, kAny, kAll, kShuffle, kShuffleXor, kShuffleUp, kShuffleDown };

// Waits for the lanes of `mask`. Shuffles return the value of `source_lane`, votes the ballot of value != 0.
uint64_t warp_exchange(WarpOp op, uint32_t mask, uint64_t value, unsigned source_lane, const char* file, int line);
// True where `predicate` is true for one of the threads.
bool block_barrier(int id, int num_threads, const char* file, int line, bool predicate = false);

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    block_barrier(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z), file, line);
}

inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return block_barrier(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z), file, line, predicate != 0) ? 1 : 0;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    warp_exchange(WarpOp::kSync, mask, 0, 0, file, line);
}

inline unsigned __ballot_sync(uint32_t mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
    return static_cast<unsigned>(warp_exchange(WarpOp::kBallot, mask, predicate != 0, 0, file, line));
}

inline int __any_sync(uint32_t mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return warp_exchange(WarpOp::kAny, mask, predicate != 0, 0, file, line) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return warp_exchange(WarpOp::kAll, mask, predicate != 0, 0, file, line) == mask;
}

inline unsigned lane_in_warp() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

template <class T> T shuffle(WarpOp op, uint32_t mask, T value, unsigned source_lane, const char* file, int line) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = warp_exchange(op, mask, bits, source_lane, file, line);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
    const auto segment = static_cast<unsigned>(width) - 1;
    const unsigned from = (lane_in_warp() & ~segment) | (static_cast<unsigned>(source) & segment);
    return shuffle(WarpOp::kShuffle, mask, value, from, file, line);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    const unsigned lane = lane_in_warp();
    const unsigned last = lane | (static_cast<unsigned>(width) - 1);
    const unsigned from = lane ^ static_cast<unsigned>(lane_mask);
    return shuffle(WarpOp::kShuffleXor, mask, value, from > last ? lane : from, file, line);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
    const unsigned lane = lane_in_warp();
    const unsigned within = lane & (static_cast<unsigned>(width) - 1);
    return shuffle(WarpOp::kShuffleUp, mask, value, delta > within ? lane : lane - delta, file, line);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
    const unsigned lane = lane_in_warp();
    const unsigned within = lane & (static_cast<unsigned>(width) - 1);
    const bool outside = delta > static_cast<unsigned>(width) - 1 - within;
    return shuffle(WarpOp::kShuffleDown, mask, value, outside ? lane : lane + delta, file, line);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= ((x >> bit) & 1u) << (31 - bit);
    return reversed;
}

template <class To, class From> inline To copy_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    std::memcpy(&bits, &value, sizeof(To));
    return bits;
}
inline unsigned __float_as_uint(float value) { return copy_bits<unsigned>(value); }
inline int __float_as_int(float value) { return copy_bits<int>(value); }
inline float __uint_as_float(unsigned value) { return copy_bits<float>(value); }
inline float __int_as_float(int value) { return copy_bits<float>(value); }

// CUDA's overload set: mixed signed and unsigned give unsigned, other mixtures are ambiguous there too.
#define EP_SIMT_MIN_MAX(T)                                     \
    inline constexpr T min(T a, T b) { return b < a ? b : a; } \
    inline constexpr T max(T a, T b) { return a < b ? b : a; }
EP_SIMT_MIN_MAX(int)
EP_SIMT_MIN_MAX(unsigned)
EP_SIMT_MIN_MAX(long)
EP_SIMT_MIN_MAX(unsigned long)
EP_SIMT_MIN_MAX(long long)
EP_SIMT_MIN_MAX(unsigned long long)
EP_SIMT_MIN_MAX(float)
EP_SIMT_MIN_MAX(double)
#undef EP_SIMT_MIN_MAX
inline constexpr unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
inline constexpr unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
inline constexpr unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
inline constexpr unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }

}  // namespace deep_ep::simt

// CUDA declares these globally.
using uint3 = deep_ep::simt::Index3;
using deep_ep::simt::__all_sync;
using deep_ep::simt::__any_sync;
using deep_ep::simt::__ballot_sync;
using deep_ep::simt::__brev;
using deep_ep::simt::__clz;
using deep_ep::simt::__clzll;
using deep_ep::simt::__ffs;
using deep_ep::simt::__ffsll;
using deep_ep::simt::__float_as_int;
using deep_ep::simt::__float_as_uint;
using deep_ep::simt::__int_as_float;
using deep_ep::simt::__popc;
using deep_ep::simt::__popcll;
using deep_ep::simt::__shfl_down_sync;
using deep_ep::simt::__shfl_sync;
using deep_ep::simt::__shfl_up_sync;
using deep_ep::simt::__shfl_xor_sync;
using deep_ep::simt::__syncthreads;
using deep_ep::simt::__syncthreads_or;
using deep_ep::simt::__syncwarp;
using deep_ep::simt::__uint_as_float;
using deep_ep::simt::blockDim;
using deep_ep::simt::blockIdx;
using deep_ep::simt::gridDim;
using deep_ep::simt::max;
using deep_ep::simt::min;
using deep_ep::simt::threadIdx;
