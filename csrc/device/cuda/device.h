// GPUs behind the runtime facade. Includes nothing of CUDA: may be used by any host code.
#pragma once

#include <memory>

#include "core/driver_floor.h"
#include "device/runtime.h"

namespace deep_ep::dev {

// Asks no GPU, so it works where the driver is too old for everything else.
CudaVersions cuda_versions() noexcept;

// How many CUDA devices this process can use; 0 where there is no driver. Never throws.
int count_cuda_devices() noexcept;

// The device with this index in CUDA's own numbering (after CUDA_VISIBLE_DEVICES). Throws InvalidArgument or CudaError.
std::shared_ptr<Device> make_cuda_device(int index);

}  // namespace deep_ep::dev
