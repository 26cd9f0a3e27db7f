// One thread of the process looks after all its Buffers: who only replays CUDA graphs makes no calls that could tell of a
// failure. It says what it finds on stderr, knows nothing of Python, and lives as long as the process.
#pragma once

#include <memory>

#include "runtime/failure.h"

namespace deep_ep::runtime {

// From now on `desk` is looked at ten times a second, until it is closed or gone. In a forked child nobody is watched but
// those who ask there.
void watch(const std::shared_ptr<FailureDesk>& desk);

}  // namespace deep_ep::runtime
