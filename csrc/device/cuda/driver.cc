#include "device/cuda/driver.h"

#include "device/cuda/cuda_error.h"

namespace deep_ep::dev::cuda {
namespace {

template <class Function> void find(const char* symbol, [[maybe_unused]] unsigned version, Function*& function) {
    void* address = nullptr;
#if CUDART_VERSION >= 12050
    EP_CUDA(cudaGetDriverEntryPointByVersion(symbol, &address, version, cudaEnableDefault));
#else
    EP_CUDA(cudaGetDriverEntryPoint(symbol, &address, cudaEnableDefault));
#endif
    if (address == nullptr) throw CudaError(concat("the CUDA driver has no function ", symbol));
    function = reinterpret_cast<Function*>(address);
}

}  // namespace

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

}  // namespace deep_ep::dev::cuda
