#include <cuda_runtime_api.h>

#include <string>

#include "device/cuda/cuda_error.h"
#include "device/launch.h"

namespace deep_ep::dev::cuda {
namespace {

std::string describe_launch(const LaunchConfig& config) {
    return concat("the launch of kernel '", config.name, "' with ", config.num_blocks, " blocks of ",
                  config.num_threads, " threads, ", config.dynamic_shared_bytes, " bytes of dynamic shared memory",
                  config.is_cooperative ? ", all blocks resident at once" : "");
}

void check_config(const KernelState& state, const LaunchConfig& config) {
    EP_ENSURE(config.num_blocks > 0, describe_launch(config), ": needs at least one block");
    EP_ENSURE(config.num_threads > 0 && config.num_threads % 32 == 0 && config.num_threads <= state.max_threads,
              describe_launch(config), ": the number of threads must be a multiple of 32, at most ", state.max_threads);
    EP_ENSURE(config.dynamic_shared_bytes >= 0, describe_launch(config), ": dynamic shared memory cannot be negative");
}

// Lets the kernel use all the shared memory that one block of this device may have. A limit, not a reservation.
void raise_shared_limit(KernelState& state, const LaunchConfig& config) {
    if (config.dynamic_shared_bytes == 0) return;
    int device = -1;
    EP_CUDA(cudaGetDevice(&device));
    EP_ENSURE(device < kMaxDevices, "CUDA device index ", device, " is beyond ", kMaxDevices - 1);
    std::atomic<bool>& is_raised = state.is_raised[static_cast<size_t>(device)];
    if (is_raised.load(std::memory_order_acquire)) return;
    int device_limit = 0;
    EP_CUDA(cudaDeviceGetAttribute(&device_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    cudaFuncAttributes attributes{};
    EP_CUDA(cudaFuncGetAttributes(&attributes, state.function));
    const int limit = device_limit - static_cast<int>(attributes.sharedSizeBytes);
    EP_CUDA(cudaFuncSetAttribute(state.function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
    is_raised.store(true, std::memory_order_release);
}

}  // namespace

void launch_kernel(KernelState& state, const LaunchConfig& config, Stream stream, const void* params) {
    check_config(state, config);
    raise_shared_limit(state, config);

    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(config.num_blocks));
    launch.blockDim = dim3(static_cast<unsigned>(config.num_threads));
    launch.dynamicSmemBytes = static_cast<size_t>(config.dynamic_shared_bytes);
    launch.stream = static_cast<cudaStream_t>(stream);
    launch.attrs = config.is_cooperative ? &cooperative : nullptr;
    launch.numAttrs = config.is_cooperative ? 1 : 0;

    void* arguments[] = {const_cast<void*>(params)};
    const cudaError_t error = cudaLaunchKernelExC(&launch, state.function, arguments);
    if (error != cudaSuccess) throw_cuda_error(error, describe_launch(config), __FILE__, __LINE__);
}

}  // namespace deep_ep::dev::cuda
