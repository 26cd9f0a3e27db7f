// The ranks of the conformance suite on GPUs: as many as there are, in turn.
#include "device/cuda/device.h"
#include "rail/test_device.h"

namespace deep_ep::testing {

std::shared_ptr<dev::Device> make_test_device(int rank) {
    return dev::make_cuda_device(rank % dev::count_cuda_devices());
}

}  // namespace deep_ep::testing
