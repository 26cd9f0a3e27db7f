// One running block: its fibers, warps, barriers, shared memory and bulk copies. Internal to the executor.
//
// A block stays on one OS thread and its fibers switch directly to one another, so nothing here is atomic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "device/simt/access.h"
#include "device/simt/bulk.h"
#include "device/simt/context.h"
#include "device/simt/cuda_names.h"
#include "device/simt/drive.h"
#include "device/simt/happens_before.h"
#include "device/simt/shared_arena.h"
#include "device/simt/stacks.h"

namespace deep_ep::simt {

class Block;
class Core;
struct Launch;

constexpr int kNumBarriers = 16;  // of a block; 0 is __syncthreads

// What a thread has done so far as part of a group. Threads of one group agree in it wherever they meet, or end.
struct GroupCalls {
    uint32_t num_calls = 0;
    uint32_t hash = 0;
    const char* last = "";

    void add(const char* what);
};

enum class FiberState : uint8_t { kReady, kPolling, kCollective, kBarrier, kExited };

struct Fiber {
    PollRecord poll;
    uint64_t previous_poll_hash = 0;
    Context context;
    Block* block = nullptr;
    const char* stack_low = nullptr;
    int thread = 0;
    FiberState state = FiberState::kReady;

    // Warp collective or barrier that this fiber waits for or has just completed.
    WarpOp op = WarpOp::kSync;
    uint8_t source_lane = 0;
    uint32_t mask = 0;
    uint64_t exchange = 0;  // in: the value given; out: the result
    int barrier_id = 0;
    bool barrier_vote = false;  // its own, and afterwards that of all
    const char* file = "";
    int line = 0;
    Fiber* next_waiting = nullptr;

    GroupCalls warp_calls;
    GroupCalls block_calls;

    // Bulk groups of this thread: committed, and how many of them it has waited for.
    int num_groups = 0;
    int num_groups_awaited = 0;
    int num_open_copies = 0;

    const char* wait_note = nullptr;
    int64_t wait_detail = 0;
    hb::Agent* agent = nullptr;
    hb::Key meeting = 0;  // of the barrier or collective it waits for

    int lane() const { return thread % 32; }
    int warp() const { return thread / 32; }
};

// Lanes that wait for each other. Masks of one warp that are in use at the same time never overlap, hence 16 at most.
struct Rendezvous {
    uint32_t mask;
    uint32_t arrived;
    WarpOp op;
    int line;
    const char* file;
    hb::Key meeting;
    int first;  // lane that has come
};

struct Warp {
    uint32_t exited = 0;
    int num_open = 0;
    Rendezvous open[16];
};

struct NamedBarrier {
    int expected = 0;  // 0: nobody waits
    int arrived = 0;
    bool vote = false;  // of a thread that has arrived
    Fiber* waiting = nullptr;
    hb::Key meeting = 0;
};

class Block {
public:
    Block(Core& core, int num_threads);
    ~Block();

    void start(Launch& launch, int block_idx, std::unique_ptr<StackSlab> stacks);
    std::unique_ptr<StackSlab> stop();  // ends every fiber where it stands

    // Scheduler side: runs fibers until none is ready or `quantum` resumptions have passed.
    void run_turn(uint64_t quantum);
    bool is_finished() const { return num_live_ == 0; }
    bool can_go_on() const;       // some fiber is ready, other than to poll again
    bool take_changes();          // whether a fiber has changed memory since it polled, or since the last call
    uint64_t state_hash() const;  // of where every fiber stands and what it saw
    void finish_copies();         // of a finished block

    // Fiber side. `suspend` returns when the fiber is resumed; the caller has put it wherever it waits.
    void suspend(Fiber& self);
    void poll(Fiber& self);
    uint64_t exchange(Fiber& self);
    void wait_barrier(Fiber& self, int num_threads);
    void yield(Fiber& self);
    [[noreturn, gnu::cold]] void fail(const Fiber& self, const std::string& what) const;
    [[noreturn]] void finish(Fiber& self);
    void check_exit(Fiber& self);
    void expect_warp(Fiber& self, const char* what);
    void expect_block(Fiber& self, const char* what);

    Core& core() { return core_; }
    Drive& drive() { return drive_; }
    Launch& launch() { return *launch_; }
    const Launch& launch() const { return *launch_; }
    int block_idx() const { return block_idx_; }
    int num_threads() const { return static_cast<int>(fibers_.size()); }
    const std::vector<Fiber>& fibers() const { return fibers_; }
    const Warp& warp(int index) const { return warps_[static_cast<size_t>(index)]; }
    const NamedBarrier& barrier(int id) const { return barriers_[id]; }
    SharedArena& shared() { return shared_; }
    const SharedArena& shared() const { return shared_; }
    BulkEngine& bulk() { return bulk_; }
    std::string where(const Fiber& fiber) const;

    uint64_t serial = 0;         // of this block among all that ever ran, for the trace
    uint64_t stalled_until = 0;  // seeded schedules: no turn before this pass

private:
    void make_ready(Fiber& fiber);
    void line_up(Fiber& fiber);          // it keeps its state
    void make_ready_next(Fiber& fiber);  // before all others: lanes of one warp stay together in the cache
    Fiber* pick();
    void enter(Fiber& fiber);
    Rendezvous& join(Warp& warp, Fiber& self);
    void check_same(const Fiber& self, const Fiber& other, const GroupCalls& mine, const GroupCalls& others,
                    const char* group) const;
    void check_groups_at_exit(const Fiber& self) const;
    [[noreturn, gnu::cold]] void fail_group(const Fiber& self, const char* what, const std::string& why) const;
    [[noreturn, gnu::cold]] void fail_exchange(const Fiber& self, const std::string& what) const;
    void leave_meeting(Fiber& self);
    void take_agents();
    void give_agents_back();
    void complete(Warp& warp, Rendezvous& group, Fiber& last);
    [[noreturn, gnu::cold]] void fail_stack(const Fiber& self) const;

    Core& core_;
    Drive& drive_;
    Launch* launch_ = nullptr;
    int block_idx_ = 0;
    int num_live_ = 0;
    const Fiber* first_exited_ = nullptr;
    uint64_t quantum_ = 0;
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    NamedBarrier barriers_[kNumBarriers];
    std::vector<Fiber*> ready_;  // ring buffer
    size_t ready_head_ = 0;
    size_t num_ready_ = 0;
    std::vector<Fiber*> polling_;
    std::unique_ptr<StackSlab> stacks_;
    SharedArena shared_;
    BulkEngine bulk_;
};

extern __thread Fiber* current_fiber;

[[noreturn, gnu::cold]] void report_outside_kernel(const char* primitive);

// The running fiber; an error outside kernels.
inline Fiber& running_fiber(const char* primitive) {
    if (__builtin_expect(current_fiber == nullptr, 0)) report_outside_kernel(primitive);
    return *current_fiber;
}

std::string hex(uint64_t value);

const char* name_of(WarpOp op);

std::string describe_difference(const Fiber& other, const GroupCalls& mine, const GroupCalls& others,
                                const char* group);

// --- what happens at every switch --------------------------------------------------------------------------------

inline void Block::make_ready(Fiber& fiber) {
    fiber.state = FiberState::kReady;
    line_up(fiber);
}

inline void Block::line_up(Fiber& fiber) {
    ready_[(ready_head_ + num_ready_) & (ready_.size() - 1)] = &fiber;
    ++num_ready_;
}

inline void Block::make_ready_next(Fiber& fiber) {
    fiber.state = FiberState::kReady;
    ready_head_ = (ready_head_ - 1) & (ready_.size() - 1);
    ready_[ready_head_] = &fiber;
    ++num_ready_;
}

inline Fiber* Block::pick() {
    if (num_ready_ == 0 || quantum_ == 0) return nullptr;
    --quantum_;
    const size_t wrap = ready_.size() - 1;
    if (drive_.is_seeded) {
        const size_t chosen = drive_.rng.below(num_ready_);
        std::swap(ready_[ready_head_], ready_[(ready_head_ + chosen) & wrap]);
    }
    Fiber* next = ready_[ready_head_];
    ready_head_ = (ready_head_ + 1) & wrap;
    --num_ready_;
    return next;
}

// Makes `fiber` the running one; the switch of stacks follows.
inline void Block::enter(Fiber& fiber) {
    current_fiber = &fiber;
    running.poll = &fiber.poll;
    threadIdx.x = static_cast<unsigned>(fiber.thread);
    drive_.note(serial * 1024 + static_cast<uint64_t>(fiber.thread));
}

inline void Block::check_same(const Fiber& self, const Fiber& other, const GroupCalls& mine, const GroupCalls& others,
                              const char* group) const {
    if (__builtin_expect(mine.hash == others.hash && mine.num_calls == others.num_calls, 1)) return;
    fail_group(self, mine.last, describe_difference(other, mine, others, group));
}

inline void Block::suspend(Fiber& self) {
    if (__builtin_expect(static_cast<const char*>(__builtin_frame_address(0)) < self.stack_low, 0)) fail_stack(self);
    Fiber* const next = pick();
    if (next == &self) {
        drive_.note(serial * 1024 + static_cast<uint64_t>(self.thread));
    } else if (next != nullptr) {
        enter(*next);
        Context::switch_to(self.context, next->context);
    } else {
        Context::switch_to(self.context, drive_.context);
    }
}

}  // namespace deep_ep::simt
