// One warp's ring of shared-memory stages: what bulk loads have under way, and what bulk stores are taken from.
//
// Item n (counted by the warp from 0) uses stage n % num_stages. The warp keeps the order: a stage is loaded again only
// after the stores from it have been read (bulk_wait_read by the threads that issued them), and after every lane that
// read it has called fence_async_shared and met the loading lane in a __syncwarp. A lane that writes to a stage calls
// fence_async_shared before the __syncwarp that leads to a bulk store from it.
#pragma once

#include "device/algo/group.h"
#include "layout/staging.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// Every lane that reads the stage, and the lane that stores from it.
//
// The one wait without a deadline: it waits for no peer, only for loads that this warp has issued, which land or break the
// context, and then every wait of the host ends. A block may not leave earlier, because what lands after its end would
// land in the shared memory of the next one. A wait for what nobody has loaded is a bug; the executor reports it.
EP_DEVICE void wait_mbarrier(prim::MBarrier* bar, uint32_t phase_parity) {
    while (!prim::mbarrier_try_wait(bar, phase_parity)) {
    }
}

// A place in the order of items: its stage, and the parity of its use of it. Going on costs no division.
class StageCursor {
public:
    EP_DEVICE int stage() const { return stage_; }
    EP_DEVICE uint32_t parity() const { return parity_; }
    EP_DEVICE void advance(int num_stages) {
        if (++stage_ < num_stages) return;
        stage_ = 0;
        parity_ ^= 1;
    }

private:
    int stage_ = 0;
    uint32_t parity_ = 0;
};

class Stages {
public:
    // `memory`: staging.bytes() of dynamic shared memory, this warp's alone, 16-byte aligned.
    EP_DEVICE Stages(uint8_t* memory, const layout::Staging& staging) : memory_(memory), staging_(staging) {}

    // Once, before anything else.
    EP_DEVICE void init(Warp warp) const {
        warp.expect();
        if (warp.thread_rank() == 0) {
            for (int stage = 0; stage < staging_.num_stages; ++stage) prim::mbarrier_init(barrier(stage), 1);
            prim::mbarrier_init_fence();
        }
        warp.sync();
    }

    // For warps that store from their stages: before item n is stored, item n + num_ahead() may be loaded, once every
    // thread that stores has called wait_reusable(). With three stages or more the latest stores may still be read.
    EP_DEVICE int num_ahead() const { return staging_.num_stages > 2 ? staging_.num_stages - 2 : 1; }
    EP_DEVICE void wait_reusable() const {
        if (staging_.num_stages > 2)
            prim::bulk_wait_read<1>();
        else
            prim::bulk_wait_read<0>();
    }

    EP_DEVICE uint8_t* at(int item) const { return memory_ + staging_.stage_offset(item % staging_.num_stages); }

    EP_DEVICE uint8_t* at(const StageCursor& item) const { return memory_ + staging_.stage_offset(item.stage()); }

    // One lane, always the same.
    EP_DEVICE void load(int item, const void* source, uint32_t bytes) const {
        load_stage(item % staging_.num_stages, source, bytes);
    }
    EP_DEVICE void load(const StageCursor& item, const void* source, uint32_t bytes) const {
        load_stage(item.stage(), source, bytes);
    }

    // True once the load of `item` has landed; every item is waited for, in order.
    EP_DEVICE void wait(int item) const {
        wait_mbarrier(barrier(item % staging_.num_stages), static_cast<uint32_t>(item / staging_.num_stages) & 1);
    }
    EP_DEVICE void wait(const StageCursor& item) const { wait_mbarrier(barrier(item.stage()), item.parity()); }

private:
    EP_DEVICE void load_stage(int stage, const void* source, uint32_t bytes) const {
        prim::MBarrier* bar = barrier(stage);
        prim::mbarrier_arrive_expect_tx(bar, bytes);
        prim::bulk_load(memory_ + staging_.stage_offset(stage), source, bytes, bar);
    }
    EP_DEVICE prim::MBarrier* barrier(int stage) const {
        return reinterpret_cast<prim::MBarrier*>(memory_ + staging_.barrier_offset(stage));
    }

    uint8_t* memory_;
    layout::Staging staging_;
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
