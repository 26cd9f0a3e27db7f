// The few functions of the driver that the runtime API has no name for.
#pragma once

#include <cuda.h>

namespace deep_ep::dev::cuda {

struct Driver {
    CUresult(CUDAAPI* retain_primary)(CUcontext* context, CUdevice device) = nullptr;
    CUresult(CUDAAPI* push_current)(CUcontext context) = nullptr;
    CUresult(CUDAAPI* pop_current)(CUcontext* context) = nullptr;
};

// Looked up at the first call: the extension is not linked against the driver, so that it imports on a machine without
// one. Throws CudaError where the driver lacks one.
const Driver& driver();

}  // namespace deep_ep::dev::cuda
