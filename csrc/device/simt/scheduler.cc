#include "device/simt/scheduler.h"

#include "device/simt/core.h"

namespace deep_ep::simt {

SchedulerOptions SchedulerOptions::background() {
    SchedulerOptions options;
    options.background_thread = true;
    options.clock = ClockKind::kWall;
    options.idle = IdlePolicy::kWait;
    return options;
}

Scheduler::Scheduler(const SchedulerOptions& options) : core_(std::make_shared<Core>(options)) {
    if (options.background_thread) core_->start_worker(core_);
}

Scheduler::~Scheduler() {
    if (core_->options().background_thread) core_->stop_worker();
    hb::Quiet quiet;
    core_.reset();
}

const SchedulerOptions& Scheduler::options() const { return core_->options(); }

void Scheduler::run_until_idle() { core_->run_until_idle(); }

void Scheduler::run_hosts(const std::vector<std::function<void()>>& hosts) { core_->run_hosts(hosts); }

uint64_t Scheduler::trace_hash() const { return core_->trace_hash(); }

}  // namespace deep_ep::simt
