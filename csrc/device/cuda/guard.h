// Scopes that change the calling thread's CUDA state and put it back.
#pragma once

#include <cuda_runtime_api.h>

namespace deep_ep::dev::cuda {

// Makes device `index` current. Restores through the driver's context stack rather than by cudaSetDevice(previous),
// which would create a context (and take hundreds of megabytes) on a device that the thread never used.
class DeviceGuard {
public:
    explicit DeviceGuard(int index);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    bool has_pushed_ = false;
};

// Lets this thread allocate and synchronise while some stream is being captured. What runs inside must not touch the
// capturing stream.
class RelaxedCaptureGuard {
public:
    RelaxedCaptureGuard() noexcept;
    ~RelaxedCaptureGuard();
    RelaxedCaptureGuard(const RelaxedCaptureGuard&) = delete;
    RelaxedCaptureGuard& operator=(const RelaxedCaptureGuard&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace deep_ep::dev::cuda
