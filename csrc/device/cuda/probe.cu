#include "device/cuda/probe.h"

#include "device/cuda/cuda_error.h"
#include "device/prim.h"

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
    // ptxVersion is the architecture that the code was written for, which may be older than the GPU it runs on.
    return {.exists = true, .has_bulk_copy = EP_HAS_SM90_FEATURES && attributes.ptxVersion >= 90};
}

}  // namespace deep_ep::dev::cuda
