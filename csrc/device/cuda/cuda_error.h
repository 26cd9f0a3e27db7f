// Turning CUDA's return codes into exceptions. Host code of the CUDA half only.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <string_view>

#include "core/error.h"

namespace deep_ep::dev::cuda {

// Throws CudaError with the error's name and text, what was tried, and the place. Clears CUDA's last-error slot, so
// that the failure is reported here and not by the next, innocent call.
[[noreturn]] void throw_cuda_error(cudaError_t error, std::string_view what, std::string_view file, int line);

inline void check(cudaError_t error, const char* what, const char* file, int line) {
    if (error != cudaSuccess) throw_cuda_error(error, what, file, line);
}

// For destructors and clean-up: forgets the error, whatever it is (the driver may already be unloading).
inline void ignore(cudaError_t error) noexcept {
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
}

// "cudaErrorInvalidValue (invalid argument)".
std::string describe(cudaError_t error);

}  // namespace deep_ep::dev::cuda

#define EP_CUDA(call) ::deep_ep::dev::cuda::check((call), #call, __FILE__, __LINE__)
