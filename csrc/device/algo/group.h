// Who calls: a type for each kind of group of threads, taken by every function that more than one thread has to call. A
// function that takes none is called by any thread for itself.
//
// All of them have thread_rank(), size() and sync(), as groups of cooperative groups and NCCL's Coop have, and expect(), by which a
// function says that the whole group calls it. On a GPU that is nothing; the executor reports a thread that stays away,
// or that does something else meanwhile (docs/executor.md). The types are empty, or hold what only the caller knows.
#pragma once

#include <type_traits>

#include "device/prim.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// The running thread alone.
struct Thread {
    EP_DEVICE static constexpr int thread_rank() { return 0; }
    EP_DEVICE static constexpr int size() { return 1; }
    EP_DEVICE static void sync() {}
    EP_DEVICE static void expect() {}
};

// The running warp.
struct Warp {
    EP_DEVICE static int thread_rank() { return prim::lane_idx(); }
    EP_DEVICE static constexpr int size() { return prim::kWarpSize; }
    EP_DEVICE static void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        prim::sync_warp(file, line);
    }
    EP_DEVICE static void expect(const char* what = __builtin_FUNCTION()) { prim::expect_warp(what); }
};

// The running warp with others of its block, next to each other. `barrier` (1..15) is theirs alone as long as they use it.
struct Warps {
    int first;  // warp of the block
    int count;
    int barrier;

    EP_DEVICE int thread_rank() const { return static_cast<int>(threadIdx.x) - first * prim::kWarpSize; }
    EP_DEVICE int size() const { return count * prim::kWarpSize; }
    EP_DEVICE bool has_this_thread() const { return thread_rank() >= 0 && thread_rank() < size(); }
    EP_DEVICE void sync() const { prim::barrier_sync(barrier, size()); }
    EP_DEVICE void expect(const char* what = __builtin_FUNCTION()) const {
        prim::expect_warps(first, count, barrier, what);
    }
};

// The running block.
struct Block {
    EP_DEVICE static int thread_rank() { return static_cast<int>(threadIdx.x); }
    EP_DEVICE static int size() { return static_cast<int>(blockDim.x); }
    EP_DEVICE static int num_warps() { return size() / prim::kWarpSize; }
    EP_DEVICE static void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        prim::sync_block(file, line);
    }
    EP_DEVICE static void expect(const char* what = __builtin_FUNCTION()) { prim::expect_block(what); }
};

// All blocks of the launch. Nothing here waits for other blocks, so there is no sync(); see last_block.h.
struct Grid {
    EP_DEVICE static int64_t thread_rank() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
    EP_DEVICE static int64_t size() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
    EP_DEVICE static void expect(const char* what = __builtin_FUNCTION()) { prim::expect_block(what); }
};

// The group shares the numbers from 0 to `count`: `work(i)` for each, by the thread whose turn it is.
template <class Group, class Count, class Work>
EP_DEVICE void for_each(const Group& group, Count count, const Work& work) {
    group.expect();
    for (auto i = static_cast<Count>(group.thread_rank()); i < count; i += static_cast<Count>(group.size())) work(i);
}

// One lane's answer on every lane. What it has acquired may be touched by all of them.
EP_DEVICE bool broadcast(Warp warp, bool answer, int lane = 0) {
    const int known = __shfl_sync(prim::kFullMask, answer ? 1 : 0, lane);
    warp.sync();  // one lane's acquire, every lane's accesses
    return known != 0;
}

// Has every lane succeeded? What each has acquired may be touched by all of them.
EP_DEVICE bool all(Warp warp, bool answer) {
    const bool is_agreed = __all_sync(prim::kFullMask, answer) != 0;
    warp.sync();  // each lane's acquire, every lane's accesses
    return is_agreed;
}

// A barrier of the block. Has one of its threads said yes?
EP_DEVICE bool any(Block, bool answer, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return prim::sync_block_any(answer, file, line);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
