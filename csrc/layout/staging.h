// The shared memory of one block in the high-throughput kernels: for each warp a ring of stages for bulk copies.
#pragma once

#include <cstdint>

#include "layout/field.h"

namespace deep_ep::layout {

// What a bulk copy moves for `bytes` bytes.
constexpr uint32_t bulk_bytes(uint64_t bytes) { return static_cast<uint32_t>(align_up(bytes, 16)); }

constexpr int kReduceStages = 4;         // of a reduce warp of combine
constexpr int kReduceStageBytes = 3584;  // a piece of one row
constexpr int kPositionBytes =
    4 * 32;  // at the end of a send stage of dispatch: each lane's note of where the row goes

// The ring of one warp: its mbarriers, then its stages. No stages: rows go through registers.
struct Staging {
    static constexpr int kBarrierBytes = 16;  // of each stage, so that stages stay aligned

    int num_stages = 0;
    int stage_bytes = 0;  // a multiple of 16

    constexpr int bytes() const { return num_stages * (stage_bytes + kBarrierBytes); }
    constexpr int barrier_offset(int stage) const { return stage * kBarrierBytes; }
    constexpr int stage_offset(int stage) const { return num_stages * kBarrierBytes + stage * stage_bytes; }
};

}  // namespace deep_ep::layout
