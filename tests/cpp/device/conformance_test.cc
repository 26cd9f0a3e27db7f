// The conformance tests on the CPU. On a GPU: device_cuda.cmake.
#include "device/conformance_host.cu"
#include "device/conformance_prim.cu"
#include "device/conformance_warp.cu"

#include "device/simt/device.h"

namespace deep_ep::testing {

std::shared_ptr<dev::Device> test_device() {
    static const std::shared_ptr<dev::Device> device = simt::make_cpu_device();
    return device;
}

}  // namespace deep_ep::testing
