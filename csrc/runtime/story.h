// From a kernel's record to a sentence: which peer, at which stage, never entered or stalled.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layout/status.h"

namespace deep_ep::runtime {

// `started[i]`: the last call that rank i has announced to this rank.
std::string describe_failure(const layout::WaitRecord& record, int rank, const std::vector<uint64_t>& started);
std::string describe_warning(const layout::WaitRecord& record, int rank, const std::vector<uint64_t>& started);

}  // namespace deep_ep::runtime
