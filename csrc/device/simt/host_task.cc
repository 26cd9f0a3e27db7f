#include "device/simt/host_task.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include "device/simt/core.h"

namespace deep_ep::simt {
namespace {

constexpr size_t kStackBytes = 4u << 20;  // touched lazily
thread_local HostTask* current_task = nullptr;

// The C++ runtime keeps the exceptions being handled per thread; each task needs its own.
struct ExceptionState {
    void* caught;
    unsigned uncaught;
};

}  // namespace

HostTask::HostTask(Core& core, int index, const std::function<void()>& body, hb::Key begin, hb::Key end)
    : core_(core), index_(index), body_(body), begin_(begin), end_(end) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) throw Error("cannot map a stack for a host task");
    stack_ = static_cast<char*>(stack);
    mprotect(stack_, 4096, PROT_NONE);
    context_.create(stack_ + 4096, stack_ + kStackBytes, main);
    context_.tsan_fiber = hb::create_context(concat("host ", index_).c_str());
}

HostTask::~HostTask() {
    hb::destroy_context(context_.tsan_fiber);
    munmap(stack_, kStackBytes);
}

HostTask* HostTask::current() { return current_task; }

void HostTask::switch_to(Context& from, Context& to) {
    auto* globals = reinterpret_cast<ExceptionState*>(abi::__cxa_get_globals());
    const ExceptionState saved = *globals;
    *globals = ExceptionState{};
    Context::switch_to(from, to);
    *globals = saved;
}

void HostTask::main() {
    HostTask& self = *current_task;
    hb::acquire(self.begin_);
    try {
        self.body_();
    } catch (...) {
        self.error_ = std::current_exception();
    }
    hb::release(self.end_);
    self.is_done_ = true;
    self.core_.drive_.note_progress();
    switch_to(self.context_, self.core_.drive_.context);
    __builtin_unreachable();
}

void HostTask::resume() {
    current_task = this;
    core_.drive_.note(0x4000000000000000ull + static_cast<uint64_t>(index_));
    switch_to(core_.drive_.context, context_);
    current_task = nullptr;
}

void HostTask::yield() {
    core_.drive_.note_progress();
    switch_to(context_, core_.drive_.context);
}

bool HostTask::wait(DeviceState& device, const std::function<bool()>& done, double timeout_s) {
    if (done()) return true;
    const uint64_t num_deadlocks_seen = core_.num_deadlocks_;
    const uint64_t deadline_ns = timeout_s < 0 ? UINT64_MAX : core_.now_ns() + static_cast<uint64_t>(timeout_s * 1e9);
    for (;;) {
        switch_to(context_, core_.drive_.context);
        const bool is_done = done();
        const bool is_over = core_.now_ns() >= deadline_ns;
        const bool has_failed = device.error != nullptr || core_.num_deadlocks_ != num_deadlocks_seen;
        if (!is_done && !is_over && !has_failed) continue;
        core_.drive_.note_progress();
        if (has_failed) core_.throw_error(device, num_deadlocks_seen);
        return is_done;
    }
}

}  // namespace deep_ep::simt
