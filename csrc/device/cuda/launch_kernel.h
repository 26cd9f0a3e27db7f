// The part of a launch that does not depend on the kernel's type.
#pragma once

#include <array>
#include <atomic>

#include "device/runtime.h"

namespace deep_ep::dev::cuda {

constexpr int kMaxDevices = 128;

// One per kernel, for the life of the process.
struct KernelState {
    const void* function = nullptr;
    int max_threads = 1024;
    // Per device: whether its dynamic shared limit has been raised to all that the device gives.
    std::array<std::atomic<bool>, kMaxDevices> is_raised{};
};

// LaunchConfig without its header, which would bring in the kernels' half of the seam.
struct LaunchShape {
    int num_blocks = 1;
    int num_threads = 32;
    int dynamic_shared_bytes = 0;
    bool is_cooperative = false;
    const char* name = "";
};

// Launches `state.function` with the one parameter at `params` on the device that `stream` belongs to (a default
// stream: on the current device). Asynchronous; may be captured into a graph. Throws CudaError or InvalidArgument.
void launch_kernel(KernelState& state, const LaunchShape& shape, Stream stream, const void* params);

}  // namespace deep_ep::dev::cuda
