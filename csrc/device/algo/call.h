// The frame of one call of the high-throughput mode: number it, announce it, wait for the peers' banks, finish it.
#pragma once

#include "device/algo/watch.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

EP_DEVICE uint64_t current_call(const layout::LocalState* local) {
    // Written by an earlier kernel of the same stream only.
    return prim::load<prim::Order::kRelaxed, prim::Scope::kGpu>(&local->num_calls) + 1;
}

EP_DEVICE int bank_of(uint64_t call) { return static_cast<int>(call % layout::kNumBanks); }

// One warp. Tells every peer that this rank has entered `watch.call`, that is: has finished the calls before it.
EP_DEVICE void announce_start(const Watch& watch) {
    for (int peer = prim::lane_idx(); peer < watch.heap.num_ranks(); peer += prim::kWarpSize)
        // Release: what this rank read in earlier calls is read. Pairs with: wait_for_banks at the peer.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(watch.heap.started(peer, watch.heap.rank()), watch.call);
}

// One warp. True once no peer still reads the bank of this call: it was last used two calls ago, so mostly at the first look.
EP_DEVICE bool wait_for_banks(const Watch& watch) {
    bool is_ready = true;
    for (int peer = prim::lane_idx(); peer < watch.heap.num_ranks(); peer += prim::kWarpSize)
        is_ready &= wait_at_least(watch, {layout::Stage::kStart, peer}, watch.heap.started(watch.heap.rank(), peer),
                                  watch.call - 1);
    return __all_sync(prim::kFullMask, is_ready);
}

// How a launch stands when one of its blocks has ended: not all have, or this was the last one.
enum class LaunchEnd : uint32_t { kOthersGoOn, kDone, kFailed };

// One warp of each block, when all warps of the block have done their work and met in a barrier. What it returns holds on
// every lane; in the block that comes last, which has then acquired what the others did before, it says whether any failed.
EP_DEVICE LaunchEnd count_block(const Watch& watch, bool has_failed) {
    using prim::Order;
    using prim::Scope;
    constexpr uint32_t kFailed = 1u << 16;  // the upper half counts blocks that failed
    uint32_t* counter = &watch.words.local->num_done_blocks;
    auto end = LaunchEnd::kOthersGoOn;
    if (prim::lane_idx() == 0) {
        const uint32_t mine = has_failed ? kFailed + 1 : 1;
        const uint32_t count = prim::fetch_add<Order::kAcqRel, Scope::kGpu>(counter, mine) + mine;
        if (count % kFailed == gridDim.x) {
            prim::store<Order::kRelaxed, Scope::kGpu>(counter, 0u);
            end = count < kFailed ? LaunchEnd::kDone : LaunchEnd::kFailed;
        }
    }
    end = static_cast<LaunchEnd>(__shfl_sync(prim::kFullMask, static_cast<uint32_t>(end), 0));
    __syncwarp();  // one lane's acquire, each lane's releases
    return end;
}

// One thread of the block that comes last. Nothing of this launch looks at the count any more, and the end of the launch
// publishes it, so no order is needed.
EP_DEVICE void count_call(const Watch& watch) {
    prim::store<prim::Order::kRelaxed, prim::Scope::kGpu>(&watch.words.local->num_calls, watch.call);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
