// What a call that fails leaves in its outputs: nothing that passes for a result. Floating rows and scales are NaN, and no
// expert has rows.
#pragma once

#include "kernels/low_latency/turn.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

constexpr uint32_t kSpoiled = 0xffffffffu;  // NaN in bfloat16, float32, E4M3 and, as exponents, UE8M0

EP_DEVICE Vec16 spoiled_vec() { return {{kSpoiled, kSpoiled, kSpoiled, kSpoiled}}; }

// Memory that one launch fills with NaN.
struct Spoils {
    void* words;
    int64_t num_words;

    static constexpr int kWordsAtOnce = 16 * 1024;
    EP_DEVICE int64_t num_pieces() const { return (num_words + kWordsAtOnce - 1) / kWordsAtOnce; }
    // One warp.
    EP_DEVICE void fill(int64_t piece) const {
        const int64_t end = (piece + 1) * kWordsAtOnce < num_words ? (piece + 1) * kWordsAtOnce : num_words;
        for (int64_t i = piece * kWordsAtOnce + prim::lane_idx(); i < end; i += kWarpSize)
            static_cast<uint32_t*>(words)[i] = kSpoiled;
    }
};

// A warp of a launch in which no row has a place, as a table has not come: with the other warps like it, it fills both.
EP_DEVICE_COLD void spoil(layout::LowLatencyTurn* turn, Spoils rows, Spoils scales) {
    const int64_t num_pieces = rows.num_pieces() + scales.num_pieces();
    for (;;) {
        uint32_t next = 0;
        if (prim::lane_idx() == 0) next = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&turn->spoiled_pieces, 1u);
        const int64_t piece = __shfl_sync(kFullMask, next, 0);
        if (piece >= num_pieces) return;
        if (piece < rows.num_pieces())
            rows.fill(piece);
        else
            scales.fill(piece - rows.num_pieces());
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
