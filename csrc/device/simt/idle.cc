// What the scheduler does when every fiber only polls, and the report of a deadlock.
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <map>

#include "device/simt/core.h"
#include "device/simt/host_task.h"

namespace deep_ep::simt {

void Core::on_idle() {
    if (advance_late_copies()) return;
    const bool is_virtual = options_.clock == ClockKind::kVirtual;
    if (options_.idle == IdlePolicy::kWait) {
        if (is_virtual) virtual_now_ns_ += 1'000'000;
        return idle_politely();
    }
    if (drive_.has_sleeper && !is_virtual) return idle_politely();
    if (drive_.has_sleeper || options_.idle == IdlePolicy::kAdvanceClock) {
        // Further and further, so that a long timeout costs few passes; without any timeout it is a deadlock as well.
        constexpr uint64_t kFirstAdvanceNs = 10'000;
        constexpr uint64_t kLargestAdvanceNs = 1'000'000'000;
        constexpr int kMaxRounds = 100'000;  // about a day
        idle_advance_ns_ = std::clamp(idle_advance_ns_ * 2, kFirstAdvanceNs, kLargestAdvanceNs);
        virtual_now_ns_ += idle_advance_ns_;
        if (++num_idle_rounds_ < kMaxRounds) return;
    }
    report_deadlock();
}

bool Core::advance_late_copies() {
    bool has_advanced = false;
    for (auto& block : blocks_) {
        if (block->bulk().is_empty()) continue;
        try {
            has_advanced = block->bulk().advance_one_late() || has_advanced;
        } catch (...) {
            fail_launch(block->launch(), std::current_exception());
            has_advanced = true;
        }
    }
    return has_advanced;
}

// Peers run on the same cores: let them, then sleep, at first hardly, later up to 100 us.
void Core::idle_politely() {
    constexpr int kNumYields = 20;
    if (++num_idle_rounds_ <= kNumYields) {
        sched_yield();
        return;
    }
    const int doublings = std::min(num_idle_rounds_ - kNumYields, 7);
    const auto nap = std::chrono::microseconds(std::min(1 << doublings, 100));
    std::unique_lock lock(mutex_);
    if (!is_stopping_) work_arrived_.wait_for(lock, nap);
}

// Composes "who waits where, for what, and what it saw".
class DeadlockReport {
public:
    explicit DeadlockReport(const Core& core) : core_(core) {}

    std::string text() {
        out_ << "deadlock: nothing can change any more. Who waits:";
        for (const auto& block : core_.blocks_) add_block(*block);
        for (const auto& stream : core_.streams_) add_stream(*stream);
        for (const HostTask* task : core_.tasks_) {
            if (!task->is_done()) add_line(concat("host ", task->index(), ": blocking call"));
        }
        if (num_lines_ == 0) add_line("the host, for a condition, while no kernel runs");
        if (num_lines_ > kMaxLines) out_ << "\n  and " << num_lines_ - kMaxLines << " more";
        return out_.str();
    }

private:
    static constexpr int kMaxLines = 40;

    void add_line(const std::string& line) {
        if (++num_lines_ <= kMaxLines) out_ << "\n  " << line;
    }

    void add_block(const Block& block) {
        for (int first = 0; first < block.num_threads(); first += 32) {
            std::map<std::string, uint32_t> lanes_by_wait;
            for (int lane = 0; lane < 32; ++lane) {
                const Fiber& fiber = block.fibers()[static_cast<size_t>(first + lane)];
                if (fiber.state != FiberState::kExited) lanes_by_wait[describe(block, fiber)] |= 1u << lane;
            }
            for (const auto& [wait, lanes] : lanes_by_wait) {
                add_line(concat(block.launch().describe(), " block ", block.block_idx(), " warp ", first / 32,
                                " lanes ", hex(lanes), ": ", wait));
            }
        }
    }

    void add_stream(const StreamState& stream) {
        if (stream.queue.empty()) return;
        const Operation& first = stream.queue.front();
        const int ordinal = stream.device->ordinal;
        if (first.kind == Operation::Kind::kWait) add_line(concat("device ", ordinal, " stream: waits for an event"));
        if (first.kind == Operation::Kind::kLaunch && first.launch->num_started < first.launch->config.num_blocks) {
            add_line(concat(first.launch->describe(), ": ", first.launch->config.num_blocks - first.launch->num_started,
                            " of ", first.launch->config.num_blocks, " blocks are not resident (max_resident_blocks = ",
                            core_.options_.max_resident_blocks, ")"));
        }
    }

    std::string describe(const Block& block, const Fiber& fiber) const {
        switch (fiber.state) {
            case FiberState::kReady: return "ready";
            case FiberState::kPolling: return describe_poll(fiber);
            case FiberState::kCollective: {
                return concat(name_of(fiber.op), "(", hex(fiber.mask), ") at ", fiber.file, ":", fiber.line,
                              ", missing lanes ", hex(fiber.mask & ~lanes_arrived(block, fiber)));
            }
            case FiberState::kBarrier: {
                const NamedBarrier& barrier = block.barrier(fiber.barrier_id);
                return concat("barrier ", fiber.barrier_id, ", ", barrier.arrived, " of ", barrier.expected,
                              " threads are there, at ", fiber.file, ":", fiber.line);
            }
            case FiberState::kExited: break;
        }
        return "returned";
    }

    static uint32_t lanes_arrived(const Block& block, const Fiber& fiber) {
        const Warp& warp = block.warp(fiber.warp());
        for (int i = 0; i < warp.num_open; ++i) {
            if (warp.open[i].mask == fiber.mask) return warp.open[i].arrived;
        }
        return 0;
    }

    std::string describe_poll(const Fiber& fiber) const {
        std::string text = "polls";
        if (fiber.wait_note != nullptr) text = concat("waits for ", fiber.wait_note, " ", fiber.wait_detail);
        if (fiber.poll.address == nullptr) return text;
        return concat(text, " ", name_address(fiber), ", sees ", fiber.poll.value);
    }

    std::string name_address(const Fiber& fiber) const {
        const auto* address = static_cast<const char*>(fiber.poll.address);
        if (fiber.block->shared().contains(address, 1)) {
            return concat("shared memory + ", address - static_cast<const char*>(fiber.block->shared().static_part()));
        }
        for (const auto& device : core_.devices_) {
            auto after = device->ranges.upper_bound(address);
            if (after == device->ranges.begin()) continue;
            const auto& [begin, range] = *std::prev(after);
            if (address < begin + range.bytes) {
                return concat("device ", device->ordinal, " ", range.name, " + ", address - begin);
            }
        }
        return concat("address ", static_cast<const void*>(address));
    }

    const Core& core_;
    std::ostringstream out_;
    int num_lines_ = 0;
};

void Core::report_deadlock() {
    std::lock_guard lock(mutex_);
    deadlock_ = std::make_exception_ptr(DeadlockError(DeadlockReport(*this).text()));
    ++num_deadlocks_;
    num_idle_passes_ = num_idle_rounds_ = 0;
    for (auto& device : devices_) {
        if (device->num_pending == 0) continue;
        device->is_condemned = true;
        if (device->error == nullptr) device->error = deadlock_;
    }
    drive_.note_progress();
}

}  // namespace deep_ep::simt
