// The block of a launch that comes last to some point, and goes on there for all of them.
//
// A counter in device memory says how many have come. It is zero between launches: the last block leaves it so.
#pragma once

#include "device/algo/group.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

struct Arrival {
    bool is_last;
    bool is_marked;  // some block has come with a mark; known to the last one
};

// One thread of each block. kAcqRel: its block's work, after a barrier, is released to the last block, which acquires that of
// all. kRelaxed: where the last block reads nothing that the others have written, or only what they wrote with atomics.
template <prim::Order O, prim::Scope S> EP_DEVICE Arrival arrive(uint32_t* counter, bool is_marked = false) {
    constexpr uint32_t kMark = 1u << 16;
    const uint32_t mine = is_marked ? kMark + 1 : 1;
    const uint32_t count = prim::fetch_add<O, S>(counter, mine) + mine;
    const bool is_last = count % kMark == gridDim.x;
    if (is_last) prim::store<prim::Order::kRelaxed, S>(counter, 0u);
    return {is_last, count >= kMark};
}

// One warp of each block, where all of its warps have met in a barrier.
template <prim::Order O, prim::Scope S> EP_DEVICE bool is_last_block(Warp warp, uint32_t* counter) {
    warp.expect();
    bool is_last = false;
    if (warp.thread_rank() == 0) is_last = arrive<O, S>(counter).is_last;
    return broadcast(warp, is_last);
}

// All blocks. `shared`: a word of shared memory.
template <prim::Order O, prim::Scope S> EP_DEVICE bool is_last_block(Block block, uint32_t* counter, int& shared) {
    block.expect();
    block.sync();  // what all threads of the block have done, one thread's release
    if (block.thread_rank() == 0) shared = arrive<O, S>(counter).is_last ? 1 : 0;
    block.sync();  // one thread's acquire, all threads' accesses
    return shared != 0;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
