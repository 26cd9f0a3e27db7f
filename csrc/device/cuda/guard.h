// Scopes that change the calling thread's CUDA state and put it back.
#pragma once

#include <cuda_runtime_api.h>

#include "core/non_copyable.h"

namespace deep_ep::dev::cuda {

// Makes device `index` current. Restores through the driver's context stack rather than by cudaSetDevice(previous),
// which would create a context (and take hundreds of megabytes) on a device that the thread never used.
class DeviceGuard : NonCopyable {
public:
    explicit DeviceGuard(int index);
    ~DeviceGuard();

private:
    bool has_pushed_ = false;
};

// Lets this thread allocate and synchronise while some stream is being captured. What runs inside must not touch the
// capturing stream.
class RelaxedCaptureGuard : NonCopyable {
public:
    RelaxedCaptureGuard() noexcept;
    ~RelaxedCaptureGuard();

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Both: for calls about device `index` that have nothing to do with a capture.
struct RelaxedDeviceGuard {
    explicit RelaxedDeviceGuard(int index) : device(index) {}

    DeviceGuard device;
    RelaxedCaptureGuard relaxed;
};

}  // namespace deep_ep::dev::cuda
