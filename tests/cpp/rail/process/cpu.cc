// The process on the CPU. On a GPU: device_cuda.cmake.
#include "rail/process/host.cu"
#include "rail/process/rail_process.cu"

#include "device/simt/device.h"

namespace deep_ep::testing {

std::shared_ptr<dev::Device> make_test_device(int) { return simt::make_cpu_device(); }

}  // namespace deep_ep::testing
