// What the device of a rank is. Each back end defines it.
#pragma once

#include <memory>

#include "device/runtime.h"

namespace deep_ep::testing {

std::shared_ptr<dev::Device> make_test_device(int rank);

}  // namespace deep_ep::testing
