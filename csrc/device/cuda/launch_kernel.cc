#include "device/cuda/launch_kernel.h"

#include <cuda_runtime_api.h>

#include <string>

#include "device/cuda/cuda_error.h"
#include "device/cuda/driver.h"
#include "device/cuda/guard.h"

namespace deep_ep::dev::cuda {
namespace {

bool is_default_stream(cudaStream_t stream) {
    return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

#if CUDART_VERSION >= 12080
int owner_of(cudaStream_t stream) {
    int device = -1;
    EP_CUDA(cudaStreamGetDevice(stream, &device));
    return device;
}
#else
// Before 12.8 the runtime cannot say whose a stream is. The driver knows its context, and of the current context the
// device.
int owner_of(cudaStream_t stream) {
    CUcontext context = nullptr;
    CUdevice device = -1;
    CUresult result = driver().context_of_stream(stream, &context);
    if (result == CUDA_SUCCESS) result = driver().push_current(context);
    if (result == CUDA_SUCCESS) {
        result = driver().current_device(&device);
        static_cast<void>(driver().pop_current(&context));
    }
    if (result != CUDA_SUCCESS) {
        throw CudaError(
            concat("cannot tell which CUDA device a stream belongs to: driver error ", static_cast<int>(result)));
    }
    return device;
}
#endif

// A kernel has to be launched with the stream's device current. Default streams have none: they mean whatever device
// is current, which is the caller's business.
int device_of(cudaStream_t stream) {
    // A stream that is being captured must not even be asked for its device; whoever captures has made it current.
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (!is_default_stream(stream)) EP_CUDA(cudaStreamIsCapturing(stream, &status));
    if (!is_default_stream(stream) && status == cudaStreamCaptureStatusNone) return owner_of(stream);
    int device = -1;
    EP_CUDA(cudaGetDevice(&device));
    return device;
}

std::string describe_launch(const LaunchShape& shape) {
    return concat("the launch of kernel '", shape.name, "' with ", shape.num_blocks, " blocks of ", shape.num_threads,
                  " threads, ", shape.dynamic_shared_bytes, " bytes of dynamic shared memory",
                  shape.is_cooperative ? ", all blocks resident at once" : "");
}

void check_shape(const KernelState& state, const LaunchShape& shape) {
    EP_ENSURE(shape.num_blocks > 0, describe_launch(shape), ": needs at least one block");
    EP_ENSURE(shape.num_threads > 0 && shape.num_threads % 32 == 0 && shape.num_threads <= state.max_threads,
              describe_launch(shape), ": the number of threads must be a multiple of 32, at most ", state.max_threads);
    EP_ENSURE(shape.dynamic_shared_bytes >= 0, describe_launch(shape), ": dynamic shared memory cannot be negative");
}

// Lets the kernel use all the shared memory that one block of this device may have. A limit, not a reservation.
void raise_shared_limit(KernelState& state, int device, const LaunchShape& shape) {
    if (shape.dynamic_shared_bytes == 0) return;
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

void launch_kernel(KernelState& state, const LaunchShape& shape, Stream stream, const void* params) {
    check_shape(state, shape);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const int device = device_of(cuda_stream);
    const DeviceGuard guard(device);
    raise_shared_limit(state, device, shape);

    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.dynamic_shared_bytes);
    config.stream = cuda_stream;
    config.attrs = shape.is_cooperative ? &cooperative : nullptr;
    config.numAttrs = shape.is_cooperative ? 1 : 0;

    void* arguments[] = {const_cast<void*>(params)};
    const cudaError_t error = cudaLaunchKernelExC(&config, state.function, arguments);
    if (error != cudaSuccess) throw_cuda_error(error, describe_launch(shape), __FILE__, __LINE__);
}

}  // namespace deep_ep::dev::cuda
