#include "device/simt/block.h"

#include <algorithm>
#include <utility>

#include "device/simt/core.h"

namespace deep_ep::simt {

__thread Index3 threadIdx;
__thread Index3 blockIdx;
__thread Index3 blockDim;
__thread Index3 gridDim;
__thread Running running;
__thread Fiber* current_fiber;

namespace {

size_t ring_capacity(int num_threads) {
    size_t capacity = 32;
    while (capacity < static_cast<size_t>(num_threads)) capacity *= 2;
    return capacity;
}

// First code of every fiber. It must not throw and never returns.
void fiber_main() {
    Fiber& self = *current_fiber;
    Block& block = *self.block;
    Launch& launch = block.launch();
    hb::acquire(launch.begin);
    try {
        launch.code.run(launch.code.params, block.shared().static_part());
        block.check_exit(self);
        hb::release(launch.end);
    } catch (...) {
        hb::Quiet quiet;
        block.core().fail_launch(block.launch(), std::current_exception());
    }
    block.finish(self);
}

}  // namespace

void report_outside_kernel(const char* primitive) {
    throw InternalError(concat(primitive, " was called outside a kernel"));
}

Block::Block(Core& core, int num_threads)
    : core_(core),
      drive_(core.drive()),
      fibers_(static_cast<size_t>(num_threads)),
      warps_(static_cast<size_t>(num_threads) / 32),
      ready_(ring_capacity(num_threads)),
      bulk_(*this) {
    polling_.reserve(fibers_.size());
}

Block::~Block() { give_agents_back(); }

void Block::take_agents() {
    for (Fiber& fiber : fibers_) {
        const std::string name =
            concat(launch_->name, " dev ", launch_->device->ordinal, " block ", block_idx_, " thread ", fiber.thread);
        fiber.agent =
            launch_->stream->agents.take(serial + 1, launch_->device, launch_->device->has_bulk_copy, name.c_str());
        fiber.context.tsan_fiber = hb::context_of(fiber.agent);
    }
}

void Block::give_agents_back() {
    for (Fiber& fiber : fibers_) {
        if (fiber.agent == nullptr) continue;
        if (fiber.state != FiberState::kExited || launch_->has_failed) {
            hb::As as(fiber.context.tsan_fiber);
            hb::release(launch_->device->failed);
        }
        launch_->stream->agents.give_back(fiber.agent);
        fiber.agent = nullptr;
    }
}

void Block::start(Launch& launch, int block_idx, std::unique_ptr<StackSlab> stacks) {
    launch_ = &launch;
    block_idx_ = block_idx;
    stacks_ = std::move(stacks);
    shared_.prepare(launch.code.shared_bytes, static_cast<size_t>(launch.config.dynamic_shared_bytes));
    for (Warp& warp : warps_) warp.exited = 0, warp.num_open = 0;
    for (NamedBarrier& barrier : barriers_) barrier = NamedBarrier{};
    first_exited_ = nullptr;
    bulk_.clear();
    polling_.clear();
    ready_head_ = num_ready_ = 0;
    stalled_until = 0;
    num_live_ = num_threads();
    for (int i = 0; i < num_threads(); ++i) {
        Fiber& fiber = fibers_[static_cast<size_t>(i)];
        fiber = Fiber{};
        fiber.block = this;
        fiber.thread = i;
        fiber.stack_low = stacks_->low(i);
        fiber.context.create(stacks_->low(i), stacks_->top(i), fiber_main);
        make_ready(fiber);
    }
    if (hb::kIsEnabled) take_agents();
}

std::unique_ptr<StackSlab> Block::stop() {
    num_live_ = 0;
    if (hb::kIsEnabled) give_agents_back();
    return std::move(stacks_);
}

void Block::fail_stack(const Fiber& self) const {
    fail(self,
         concat("stack overflow: a fiber has ", stacks_->stack_bytes(), " bytes (SchedulerOptions::stack_bytes)"));
}

void Block::yield(Fiber& self) {
    make_ready(self);
    suspend(self);
}

void Block::run_turn(uint64_t quantum) {
    for (Fiber* fiber : polling_) line_up(*fiber);
    polling_.clear();
    quantum_ = quantum;
    Fiber* first = pick();
    if (first == nullptr) return;
    blockIdx = {static_cast<unsigned>(block_idx_), 0, 0};
    blockDim = {static_cast<unsigned>(num_threads()), 1, 1};
    gridDim = {static_cast<unsigned>(launch_->config.num_blocks), 1, 1};
    running.is_seeded = drive_.is_seeded;
    threadIdx = {};
    enter(*first);
    Context::switch_to(drive_.context, first->context);
    current_fiber = nullptr;
    running = Running{};
}

bool Block::can_go_on() const {
    return std::any_of(fibers_.begin(), fibers_.end(),
                       [](const Fiber& fiber) { return fiber.state == FiberState::kReady; });
}

bool Block::take_changes() {
    bool has_any = false;
    for (Fiber& fiber : fibers_) has_any |= std::exchange(fiber.poll.has_changed_memory, false);
    return has_any;
}

uint64_t Block::state_hash() const {
    uint64_t hash = serial;
    for (const Fiber& fiber : fibers_) {
        for (const uint64_t word : {fiber.poll.hash, fiber.previous_poll_hash, static_cast<uint64_t>(fiber.state),
                                    static_cast<uint64_t>(fiber.line)})
            hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
    }
    return hash;
}

void Block::poll(Fiber& self) {
    PollRecord& seen = self.poll;
    if (seen.has_changed_memory || seen.hash != self.previous_poll_hash) drive_.note_progress();
    if (seen.num_loads == 0 && seen.has_read_clock) drive_.has_sleeper = true;
    self.previous_poll_hash = seen.hash;
    seen.hash = 0;
    seen.num_loads = seen.num_repeats = 0;
    seen.has_read_clock = seen.has_changed_memory = false;
    self.state = FiberState::kPolling;
    polling_.push_back(&self);
    suspend(self);
    self.wait_note = nullptr;
}

void Block::wait_barrier(Fiber& self, int num_threads) {
    const int id = self.barrier_id;
    if (id < 0 || id >= kNumBarriers) fail(self, concat("barrier id ", id, " is outside 0..15"));
    if (num_threads <= 0 || num_threads % 32 != 0 || num_threads > this->num_threads()) {
        fail(self, concat("barrier ", id, ": ", num_threads, " threads is no multiple of 32 within the block's ",
                          this->num_threads()));
    }
    NamedBarrier& barrier = barriers_[id];
    if (barrier.expected == 0) barrier.expected = num_threads;
    if (barrier.expected != num_threads) {
        fail(self, concat("barrier ", id, ": this thread expects ", num_threads, " threads, earlier ones expect ",
                          barrier.expected));
    }
    if (id == 0 && num_live_ != this->num_threads()) {
        fail(self, concat("__syncthreads, but ", this->num_threads() - num_live_, " threads have returned"));
    }
    drive_.note_progress();
    if (barrier.arrived == 0) {
        barrier.meeting = hb::make_key();
    } else if (id == 0) {
        check_same(self, *barrier.waiting, self.block_calls, barrier.waiting->block_calls, "block");
    }
    hb::release(barrier.meeting);
    barrier.vote |= self.barrier_vote;
    if (++barrier.arrived < barrier.expected) {
        self.state = FiberState::kBarrier;
        self.next_waiting = barrier.waiting;
        self.meeting = barrier.meeting;
        hb::add_reference(self.meeting);
        barrier.waiting = &self;
        suspend(self);
        leave_meeting(self);
        return;
    }
    hb::acquire(barrier.meeting);
    hb::drop(barrier.meeting);
    // The list is newest first: turn it round so that threads go on in the order in which they came.
    Fiber* in_order = nullptr;
    for (Fiber* fiber = barrier.waiting; fiber != nullptr;) {
        Fiber* next = std::exchange(fiber->next_waiting, in_order);
        in_order = std::exchange(fiber, next);
    }
    self.barrier_vote = barrier.vote;
    for (Fiber* fiber = in_order; fiber != nullptr; fiber = fiber->next_waiting) {
        fiber->barrier_vote = barrier.vote;
        make_ready(*fiber);
    }
    barrier = NamedBarrier{};
}

void Block::leave_meeting(Fiber& self) {
    hb::acquire(self.meeting);
    hb::drop(std::exchange(self.meeting, 0));
}

void Block::check_exit(Fiber& self) {
    if (self.num_open_copies != 0) fail(self, "returns with bulk stores that were never committed");
    if (self.num_groups_awaited < self.num_groups) {
        fail(self, concat("returns with ", self.num_groups - self.num_groups_awaited,
                          " bulk groups whose shared source may still be read: wait_group.read first"));
    }
    const Warp& warp = warps_[static_cast<size_t>(self.warp())];
    for (int i = 0; i < warp.num_open; ++i) {
        const Rendezvous& group = warp.open[i];
        if ((group.mask >> self.lane()) & 1u) {
            fail(self, concat("returns while lanes ", hex(group.arrived), " wait for it in ", name_of(group.op), "(",
                              hex(group.mask), ") at ", group.file, ":", group.line));
        }
    }
    if (barriers_[0].expected != 0) fail(self, "returns while other threads wait in __syncthreads");
    check_groups_at_exit(self);
}

void Block::finish(Fiber& self) {
    self.state = FiberState::kExited;
    if (first_exited_ == nullptr) first_exited_ = &self;
    warps_[static_cast<size_t>(self.warp())].exited |= 1u << self.lane();
    --num_live_;
    drive_.note_progress();
    Fiber* next = launch_->has_failed ? nullptr : pick();
    if (next != nullptr) {
        enter(*next);
        Context::switch_to(self.context, next->context);
    } else {
        Context::switch_to(self.context, drive_.context);
    }
    __builtin_unreachable();
}

std::string Block::where(const Fiber& fiber) const {
    return concat(launch_->describe(), " block ", block_idx_, " warp ", fiber.warp(), " lane ", fiber.lane());
}

void Block::fail(const Fiber& self, const std::string& what) const {
    hb::Quiet quiet;
    throw KernelError(concat(where(self), ": ", what));
}

bool block_barrier(int id, int num_threads, const char* file, int line, bool predicate) {
    Fiber& self = running_fiber("a barrier");
    if (running.is_seeded) perturb();
    self.barrier_id = id;
    self.file = file;
    self.line = line;
    self.barrier_vote = predicate;
    self.block->wait_barrier(self, num_threads);
    return self.barrier_vote;
}

void perturb() {
    Fiber& self = *current_fiber;
    Block& block = *self.block;
    if (block.drive().draw_yield()) block.yield(self);
}

void report_misaligned(const void* ptr, size_t alignment) {
    const std::string what = concat("misaligned address ", ptr, ": ", alignment, " bytes at once");
    if (current_fiber == nullptr) throw InternalError(what);
    current_fiber->block->fail(*current_fiber, what);
}

void report_spin(const void* ptr) {
    current_fiber->block->fail(*current_fiber, concat("polls address ", ptr, " without prim::pause() in between"));
}

uint64_t clock_ns() {
    Fiber& self = running_fiber("prim::clock_ns");
    self.poll.has_read_clock = true;
    return self.block->core().read_clock();
}

void pause() {
    Fiber& self = running_fiber("prim::pause");
    self.block->poll(self);
}

void* dynamic_shared() { return running_fiber("prim::dynamic_shared").block->shared().dynamic_part(); }

bool has_bulk_copy() { return running_fiber("prim::has_bulk_copy").block->launch().device->has_bulk_copy; }

void describe_wait(const char* what, int64_t detail) {
    Fiber& self = running_fiber("simt::describe_wait");
    self.wait_note = what;
    self.wait_detail = detail;
}

}  // namespace deep_ep::simt
