// The driver's side of the scheduler: serving streams, giving blocks their turns, retiring them.
#include <algorithm>
#include <numeric>

#include "device/simt/core.h"
#include "device/simt/graph.h"
#include "device/simt/host_task.h"

namespace deep_ep::simt {

std::string Launch::describe() const { return concat("device ", device->ordinal, " kernel \"", name, "\""); }

void launch_kernel(const dev::LaunchConfig& config, dev::Stream handle, const KernelCode& code) {
    EP_ENSURE(handle != nullptr, "kernel ", config.name, ": a CPU device has no default stream");
    EP_ENSURE(config.num_threads > 0 && config.num_threads <= 1024 && config.num_threads % 32 == 0, "kernel ",
              config.name, ": num_threads must be a multiple of 32 up to 1024, got ", config.num_threads);
    EP_ENSURE(config.num_blocks > 0, "kernel ", config.name, ": num_blocks must be positive, got ", config.num_blocks);
    auto& stream = *static_cast<StreamState*>(handle);
    const size_t shared_bytes = code.shared_bytes + static_cast<size_t>(std::max(config.dynamic_shared_bytes, 0));
    EP_ENSURE(config.dynamic_shared_bytes >= 0 && shared_bytes <= static_cast<size_t>(stream.device->max_shared_bytes),
              "kernel ", config.name, ": ", shared_bytes, " bytes of shared memory, the device has ",
              stream.device->max_shared_bytes);

    if (stream.graph != nullptr) return stream.graph->add(config, code);
    hb::Quiet quiet;
    auto launch = std::make_unique<Launch>();
    launch->code = code;
    launch->params = std::make_unique<unsigned char[]>(code.params_bytes);
    std::copy_n(static_cast<const unsigned char*>(code.params), code.params_bytes, launch->params.get());
    launch->code.params = launch->params.get();
    launch->config = config;
    launch->name = config.name;
    launch->config.name = launch->name.c_str();
    launch->stream = &stream;
    launch->device = stream.device;
    stream.device->core->check_launch(*launch);
    stream.device->core->submit(stream, Operation{.kind = Operation::Kind::kLaunch, .launch = std::move(launch)});
}

void Core::check_launch(const Launch& launch) const {
    const int limit = options_.max_resident_blocks;
    if (launch.config.is_cooperative && limit != 0 && launch.config.num_blocks > limit) {
        throw Error(concat(launch.describe(), ": too many blocks in cooperative launch: ", launch.config.num_blocks,
                           ", at most ", limit, " are resident"));
    }
}

void Core::step() {
    const uint64_t progress_before = drive_.progress;
    drive_.has_sleeper = false;
    run_pass(num_idle_passes_ > 0);
    if (drive_.progress != progress_before) {
        num_idle_passes_ = num_idle_rounds_ = 0;
        idle_advance_ns_ = 0;
        return;
    }
    // Idle: two full passes in a row leave every fiber where it was.
    uint64_t state = 0;
    for (const auto& block : blocks_) state += block->state_hash();
    num_idle_passes_ = num_idle_passes_ == 0 || state == idle_state_ ? num_idle_passes_ + 1 : 1;
    idle_state_ = state;
    // With a slow device, whose blocks have a turn from the third on: it stays where it was as well.
    if (num_idle_passes_ >= (options_.slow_device < 0 ? 3 : 4)) on_idle();
}

// A full pass resumes everything that can run at least once; others may leave some out, when seeded.
void Core::run_pass(bool is_full) {
    ++num_passes_;
    virtual_now_ns_ += 1000;
    {
        std::lock_guard lock(mutex_);
        serve_streams();
        for (auto& device : devices_) admit_blocks(*device);
    }
    run_blocks(is_full);
    for (size_t i = 0; i < tasks_.size(); ++i) {
        if (!tasks_[i]->is_done()) tasks_[i]->resume();
    }
    retire_blocks();
}

void Core::run_blocks(bool is_full) {
    if (drive_.is_seeded) {
        for (size_t i = blocks_.size(); i > 1; --i) std::swap(blocks_[i - 1], blocks_[drive_.rng.below(i)]);
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        Block& block = *blocks_[i];
        if (block.launch().device->is_condemned) continue;
        if (block.launch().device->ordinal == options_.slow_device) {
            slow_turn(block);
        } else {
            turn(block, is_full);
        }
    }
}

void Core::turn(Block& block, bool is_full) {
    uint64_t quantum = UINT64_MAX;
    if (drive_.is_seeded && !is_full) {
        if (block.stalled_until > num_passes_ || drive_.rng.below(4) == 0) return;
        Random& rng = drive_.rng;
        const Temper& temper = drive_.temper;
        if (rng.below(temper.stall_odds) == 0) block.stalled_until = num_passes_ + rng.below(temper.stall_passes);
        const uint64_t longest = rng.below(2) == 0 ? temper.short_turn : 4 * static_cast<uint64_t>(block.num_threads());
        quantum = 1 + rng.below(longest);
    }
    run_turn(block, quantum);
}

// Nobody else can go on. Step by step, until something has changed that others may see: then they go on as far as they can.
void Core::slow_turn(Block& block) {
    if (num_idle_passes_ < 2) return;
    constexpr int kMostSteps = 64;  // of each thread: one that polls with a vote can always go on
    for (int step = 0; step < kMostSteps * block.num_threads() && !block.is_finished(); ++step) {
        if (!block.can_go_on() && step >= block.num_threads()) break;  // all have looked
        run_turn(block, 1);
        if (block.take_changes()) return drive_.note_progress();
    }
    run_turn(block, UINT64_MAX);
}

void Core::run_turn(Block& block, uint64_t quantum) {
    block.run_turn(quantum);
    if (options_.bulk == BulkMode::kRandom && !block.launch().has_failed && !block.bulk().is_empty()) {
        try {
            block.bulk().advance_some_at_random();
        } catch (...) {
            fail_launch(block.launch(), std::current_exception());
        }
    }
}

void Core::serve_streams() {
    for (size_t i = 0; i < streams_.size(); ++i) {
        StreamState& stream = *streams_[i];
        while (!stream.is_running && !stream.queue.empty() && serve(stream)) drive_.note_progress();
    }
    std::erase_if(streams_, [](const auto& stream) { return stream->is_destroyed && stream->queue.empty(); });
    run_deferred();
}

// Takes the stream's first operation one step further; false when it has to wait.
bool Core::serve(StreamState& stream) {
    Operation& first = stream.queue.front();
    {
        hb::As as(stream.context);
        hb::acquire(first.submitted);
        switch (first.kind) {
            case Operation::Kind::kLaunch: start_launch(stream, *first.launch); return true;
            case Operation::Kind::kCall: first.call(); break;
            case Operation::Kind::kRecord:
                hb::release_anew(first.event->recorded);
                first.event->num_completed = first.version;
                break;
            case Operation::Kind::kWait:
                if (first.event->num_completed < first.version) return false;
                hb::acquire(first.event->recorded);
                break;
        }
    }
    finish_operation(stream);
    return true;
}

void Core::start_launch(StreamState& stream, Launch& launch) {
    stream.is_running = true;
    hb::acquire(driver_start_);
    hb::release(launch.begin);
    if (drive_.is_seeded) {
        launch.order.resize(static_cast<size_t>(launch.config.num_blocks));
        std::iota(launch.order.begin(), launch.order.end(), 0);
        for (size_t i = launch.order.size(); i > 1; --i)
            std::swap(launch.order[i - 1], launch.order[drive_.rng.below(i)]);
    }
    launch.device->starting.push_back(&launch);
}

void Core::finish_operation(StreamState& stream) {
    const Operation& first = stream.queue.front();
    {
        hb::As as(stream.context);
        if (first.launch != nullptr) hb::acquire(first.launch->end);
        hb::release_anew(stream.done);
    }
    stream.agents.end_kernel();
    hb::drop(first.submitted);
    stream.queue.pop_front();
    stream.is_running = false;
    ++stream.num_completed;
    --stream.device->num_pending;
    --num_pending_;
    work_done_.notify_all();
}

void Core::admit_blocks(DeviceState& device) {
    const int limit = options_.max_resident_blocks;
    while (!device.starting.empty()) {
        Launch& launch = *device.starting.front();
        const int num_needed = launch.config.is_cooperative ? launch.config.num_blocks - launch.num_started : 1;
        if (limit != 0 && device.num_resident + num_needed > limit) return;
        admit_block(launch);
        if (launch.num_started == launch.config.num_blocks) device.starting.pop_front();
    }
}

void Core::admit_block(Launch& launch) {
    const int num_threads = launch.config.num_threads;
    auto& spares = spare_blocks_[num_threads];
    std::unique_ptr<Block> block;
    if (spares.empty()) {
        block = std::make_unique<Block>(*this, num_threads);
    } else {
        block = std::move(spares.back());
        spares.pop_back();
    }
    const auto next = static_cast<size_t>(launch.num_started++);
    block->serial = num_blocks_started_++;
    block->start(launch, launch.order.empty() ? static_cast<int>(next) : launch.order[next],
                 stacks_.take(num_threads, options_.stack_bytes));
    ++launch.device->num_resident;
    drive_.note_progress();
    blocks_.push_back(std::move(block));
}

// Takes finished blocks off the list, and every block of a device whose kernel failed.
void Core::retire_blocks() {
    for (auto& block : blocks_) {
        if (block->is_finished() && !block->launch().has_failed) check_finished(*block);
    }
    bool has_condemned = false;
    for (const auto& device : devices_) has_condemned = has_condemned || device->is_condemned;
    std::lock_guard lock(mutex_);
    for (size_t i = 0; i < blocks_.size();) {
        Block& block = *blocks_[i];
        if (!block.is_finished() && !block.launch().device->is_condemned) {
            ++i;
            continue;
        }
        Launch& launch = block.launch();
        --launch.device->num_resident;
        stacks_.give_back(block.stop());
        spare_blocks_[block.num_threads()].push_back(std::move(blocks_[i]));
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
        if (++launch.num_finished == launch.config.num_blocks && !launch.device->is_condemned) {
            finish_operation(*launch.stream);
        }
    }
    for (auto& device : devices_) {
        if (has_condemned && device->is_condemned) drop_operations(*device);
    }
    run_deferred();
}

void Core::check_finished(Block& block) {
    try {
        block.finish_copies();
        const char* damage = block.shared().find_damage();
        if (damage != nullptr) {
            throw KernelError(concat(block.launch().describe(), " block ", block.block_idx(),
                                     " wrote outside its shared memory, ", damage));
        }
    } catch (...) {
        fail_launch(block.launch(), std::current_exception());
    }
}

void Core::fail_launch(Launch& launch, std::exception_ptr error) {
    launch.has_failed = true;
    launch.device->is_condemned = true;
    std::lock_guard lock(mutex_);
    if (launch.device->error == nullptr) launch.device->error = std::move(error);
}

// Everything queued on the device is gone, as after an error on a GPU; but who waits for its events goes on.
void Core::drop_operations(DeviceState& device) {
    device.is_condemned = false;
    device.starting.clear();
    for (auto& stream : streams_) {
        if (stream->device != &device) continue;
        while (!stream->queue.empty()) {
            const Operation& first = stream->queue.front();
            if (first.kind == Operation::Kind::kRecord) first.event->num_completed = first.version;
            finish_operation(*stream);
        }
    }
    drive_.note_progress();
    run_deferred();
    work_done_.notify_all();
}

void Core::run_deferred() {
    for (auto& device : devices_) {
        if (device->num_pending != 0) continue;
        for (auto& work : std::exchange(device->deferred, {})) work();
    }
}

}  // namespace deep_ep::simt
