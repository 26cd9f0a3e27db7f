#include "device/test_device.h"

#include <cstdio>

#include "device/cuda/device.h"
#include "support/testing.h"

namespace deep_ep::testing {

std::shared_ptr<dev::Device> test_device() {
    static const std::shared_ptr<dev::Device> device = dev::make_cuda_device(0);
    return device;
}

}  // namespace deep_ep::testing

// 77 tells ctest that the test was skipped.
int main(int argc, char** argv) {
    if (deep_ep::dev::count_cuda_devices() == 0) {
        std::puts("skipped: no CUDA device, or no driver for it");
        return 77;
    }
    return deep_ep::testing::run_tests(argc, argv);
}
