// From a kernel's record to a sentence: which peer, at which stage, never entered or stalled.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "layout/status.h"

namespace deep_ep::runtime {

// What other sources than the record know of a rank; empty: nothing.
struct Peers {
    std::function<std::string(int peer)> remark;    // put behind its name
    std::function<std::string(int origin)> reason;  // why it reported an error of its own
};

// `started[i]`: the last call that rank i has announced to this rank.
std::string describe_failure(const layout::WaitRecord& record, int rank, const std::vector<uint64_t>& started,
                             const Peers& peers);
std::string describe_warning(const layout::WaitRecord& record, int rank, const std::vector<uint64_t>& started,
                             const Peers& peers);
// Another rank's reason, for one that has no kernel that could be told.
std::string describe_note(int rank, int origin, const std::string& reason);

}  // namespace deep_ep::runtime
