// Scopes that change the calling thread's CUDA state and put it back.
#pragma once

#include <cuda_runtime_api.h>

#include "core/non_copyable.h"

namespace deep_ep::dev::cuda {

// Makes device `index` current. True: another one was, and is again after leave_device(): through the driver's context stack
// rather than by cudaSetDevice(previous), which would create a context (and take hundreds of megabytes) on a device that the
// thread never used.
bool enter_device(int index);
void leave_device() noexcept;

class DeviceGuard : NonCopyable {
public:
    explicit DeviceGuard(int index) : has_entered_(enter_device(index)) {}
    ~DeviceGuard() {
        if (has_entered_) leave_device();
    }

private:
    const bool has_entered_;
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
