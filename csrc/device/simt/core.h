// The scheduler's inside: streams, launches, resident blocks, clock, host tasks. Internal to the executor.
//
// One thread at a time drives it (step). What host threads share with that thread (stream queues, errors, deferred
// work) is guarded by mutex_; launches and blocks belong to the driver alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device/launch.h"
#include "device/simt/block.h"
#include "device/simt/quiet_mutex.h"
#include "device/simt/scheduler.h"
#include "device/simt/stacks.h"

namespace deep_ep::simt {

struct DeviceState;
struct StreamState;
class Graph;

struct Launch {
    KernelCode code;
    std::unique_ptr<unsigned char[]> params;
    dev::LaunchConfig config;
    std::string name;
    StreamState* stream = nullptr;
    DeviceState* device = nullptr;
    std::vector<int> order;  // of block indices; empty: ascending
    int num_started = 0;
    int num_finished = 0;
    bool has_failed = false;
    hb::Key begin = hb::make_key();  // what the kernel's threads see; what others see of them
    hb::Key end = hb::make_key();

    ~Launch() {
        hb::drop(begin);
        hb::drop(end);
    }

    std::string describe() const;
};

struct EventState {
    std::atomic<uint64_t> num_recorded{0};   // host side
    std::atomic<uint64_t> num_completed{0};  // stream side
    hb::Key recorded = hb::make_key();

    ~EventState() { hb::drop(recorded); }
};

struct Operation {
    enum class Kind { kLaunch, kCall, kRecord, kWait };
    Kind kind;
    std::unique_ptr<Launch> launch = nullptr;
    std::function<void()> call = nullptr;
    std::shared_ptr<EventState> event = nullptr;
    uint64_t version = 0;
    hb::Key submitted = 0;
};

struct StreamState {
    DeviceState* device = nullptr;
    Graph* graph = nullptr;  // that takes what is launched; null: it runs
    std::deque<Operation> queue;
    bool is_running = false;  // the first operation is a launch under way
    bool is_destroyed = false;
    std::atomic<uint64_t> num_submitted{0};
    std::atomic<uint64_t> num_completed{0};
    void* context = hb::create_context("stream");
    hb::Key done = hb::make_key();
    hb::AgentPool agents;

    ~StreamState() {
        hb::drop(done);
        hb::destroy_context(context);
    }
};

// A range of memory, so that reports can name an address.
struct NamedRange {
    size_t bytes;
    std::string name;
};

struct DeviceState {
    Core* core = nullptr;
    int ordinal = 0;
    bool has_bulk_copy = true;
    int max_shared_bytes = 0;
    int num_resident = 0;
    std::deque<Launch*> starting;  // launches with blocks not yet resident, in order
    int num_pending = 0;           // operations submitted and not finished
    bool is_condemned = false;     // driver side: a kernel failed, end the others
    std::exception_ptr error;
    hb::Key failed = hb::make_key();  // what kernels did before they were ended
    std::vector<std::function<void()>> deferred;
    std::map<const char*, NamedRange> ranges;

    ~DeviceState() { hb::drop(failed); }
};

class HostTask;

class Core {
public:
    explicit Core(const SchedulerOptions& options);
    ~Core();

    // --- host side, any thread -------------------------------------------------------------------------------
    DeviceState* add_device(int ordinal, bool has_bulk_copy, int max_shared_bytes);
    StreamState* add_stream(DeviceState& device);
    void destroy_stream(StreamState* stream);
    void check_launch(const Launch& launch) const;
    void submit(StreamState& stream, Operation operation);
    // Runs `work` now, or when the device has nothing to do any more: memory must outlive the kernels that use it.
    void when_idle(DeviceState& device, std::function<void()> work);
    void name_range(DeviceState& device, const void* begin, size_t bytes, const std::string& name);
    void forget_range(DeviceState& device, const void* begin);
    // Blocks until `done`; false when the timeout (seconds; negative: none) passed first. Throws the device's error.
    bool wait(DeviceState& device, const std::function<bool()>& done, double timeout_s);
    // A host that asks "done yet?" again and again must let the kernels run.
    void poll_from_host();
    void run_until_idle();
    void run_hosts(const std::vector<std::function<void()>>& hosts);
    uint64_t trace_hash() const { return drive_.trace; }
    const SchedulerOptions& options() const { return options_; }
    void start_worker(const std::shared_ptr<Core>& self);
    void stop_worker();

    // --- driver side -----------------------------------------------------------------------------------------
    void fail_launch(Launch& launch, std::exception_ptr error);
    uint64_t read_clock();
    Drive& drive() { return drive_; }

private:
    friend class HostTask;
    friend class DeadlockReport;

    void step();
    void run_pass(bool is_full);
    void run_blocks(bool is_full);
    void turn(Block& block, bool is_full);
    void slow_turn(Block& block);
    void run_turn(Block& block, uint64_t quantum);
    void serve_streams();
    bool serve(StreamState& stream);
    void start_launch(StreamState& stream, Launch& launch);
    void admit_blocks(DeviceState& device);
    void admit_block(Launch& launch);
    void retire_blocks();
    void check_finished(Block& block);
    void finish_operation(StreamState& stream);
    void run_deferred();
    bool has_work() const;
    void drop_operations(DeviceState& device);
    void on_idle();
    bool advance_late_copies();
    void idle_politely();
    void report_deadlock();
    void throw_error(DeviceState& device, uint64_t num_deadlocks_seen);
    uint64_t now_ns() const;
    bool wait_for_worker(DeviceState& device, const std::function<bool()>& done, double timeout_s);
    bool wait_driving(DeviceState& device, const std::function<bool()>& done, double timeout_s);
    void take_the_wheel();
    void worker_main();

    const SchedulerOptions options_;
    Drive drive_;
    std::thread::id driver_;
    hb::Key driver_start_ = hb::make_key();  // fibers use the thread-local variables of the driver

    mutable QuietMutex mutex_;
    std::condition_variable_any work_arrived_;
    std::condition_variable_any work_done_;
    std::vector<std::unique_ptr<DeviceState>> devices_;
    std::vector<std::unique_ptr<StreamState>> streams_;
    uint64_t num_pending_ = 0;  // operations submitted and not finished
    bool is_stopping_ = false;
    bool has_worker_ = false;

    std::vector<std::unique_ptr<Block>> blocks_;  // resident
    std::map<int, std::vector<std::unique_ptr<Block>>> spare_blocks_;
    StackPool stacks_;
    std::vector<HostTask*> tasks_;

    uint64_t num_passes_ = 0;
    uint64_t num_blocks_started_ = 0;
    int num_idle_passes_ = 0;
    uint64_t idle_state_ = 0;  // after the last of them
    int num_idle_rounds_ = 0;
    uint64_t idle_advance_ns_ = 0;
    uint64_t virtual_now_ns_ = 1'000'000'000;
    uint64_t num_deadlocks_ = 0;
    std::exception_ptr deadlock_;
};

}  // namespace deep_ep::simt
