// What the extension modules share: devices by their index, and addresses as Python has them.
#pragma once

#include <cstdint>
#include <memory>

#include "core/error.h"
#include "device/simt/device.h"
#if EP_WITH_CUDA
#include "device/cuda/device.h"
#endif

namespace deep_ep {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// A CUDA device of this process; negative: the CPU.
inline std::shared_ptr<dev::Device> make_device(int index) {
    if (index < 0) return simt::make_cpu_device();
#if EP_WITH_CUDA
    return dev::make_cuda_device(index);
#else
    throw Error("this build of deep_ep has no CUDA device: it was built without a CUDA toolkit");
#endif
}

}  // namespace deep_ep
