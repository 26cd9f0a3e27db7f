// Host code of one rank on a fiber of its own (Scheduler::run_hosts). Internal to the executor.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>

#include "core/non_copyable.h"
#include "device/simt/context.h"
#include "device/simt/happens_before.h"

namespace deep_ep::simt {

class Core;
struct DeviceState;

class HostTask : NonCopyable {
public:
    HostTask(Core& core, int index, const std::function<void()>& body, hb::Key begin, hb::Key end);
    ~HostTask();

    static HostTask* current();

    // Driver side: runs the task until it waits or ends. A waiting task looks at its condition itself.
    void resume();
    bool is_done() const { return is_done_; }
    int index() const { return index_; }
    std::exception_ptr error() const { return error_; }

    // Task side: see Core::wait.
    void yield();
    bool wait(DeviceState& device, const std::function<bool()>& done, double timeout_s);

private:
    static void main();
    static void switch_to(Context& from, Context& to);

    Core& core_;
    int index_;
    const std::function<void()>& body_;
    Context context_;
    char* stack_ = nullptr;
    hb::Key begin_;
    hb::Key end_;
    std::exception_ptr error_;
    bool is_done_ = false;
};

}  // namespace deep_ep::simt
