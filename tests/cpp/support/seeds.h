// How many random schedules a test case takes.
#pragma once

#include <cstdint>

#include "device/simt/context.h"

namespace deep_ep::test {

// `count` where the executor alone looks. Under a sanitizer a third: it needs less luck with the schedule (an order that
// is too weak shows in any), and several times as long.
constexpr uint64_t num_seeds(uint64_t count) {
#if defined(EP_SIMT_ASAN) || defined(EP_SIMT_TSAN)
    return (count + 2) / 3;
#else
    return count;
#endif
}

}  // namespace deep_ep::test
