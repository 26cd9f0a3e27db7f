#include "device/simt/device.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "core/env.h"
#include "device/simt/core.h"
#include "device/simt/shareable.h"

namespace deep_ep::simt {
namespace {

StreamState& stream_of(dev::Stream stream) {
    EP_ENSURE(stream != nullptr, "a CPU device has no default stream: create one");
    return *static_cast<StreamState*>(stream);
}

using EventHandle = std::shared_ptr<EventState>;

const EventHandle& event_of(dev::Event event) {
    EP_ENSURE(event != nullptr, "the event is null");
    return *static_cast<EventHandle*>(event);
}

constexpr size_t kAlignment = 256;
[[maybe_unused]] constexpr size_t kLargeBytes = 1 << 20;

// Exactly `bytes`, so that AddressSanitizer sees the end. Large blocks come zeroed and untouched from the system.
void* allocate_zeroed(size_t bytes) {
#if !defined(EP_SIMT_ASAN)
    if (bytes >= kLargeBytes) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return memory == MAP_FAILED ? nullptr : memory;
    }
#endif
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes) != 0) return nullptr;
    return std::memset(memory, 0, bytes);
}

void release(void* memory, [[maybe_unused]] size_t bytes) {
#if !defined(EP_SIMT_ASAN)
    if (bytes >= kLargeBytes) {
        munmap(memory, bytes);
        return;
    }
#endif
    std::free(memory);
}

}  // namespace

SimtDevice::SimtDevice(Scheduler& scheduler, int ordinal, const DeviceOptions& options)
    : core_(scheduler.core()),
      options_(options),
      process_(getpid()),
      state_(core_->add_device(ordinal, options.has_bulk_copy, options.max_shared_bytes)) {}

// Kernels may still run (a peer that never came): what they use is released when they end, or never.
SimtDevice::~SimtDevice() {
    hb::Quiet quiet;
    if (process_ != getpid()) return;
    for (const auto& [memory, bytes] : allocations_) {
        core_->when_idle(*state_, [memory = memory, bytes = bytes] { release(memory, bytes); });
    }
    core_.reset();
}

std::string SimtDevice::unique_id() const { return host_identity(); }

void SimtDevice::check_process() const {
    if (process_ != getpid()) throw Error("this CPU device was made before fork(): make one in the child");
}

void* SimtDevice::allocate_named(size_t bytes, const char* what) {
    hb::Quiet quiet;
    if (bytes == 0) bytes = 1;
    void* memory = allocate_zeroed(bytes);
    if (memory == nullptr) throw Error(concat("cannot allocate ", bytes, " bytes of host memory"));
    std::lock_guard lock(mutex_);
    allocations_[memory] = bytes;
    core_->name_range(*state_, memory, bytes, concat(what, " #", num_allocations_++));
    return memory;
}

void* SimtDevice::allocate(size_t bytes) { return allocate_named(bytes, "memory"); }

void SimtDevice::free(void* ptr) {
    hb::Quiet quiet;
    if (ptr == nullptr) return;
    std::lock_guard lock(mutex_);
    const auto found = allocations_.find(ptr);
    EP_ENSURE(found != allocations_.end(), "free: ", ptr, " was not allocated by this device");
    core_->forget_range(*state_, ptr);
    core_->when_idle(*state_, [ptr, bytes = found->second] { release(ptr, bytes); });
    allocations_.erase(found);
}

dev::HostMapped SimtDevice::allocate_host_mapped(size_t bytes) {
    void* memory = allocate_named(bytes, "host-mapped memory");
    return {.host = memory, .device = memory};
}

void SimtDevice::free_host_mapped(const dev::HostMapped& memory) { free(memory.host); }

dev::ShareableMemory SimtDevice::allocate_shareable(size_t bytes, dev::Placement) {
    hb::Quiet quiet;
    check_process();
    dev::ShareableMemory memory;
    memory.address = ShareableHeap::instance().allocate(bytes, memory.handle);
    std::lock_guard lock(mutex_);
    core_->name_range(*state_, memory.address, bytes, concat("shareable memory #", num_allocations_++));
    return memory;
}

void SimtDevice::free_shareable(const dev::ShareableMemory& memory) {
    hb::Quiet quiet;
    if (memory.address == nullptr || process_ != getpid()) return;
    core_->forget_range(*state_, memory.address);
    core_->when_idle(*state_, [address = memory.address] { ShareableHeap::instance().free(address); });
}

void* SimtDevice::open_shared(const std::string& handle) {
    hb::Quiet quiet;
    check_process();
    return ShareableHeap::instance().open(handle);
}

void SimtDevice::close_shared(void* address) {
    hb::Quiet quiet;
    if (address == nullptr || process_ != getpid()) return;
    core_->when_idle(*state_, [address] { ShareableHeap::instance().close(address); });
}

dev::Stream SimtDevice::create_stream() {
    hb::Quiet quiet;
    check_process();
    return core_->add_stream(*state_);
}

void SimtDevice::destroy_stream(dev::Stream stream) {
    hb::Quiet quiet;
    if (stream == nullptr || process_ != getpid()) return;
    core_->destroy_stream(static_cast<StreamState*>(stream));
}

void SimtDevice::synchronize_stream(dev::Stream handle) {
    check_process();
    StreamState& stream = stream_of(handle);
    const uint64_t target = stream.num_submitted;
    core_->wait(
        *state_, [&] { return stream.num_completed >= target; }, -1);
    hb::acquire(stream.done);
}

std::shared_ptr<const std::atomic<bool>> SimtDevice::watch_graph(dev::Stream) {
    throw InternalError("the CPU device captures no graphs");
}

dev::Event SimtDevice::create_event() {
    hb::Quiet quiet;
    return new EventHandle(std::make_shared<EventState>());
}

void SimtDevice::destroy_event(dev::Event event) {
    hb::Quiet quiet;
    delete static_cast<EventHandle*>(event);
}

void SimtDevice::record_event(dev::Event handle, dev::Stream stream) {
    check_process();
    const EventHandle& event = event_of(handle);
    core_->submit(stream_of(stream),
                  Operation{.kind = Operation::Kind::kRecord, .event = event, .version = ++event->num_recorded});
}

void SimtDevice::stream_wait_event(dev::Stream stream, dev::Event handle) {
    check_process();
    const EventHandle& event = event_of(handle);
    core_->submit(stream_of(stream),
                  Operation{.kind = Operation::Kind::kWait, .event = event, .version = event->num_recorded});
}

void SimtDevice::synchronize_event(dev::Event handle) {
    check_process();
    const EventHandle event = event_of(handle);
    const uint64_t target = event->num_recorded;
    core_->wait(
        *state_, [&] { return event->num_completed >= target; }, -1);
    hb::acquire(event->recorded);
}

bool SimtDevice::query_event(dev::Event handle) {
    const EventHandle event = event_of(handle);
    const auto is_done = [&] { return event->num_completed >= event->num_recorded; };
    if (!is_done()) core_->poll_from_host();
    if (!is_done()) return false;
    hb::acquire(event->recorded);
    return true;
}

void SimtDevice::memset_async(void* ptr, int value, size_t bytes, dev::Stream stream) {
    check_process();
    core_->submit(stream_of(stream),
                  Operation{.kind = Operation::Kind::kCall, .call = [=] { std::memset(ptr, value, bytes); }});
}

void SimtDevice::memcpy_async(void* dst, const void* src, size_t bytes, dev::Stream stream) {
    check_process();
    core_->submit(stream_of(stream),
                  Operation{.kind = Operation::Kind::kCall, .call = [=] { std::memmove(dst, src, bytes); }});
}

void SimtDevice::copy_now(void* dst, const void* src, size_t bytes) {
    // Lifecycle words are read while kernels write them: word by word, as a GPU's copy engine would see them. Longer
    // copies are data, and ThreadSanitizer checks that kernels have finished with it.
    constexpr size_t kFewBytes = 1024;
    const bool is_words = (reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | bytes) % 8 == 0;
    if (!is_words || bytes > kFewBytes) {
        std::memmove(dst, src, bytes);
        return;
    }
    auto* to = static_cast<uint64_t*>(dst);
    const auto* from = static_cast<const uint64_t*>(src);
    for (size_t i = 0; i < bytes / 8; ++i) {
        __atomic_store_n(&to[i], __atomic_load_n(&from[i], __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    }
}

bool SimtDevice::host_wait(const std::function<bool()>& done, double timeout_s) {
    check_process();
    return core_->wait(*state_, done, std::max(timeout_s, 0.0));
}

namespace {

// Never destroyed: devices in static objects may outlive us, and kernels of a peer that never came may still run. At
// exit the worker is asked to stop, for a bounded time.
struct ProcessScheduler {
    std::mutex mutex;
    Scheduler* scheduler = nullptr;
    int num_devices = 0;
};

ProcessScheduler& process_scheduler() {
    static auto* const instance = new ProcessScheduler;
    return *instance;
}

void stop_at_exit() {
    if (Scheduler* scheduler = process_scheduler().scheduler) scheduler->core()->stop_worker();
}

// The worker thread does not exist in a forked child, which starts afresh.
void forget_in_child() { new (&process_scheduler()) ProcessScheduler; }

}  // namespace

std::shared_ptr<dev::Device> make_cpu_device() {
    static const int hooks [[maybe_unused]] = [] {
        process_scheduler();
        pthread_atfork(nullptr, nullptr, forget_in_child);
        return std::atexit(stop_at_exit);
    }();
    ProcessScheduler& process = process_scheduler();
    std::lock_guard lock(process.mutex);
    if (process.scheduler == nullptr) process.scheduler = new Scheduler(SchedulerOptions::background());
    DeviceOptions options;
    if (environment().cpu_sms != 0) options.num_sms = environment().cpu_sms;
    return std::make_shared<SimtDevice>(*process.scheduler, process.num_devices++, options);
}

}  // namespace deep_ep::simt
