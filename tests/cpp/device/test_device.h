// The device that a conformance binary tests: one source, one binary for each back end.
#pragma once

#include <memory>

#include "device/runtime.h"

namespace deep_ep::testing {

// The same object at each call. Each back end has its own definition.
std::shared_ptr<dev::Device> test_device();

}  // namespace deep_ep::testing
