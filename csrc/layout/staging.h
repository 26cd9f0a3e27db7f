// The shared memory of one block in kernels that stage rows: for each warp a ring of stages for bulk copies.
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

constexpr int kLowLatencyChunkBytes =
    1024;  // of an expert's row, that a warp of the low-latency combine has in a stage

// The ring of one warp: its mbarriers, then its stages. No stages: rows go through registers.
struct Staging {
    static constexpr int kBarrierBytes = 16;  // of each stage, so that stages stay aligned

    int num_stages = 0;
    int stage_bytes = 0;  // a multiple of 16

    constexpr int bytes() const { return num_stages * (stage_bytes + kBarrierBytes); }
    constexpr int barrier_offset(int stage) const { return stage * kBarrierBytes; }
    constexpr int stage_offset(int stage) const { return num_stages * kBarrierBytes + stage * stage_bytes; }
};

// What a block of the low-latency combine knows of the tokens that it sums next, behind the rings of its warps. Of each
// token the top-k entries, in groups of 32 or fewer.
struct LowLatencyBatch {
    int num_tokens = 0;
    int num_groups = 0;  // of a token
    Field is_here;       // i32[R]: the source's table counts in this call
    Field placed;        // u32[tokens][groups]: entries that have a row here
    Field wanted;        // the same: entries that the caller has kept in this call
    Field rows;          // i32[tokens][K]
    Field weights;       // f32[tokens][K]
    int bytes = 0;

    static constexpr LowLatencyBatch make(int num_tokens, int num_topk, int num_ranks) {
        constexpr int kGroup = 32;
        LowLatencyBatch layout;
        layout.num_tokens = num_tokens;
        layout.num_groups = (num_topk + kGroup - 1) / kGroup;
        const auto num_groups = static_cast<uint64_t>(num_tokens) * static_cast<uint64_t>(layout.num_groups);
        const auto num_entries = static_cast<uint64_t>(num_tokens) * static_cast<uint64_t>(num_topk);
        FieldCursor cursor;
        layout.is_here = cursor.take(4, static_cast<uint64_t>(num_ranks), 4);
        layout.placed = cursor.take(4, num_groups, 4);
        layout.wanted = cursor.take(4, num_groups, 4);
        layout.rows = cursor.take(4, num_entries, 4);
        layout.weights = cursor.take(4, num_entries, 4);
        layout.bytes = static_cast<int>(cursor.total(4));
        return layout;
    }
};

}  // namespace deep_ep::layout
