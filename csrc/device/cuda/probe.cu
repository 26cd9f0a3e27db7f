#include "device/cuda/probe.h"

#include "device/cuda/error.h"

namespace deep_ep::dev::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

CompiledCode find_compiled_code() {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        static_cast<void>(cudaGetLastError());
        return {};
    }
    check(error, "cudaFuncGetAttributes(probe_kernel)", __FILE__, __LINE__);
#if defined(DISABLE_SM90_FEATURES)
    constexpr bool has_sm90_features = false;
#else
    constexpr bool has_sm90_features = true;
#endif
    // ptxVersion is the architecture that the code was written for, which may be older than the GPU it runs on.
    return {.exists = true, .has_bulk_copy = has_sm90_features && attributes.ptxVersion >= 90};
}

}  // namespace deep_ep::dev::cuda
