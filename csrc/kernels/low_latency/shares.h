// Who does which part of a receive phase: units of work, one for a warp at a time.
#pragma once

#include "kernels/low_latency/launch_session.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

// Of a warp in a launch that only receives.
EP_DEVICE int first_unit() { return prim::warp_idx() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x); }

// All blocks that receive: `work(unit, is_first, claim)` for every unit below `num_units`, a warp for each, and at least once
// for every warp, so that it may have barriers the first time: then `unit` may be beyond. Work may call claim() when what it
// waited for has come: the next share is claimed then, while this one is still worked on. Not before: blocks that are still
// sending would find no share left, and this one would do two.
template <class Work>
EP_DEVICE void for_each_unit(Block block, const LaunchSession& launch, int num_units, const Work& work) {
    block.expect();
    const CallContext& c = launch.context;
    bool is_first = true;
    if (c.phase == Phase::kReceive) {
        const int num_blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
        for (int unit = first_unit(); is_first || unit < num_units;
             unit += num_blocks * block.num_warps(), is_first = false)
            work(unit, is_first, [] {});
        return;
    }
    int& current = launch.role.share;
#pragma unroll 1
    for (int share = current; share * block.num_warps() < num_units; share = current, is_first = false) {
        uint32_t next = 0;
        bool is_claimed = false;
        const auto claim = [&] {
            if (block.thread_rank() == 0 && !is_claimed) next = launch.claim_share();
            is_claimed = true;
        };
        const int unit = share * block.num_warps() + prim::warp_idx();
        if (is_first || unit < num_units) work(unit, is_first, claim);
        claim();
        block.sync();  // everybody knows the share before
        if (block.thread_rank() == 0) current = static_cast<int>(next);
        block.sync();
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
