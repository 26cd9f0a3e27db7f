// The host's side of the scheduler: submitting work, waiting for it, errors.
#include "device/simt/core.h"

#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>

#include "core/interruption.h"
#include "device/simt/host_task.h"

namespace deep_ep::simt {

std::string hex(uint64_t value) {
    std::ostringstream out;
    out << "0x" << std::hex << value;
    return out.str();
}

namespace {

SchedulerOptions completed(SchedulerOptions options) {
#if defined(EP_SIMT_ASAN) || defined(EP_SIMT_TSAN)
    constexpr size_t kDefaultStackBytes = 64 << 10;
#else
    constexpr size_t kDefaultStackBytes = 16 << 10;
#endif
    if (options.stack_bytes == 0) options.stack_bytes = kDefaultStackBytes;
    EP_ENSURE(options.idle != IdlePolicy::kAdvanceClock || options.clock == ClockKind::kVirtual,
              "IdlePolicy::kAdvanceClock needs ClockKind::kVirtual");
    EP_ENSURE(options.slow_device < 0 || options.seed == 0,
              "a slow device needs blocks that have their turns in order");
    return options;
}

uint64_t wall_ns() {
    return static_cast<uint64_t>(std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

}  // namespace

Core::Core(const SchedulerOptions& options) : options_(completed(options)), drive_(options.seed) {
    drive_.check_call_sites = options.check_call_sites;
}
Core::~Core() { hb::drop(driver_start_); }

DeviceState* Core::add_device(int ordinal, bool has_bulk_copy, int max_shared_bytes) {
    std::lock_guard lock(mutex_);
    auto device = std::make_unique<DeviceState>();
    device->core = this;
    device->ordinal = ordinal;
    device->has_bulk_copy = has_bulk_copy;
    device->max_shared_bytes = max_shared_bytes;
    devices_.push_back(std::move(device));
    return devices_.back().get();
}

StreamState* Core::add_stream(DeviceState& device) {
    std::lock_guard lock(mutex_);
    streams_.push_back(std::make_unique<StreamState>());
    streams_.back()->device = &device;
    return streams_.back().get();
}

void Core::destroy_stream(StreamState* stream) {
    std::lock_guard lock(mutex_);
    stream->is_destroyed = true;
    if (!stream->queue.empty()) return;  // serve_streams removes it when it has run dry
    std::erase_if(streams_, [&](const auto& owned) { return owned.get() == stream; });
}

void Core::submit(StreamState& stream, Operation operation) {
    EP_ENSURE(stream.graph == nullptr, "a graph of the executor takes nothing but kernels");
    operation.submitted = hb::make_key();
    hb::release(operation.submitted);
    hb::Quiet quiet;
    {
        std::lock_guard lock(mutex_);
        if (stream.is_destroyed) throw InvalidArgument("the stream has been destroyed");
        stream.queue.push_back(std::move(operation));
        ++stream.num_submitted;
        ++stream.device->num_pending;
        ++num_pending_;
    }
    if (has_worker_) work_arrived_.notify_one();
}

void Core::when_idle(DeviceState& device, std::function<void()> work) {
    std::unique_lock lock(mutex_);
    if (device.num_pending != 0) {
        device.deferred.push_back(std::move(work));
        return;
    }
    lock.unlock();
    work();
}

void Core::name_range(DeviceState& device, const void* begin, size_t bytes, const std::string& name) {
    std::lock_guard lock(mutex_);
    device.ranges[static_cast<const char*>(begin)] = NamedRange{bytes, name};
}

void Core::forget_range(DeviceState& device, const void* begin) {
    std::lock_guard lock(mutex_);
    device.ranges.erase(static_cast<const char*>(begin));
}

bool Core::has_work() const {
    std::lock_guard lock(mutex_);
    return num_pending_ != 0;
}

uint64_t Core::now_ns() const { return options_.clock == ClockKind::kVirtual ? virtual_now_ns_ : wall_ns(); }

uint64_t Core::read_clock() {
    if (options_.clock == ClockKind::kWall) return wall_ns();
    const uint64_t now_ns = ++virtual_now_ns_;
    return now_ns % 2 == 0 ? now_ns - options_.clock_step_back_ns : now_ns;
}

// Throws what happened to this device, or a deadlock that happened since `num_deadlocks_seen`. Reported errors are
// forgotten: the device can be used again.
void Core::throw_error(DeviceState& device, uint64_t num_deadlocks_seen) {
    hb::Quiet quiet;
    std::unique_lock lock(mutex_);
    std::exception_ptr error = std::exchange(device.error, nullptr);
    if (error != nullptr) hb::acquire(device.failed);
    if (error == nullptr && num_deadlocks_ != num_deadlocks_seen) error = deadlock_;
    lock.unlock();
    if (error != nullptr) std::rethrow_exception(error);
}

bool Core::wait(DeviceState& device, const std::function<bool()>& done, double timeout_s) {
    EP_ENSURE(current_fiber == nullptr, "a kernel cannot make blocking host calls");
    if (HostTask* task = HostTask::current()) return task->wait(device, done, timeout_s);
    return has_worker_ ? wait_for_worker(device, done, timeout_s) : wait_driving(device, done, timeout_s);
}

bool Core::wait_driving(DeviceState& device, const std::function<bool()>& done, double timeout_s) {
    take_the_wheel();
    const uint64_t num_deadlocks_seen = num_deadlocks_;
    const uint64_t deadline_ns = timeout_s < 0 ? UINT64_MAX : now_ns() + static_cast<uint64_t>(timeout_s * 1e9);
    for (;;) {
        throw_error(device, num_deadlocks_seen);
        if (done()) return true;
        if (now_ns() >= deadline_ns) return false;
        hb::Quiet quiet;
        step();
    }
}

bool Core::wait_for_worker(DeviceState& device, const std::function<bool()>& done, double timeout_s) {
    std::unique_lock lock(mutex_);
    if (timeout_s < 0) {
        const auto is_over = [&] { return done() || device.error != nullptr || is_stopping_; };
        InterruptionPoll interruption;
        while (!work_done_.wait_for(lock, InterruptionPoll::kInterval, is_over)) {
            lock.unlock();
            interruption.poll();
            lock.lock();
        }
        lock.unlock();
        throw_error(device, num_deadlocks_);
        if (!done()) throw Error("the executor was shut down while the host waited for it");
        return true;
    }
    // The condition is the caller's: look at it without the lock, often at first, then a little less.
    lock.unlock();
    const uint64_t deadline_ns = wall_ns() + static_cast<uint64_t>(std::min(timeout_s, 1e9) * 1e9);
    for (int attempt = 0;; ++attempt) {
        if (done()) return true;
        lock.lock();
        const bool has_failed = device.error != nullptr;
        if (!has_failed && attempt >= 64) {
            work_done_.wait_for(lock, std::chrono::microseconds(std::min(attempt - 63, 50)));
        }
        lock.unlock();
        if (has_failed) throw_error(device, num_deadlocks_);
        if (attempt < 64) sched_yield();
        if (wall_ns() >= deadline_ns) return done();
    }
}

void Core::poll_from_host() {
    if (has_worker_ || current_fiber != nullptr) return;
    if (HostTask* task = HostTask::current()) return task->yield();
    take_the_wheel();
    hb::Quiet quiet;
    if (has_work()) step();
}

void Core::run_until_idle() {
    EP_ENSURE(!has_worker_, "run_until_idle is for schedulers without a background thread");
    EP_ENSURE(current_fiber == nullptr && HostTask::current() == nullptr, "run_until_idle inside the executor");
    take_the_wheel();
    hb::Quiet quiet;
    while (has_work()) step();
    for (const auto& stream : streams_) hb::acquire(stream->done);
    std::exception_ptr first;
    {
        std::lock_guard lock(mutex_);
        for (auto& device : devices_) {
            std::exception_ptr error = std::exchange(device->error, nullptr);
            hb::acquire(device->failed);
            if (first == nullptr) first = error;
        }
    }
    if (first != nullptr) std::rethrow_exception(first);
}

void Core::run_hosts(const std::vector<std::function<void()>>& hosts) {
    EP_ENSURE(!has_worker_, "run_hosts is for schedulers without a background thread");
    EP_ENSURE(current_fiber == nullptr && tasks_.empty(), "run_hosts inside the executor");
    take_the_wheel();
    const hb::Key begin = hb::make_key(), end = hb::make_key();
    hb::release(begin);
    hb::Quiet quiet;
    std::vector<std::unique_ptr<HostTask>> tasks;
    for (size_t i = 0; i < hosts.size(); ++i) {
        tasks.push_back(std::make_unique<HostTask>(*this, static_cast<int>(i), hosts[i], begin, end));
        tasks_.push_back(tasks.back().get());
    }
    for (;;) {
        std::erase_if(tasks_, [](const HostTask* task) { return task->is_done(); });
        if (tasks_.empty()) break;
        step();
    }
    hb::acquire(end);
    hb::drop(begin);
    hb::drop(end);
    for (const auto& task : tasks) {
        if (task->error() != nullptr) std::rethrow_exception(task->error());
    }
}

// Fibers live on the thread that started them.
void Core::take_the_wheel() {
    if (driver_ == std::this_thread::get_id()) return;
    EP_ENSURE(blocks_.empty(), "another thread runs this scheduler's kernels; use a background thread");
    driver_ = std::this_thread::get_id();
    drive_.context = Context{};
    drive_.context.tsan_fiber = hb::current_context();
    hb::release_anew(driver_start_);
}

void Core::start_worker(const std::shared_ptr<Core>& self) {
    has_worker_ = true;
    std::thread([self] { self->worker_main(); }).detach();
}

void Core::worker_main() {
    hb::Quiet quiet;
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);  // short sleeps are meant to be short
    prctl(PR_SET_NAME, "simt", 0, 0, 0);
    take_the_wheel();
    for (;;) {
        {
            std::unique_lock lock(mutex_);
            work_arrived_.wait(lock, [&] { return is_stopping_ || num_pending_ != 0; });
            if (is_stopping_) break;
        }
        step();
    }
    std::lock_guard lock(mutex_);
    has_worker_ = false;
    work_done_.notify_all();
}

// Bounded: a kernel that never pauses cannot be stopped and is left behind.
void Core::stop_worker() {
    std::unique_lock lock(mutex_);
    is_stopping_ = true;
    work_arrived_.notify_all();
    work_done_.notify_all();
    work_done_.wait_for(lock, std::chrono::seconds(2), [&] { return !has_worker_; });
}

}  // namespace deep_ep::simt
