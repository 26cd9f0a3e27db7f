#include "device/cuda/guard.h"

#include <cuda.h>

#include <mutex>
#include <vector>

#include "device/cuda/cuda_error.h"

namespace deep_ep::dev::cuda {
namespace {

// The three driver functions that the runtime API has no name for. Looked up at run time: the extension is not linked
// against the driver, so that it imports on a machine without one.
struct Driver {
    CUresult(CUDAAPI* retain_primary)(CUcontext* context, CUdevice device) = nullptr;
    CUresult(CUDAAPI* push_current)(CUcontext context) = nullptr;
    CUresult(CUDAAPI* pop_current)(CUcontext* context) = nullptr;
};

template <class Function> void find(const char* symbol, unsigned version, Function*& function) {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    EP_CUDA(cudaGetDriverEntryPointByVersion(symbol, &address, version, cudaEnableDefault, &status));
#else
    static_cast<void>(version);
    EP_CUDA(cudaGetDriverEntryPoint(symbol, &address, cudaEnableDefault, &status));
#endif
    if (status != cudaDriverEntryPointSuccess) throw CudaError(concat("the CUDA driver has no function ", symbol));
    function = reinterpret_cast<Function*>(address);
}

const Driver& driver() {
    static const Driver found = [] {
        Driver d;
        find("cuDevicePrimaryCtxRetain", 7000, d.retain_primary);
        find("cuCtxPushCurrent", 4000, d.push_current);
        find("cuCtxPopCurrent", 4000, d.pop_current);
        return d;
    }();
    return found;
}

// Primary contexts are retained once and never released: they live as long as the process anyway.
CUcontext primary_context(int index) {
    static std::mutex mutex;
    static std::vector<CUcontext> contexts;
    const std::lock_guard lock(mutex);
    if (contexts.size() <= static_cast<size_t>(index)) contexts.resize(static_cast<size_t>(index) + 1);
    CUcontext& context = contexts[static_cast<size_t>(index)];
    if (context == nullptr) {
        const CUresult result = driver().retain_primary(&context, index);
        if (result != CUDA_SUCCESS) {
            context = nullptr;
            throw CudaError(concat("cannot use CUDA device ", index, ": driver error ", static_cast<int>(result)));
        }
    }
    return context;
}

}  // namespace

DeviceGuard::DeviceGuard(int index) {
    int current = -1;
    EP_CUDA(cudaGetDevice(&current));
    if (current == index) return;
    const CUresult result = driver().push_current(primary_context(index));
    if (result != CUDA_SUCCESS) {
        throw CudaError(concat("cannot make CUDA device ", index, " current: driver error ", static_cast<int>(result)));
    }
    has_pushed_ = true;
}

DeviceGuard::~DeviceGuard() {
    if (!has_pushed_) return;
    CUcontext popped = nullptr;
    static_cast<void>(driver().pop_current(&popped));
}

RelaxedCaptureGuard::RelaxedCaptureGuard() noexcept { ignore(cudaThreadExchangeStreamCaptureMode(&mode_)); }

RelaxedCaptureGuard::~RelaxedCaptureGuard() { ignore(cudaThreadExchangeStreamCaptureMode(&mode_)); }

}  // namespace deep_ep::dev::cuda
