// The SIMT executor's scheduler: runs the kernels of any number of CPU devices, one fiber per CUDA thread, on one OS
// thread, in an order that a seed repeats exactly. How schedules work and what they find: docs/executor.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/error.h"
#include "core/non_copyable.h"

namespace deep_ep::simt {

class Core;

// A kernel broke a rule of the execution model (mismatched collective, stack overflow, ...).
class KernelError : public Error {
    using Error::Error;
};
// Nothing can ever change again, and somebody waits.
class DeadlockError : public KernelError {
    using KernelError::KernelError;
};

// When bulk copies are carried out. kLate: only when nothing else can go on.
enum class BulkMode { kEager, kLate, kRandom };

// kVirtual: advances with the schedule, so timeouts are replayed too.
enum class ClockKind { kVirtual, kWall };

// What to do when every fiber only polls and nothing changes.
enum class IdlePolicy {
    kDeadlockError,  // it is proven that nothing will change: report who waits where
    kAdvanceClock,   // move the virtual clock, so that timeouts of kernels expire
    kWait,           // others (processes, threads) may change memory: give them the CPU
};

struct SchedulerOptions {
    uint64_t seed = 0;               // 0: round robin; else random order, with yields before synchronising accesses
    bool background_thread = false;  // false: the thread that makes blocking calls runs the kernels
    BulkMode bulk = BulkMode::kEager;
    int max_resident_blocks = 0;  // per device; 0: no limit
    // With seed 0: the device of this ordinal is as slow as can be. It goes on when no other can, until it has changed something
    // that they may see. -1: none is.
    int slow_device = -1;
    ClockKind clock = ClockKind::kVirtual;
    // What the virtual clock shows kernels at every other look is so much behind: globaltimer may step back.
    uint64_t clock_step_back_ns = 0;
    IdlePolicy idle = IdlePolicy::kDeadlockError;
    size_t stack_bytes = 0;        // per fiber; 0: 16 KiB, 64 KiB under a sanitizer
    bool check_call_sites = true;  // lanes must call a collective from the same line

    // For processes that share memory with others: a worker thread, wall clock, waiting politely.
    static SchedulerOptions background();
};

class Scheduler : NonCopyable {
public:
    explicit Scheduler(const SchedulerOptions& options = {});
    ~Scheduler();

    const SchedulerOptions& options() const;

    // Runs until no stream has work. Throws what went wrong meanwhile.
    void run_until_idle();

    // Runs host code of several ranks, each on a fiber of its own, so that a blocking device call of one lets the
    // others go on: multi-rank tests with exact replay. Returns when all are done; throws the first failure.
    // Not with a background thread.
    void run_hosts(const std::vector<std::function<void()>>& hosts);

    // Names every decision taken so far: equal for equal programs, options and seeds.
    uint64_t trace_hash() const;

    const std::shared_ptr<Core>& core() const { return core_; }

private:
    std::shared_ptr<Core> core_;
};

}  // namespace deep_ep::simt
