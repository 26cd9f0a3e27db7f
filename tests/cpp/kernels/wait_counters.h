// The counters of waits, as tests ask for them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "layout/status.h"

namespace deep_ep::test {

class WaitTable {
public:
    WaitTable(std::vector<layout::WaitCell> cells, int num_ranks) : cells_(std::move(cells)), num_ranks_(num_ranks) {}

    const layout::WaitCell& at(layout::Operation operation, layout::Stage stage, int peer) const {
        return cells_[static_cast<size_t>(layout::wait_cell(operation, stage, num_ranks_, peer))];
    }
    // Where the operation has waited longest: stage and peer.
    std::pair<layout::Stage, int> longest(layout::Operation operation) const {
        const auto first = cells_.begin() + layout::wait_cell(operation, {}, num_ranks_, 0);
        const auto found =
            std::max_element(first, first + layout::kNumStages * num_ranks_,
                             [](const auto& one, const auto& other) { return one.waited_ns < other.waited_ns; });
        const auto index = static_cast<int>(found - first);
        return {static_cast<layout::Stage>(index / num_ranks_), index % num_ranks_};
    }
    // For this peer, at all stages.
    uint64_t waited_ns(layout::Operation operation, int peer) const {
        uint64_t sum = 0;
        for (int stage = 0; stage < layout::kNumStages; ++stage)
            sum += at(operation, static_cast<layout::Stage>(stage), peer).waited_ns;
        return sum;
    }

private:
    std::vector<layout::WaitCell> cells_;
    int num_ranks_;
};

}  // namespace deep_ep::test
