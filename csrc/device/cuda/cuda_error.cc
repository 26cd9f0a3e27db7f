#include "device/cuda/cuda_error.h"

#include "device/cuda/device.h"

namespace deep_ep::dev {

CudaVersions cuda_versions() noexcept {
    CudaVersions versions;
    cuda::ignore(cudaRuntimeGetVersion(&versions.runtime));
    cuda::ignore(cudaDriverGetVersion(&versions.driver));
    return versions;
}

}  // namespace deep_ep::dev

namespace deep_ep::dev::cuda {
namespace {

// Errors after which every call in this process fails: only a new process helps.
bool is_sticky(cudaError_t error) {
    switch (error) {
        case cudaErrorIllegalAddress:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorHardwareStackError:
        case cudaErrorIllegalInstruction:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorECCUncorrectable: return true;
        default: return false;
    }
}

}  // namespace

std::string describe(cudaError_t error) {
    return concat(cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
}

void throw_cuda_error(cudaError_t error, std::string_view what, std::string_view file, int line) {
    static_cast<void>(cudaGetLastError());
    const auto slash = file.rfind('/');
    if (slash != std::string_view::npos) file.remove_prefix(slash + 1);
    std::string message = concat("CUDA error: ", describe(error), " in ", what, " at ", file, ":", line);
    if (is_sticky(error)) {
        message +=
            ". This error may stem from any kernel launched earlier, and no CUDA call of this process works after it";
    }
    if (error == cudaErrorStreamCaptureInvalidated)
        message +=
            ". Something before it, on any thread, did what a capture forbids: Python's garbage collector often "
            "does, when it destroys an older CUDA graph. Call gc.collect() before the capture";
    if (error == cudaErrorInsufficientDriver) message += concat(". ", describe_old_driver(cuda_versions()));
    throw CudaError(message);
}

}  // namespace deep_ep::dev::cuda
