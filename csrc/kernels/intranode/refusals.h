// Bad input that only a kernel can see: what the handle or the peers say cannot be. Each ends the call with a report.
#pragma once

#include "device/algo/watch.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

EP_DEVICE_COLD bool refuse_room(algo::Watch watch, int num_rows_held, int num_rows) {
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kCapacity, 0},
               static_cast<uint64_t>(num_rows_held), static_cast<uint64_t>(num_rows), 0);
    return false;
}

// False: `num_rows` belong to this rank, and its tensors hold fewer.
EP_DEVICE bool has_room(const algo::Watch& watch, int num_rows_held, int num_rows) {
    return num_rows <= num_rows_held || refuse_room(watch, num_rows_held, num_rows);
}

// False: token `token` is the one at `position` (from 0) of those that go to `rank`, and fewer are stated: whoever wrote or
// read its row would do so beyond what is there.
EP_DEVICE_COLD bool refuse_position(algo::Watch watch, int rank, int token, int position, int num_stated) {
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kPosition, rank, token},
               static_cast<uint64_t>(num_stated), static_cast<uint64_t>(position) + 1, 0);
    return false;
}

// False: the rows from `source` to `destination`, of `num_rows` in all, cannot be there.
EP_DEVICE_COLD bool refuse_rows(algo::Watch watch, int source, int destination, int first, int end, int num_rows) {
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kRows, source, destination},
               static_cast<uint64_t>(num_rows), layout::make_row_span(first, end), 0);
    return false;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
