// The CUDA half of device/launch.h.
#pragma once

#include <array>
#include <atomic>
#include <type_traits>

#include "device/launch.h"

namespace deep_ep::dev::cuda {

constexpr int kMaxDevices = 128;

// One per kernel, for the life of the process.
struct KernelState {
    const void* function = nullptr;
    int max_threads = 1024;
    // Per device: whether its dynamic shared limit has been raised to all that the device gives.
    std::array<std::atomic<bool>, kMaxDevices> is_raised{};
};

// Launches `state.function` with the one parameter at `params` on the current device, which has to be that of `stream`: the
// caller knows it, and asking costs the host. Asynchronous; may be captured into a graph. Throws CudaError or InvalidArgument.
void launch_kernel(KernelState& state, const LaunchConfig& config, Stream stream, const void* params);

}  // namespace deep_ep::dev::cuda

namespace deep_ep::dev {
inline namespace EP_BACKEND {

// What a kernel may declare about itself, or the default. (C++17, which is all that nvcc 11 knows.)
template <class K, class = void> struct MaxThreads : std::integral_constant<int, 1024> {};
template <class K> struct MaxThreads<K, std::void_t<decltype(K::kMaxThreads)>> {
    static constexpr int value = K::kMaxThreads;
};
template <class K, class = void> struct MinBlocks : std::integral_constant<int, 0> {};
template <class K> struct MinBlocks<K, std::void_t<decltype(K::kMinBlocks)>> {
    static constexpr int value = K::kMinBlocks;
};

// `static constexpr int kMaxThreads`: the compiler then has 65536 / kMaxThreads registers per thread to give. Otherwise
// every kernel can be launched with 1024 threads and gets at most 64 registers.
template <class K> constexpr int max_threads() { return MaxThreads<K>::value; }

// `static constexpr int kMinBlocks`, of which an SM must be able to hold so many: 1 says that registers count for more
// than a second block.
template <class K> constexpr int min_blocks() { return MinBlocks<K>::value; }

// Profilers show this as "deep_ep::…::entry<deep_ep::…::SomeKernel>".
template <class K>
__global__ void __launch_bounds__(max_threads<K>(), min_blocks<K>())
    entry(const __grid_constant__ typename K::Params params) {
    __shared__ typename K::Shared shared;
    K::run(params, shared);
}

template <class K> void launch(const LaunchConfig& config, Stream stream, const typename K::Params& params) {
    using Params = typename K::Params;
    static_assert(std::is_trivially_copyable_v<Params>, "kernel parameters are copied as bytes");
    static_assert(sizeof(Params) <= 4000, "kernel parameters must fit the constant bank of every GPU");
    static_assert(std::is_trivially_default_constructible_v<typename K::Shared>, "shared memory is not constructed");
    static cuda::KernelState state{.function = reinterpret_cast<const void*>(&entry<K>),
                                   .max_threads = max_threads<K>()};
    cuda::launch_kernel(state, config, stream, &params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::dev
