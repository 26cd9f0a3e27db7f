#include "device/cuda/guard.h"

#include <mutex>
#include <vector>

#include "device/cuda/cuda_error.h"
#include "device/cuda/driver.h"

namespace deep_ep::dev::cuda {
namespace {

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

bool enter_device(int index) {
    int current = -1;
    EP_CUDA(cudaGetDevice(&current));
    if (current == index) return false;
    const CUresult result = driver().push_current(primary_context(index));
    if (result != CUDA_SUCCESS) {
        throw CudaError(concat("cannot make CUDA device ", index, " current: driver error ", static_cast<int>(result)));
    }
    return true;
}

void leave_device() noexcept {
    CUcontext popped = nullptr;
    static_cast<void>(driver().pop_current(&popped));
}

RelaxedCaptureGuard::RelaxedCaptureGuard() noexcept { ignore(cudaThreadExchangeStreamCaptureMode(&mode_)); }

RelaxedCaptureGuard::~RelaxedCaptureGuard() { ignore(cudaThreadExchangeStreamCaptureMode(&mode_)); }

}  // namespace deep_ep::dev::cuda
