#include "rail/host/command_ring.h"

#include <atomic>

#include "core/error.h"

namespace deep_ep::rail::host {

namespace {

// Words of their own lines, before the commands.
constexpr size_t kTakenAt = 0, kAsleepAt = 128, kCommandsAt = 256;

template <class T> T* at(void* memory, size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(memory) + offset);
}

}  // namespace

CommandRing::CommandRing(std::shared_ptr<dev::Device> device, uint32_t capacity)
    : device_(std::move(device)), capacity_(capacity) {
    EP_ENSURE(capacity > 0 && (capacity & (capacity - 1)) == 0, "a ring of ", capacity, " commands");
    memory_ = device_->allocate_host_mapped(kCommandsAt + capacity * sizeof(Command));
    try {
        device_words_ = device_->allocate(2 * sizeof(uint64_t));
    } catch (...) {
        device_->free_host_mapped(memory_);
        throw;
    }
}

CommandRing::~CommandRing() {
    if (is_abandoned_) return;
    try {
        device_->free(device_words_);
        device_->free_host_mapped(memory_);
    } catch (const Error&) {
        // The device is out of order, and its memory gone.
    }
}

RingView CommandRing::view() const {
    RingView view{};
    view.commands = at<Command>(memory_.device, kCommandsAt);
    view.taken = at<uint64_t>(memory_.device, kTakenAt);
    view.is_asleep = at<uint32_t>(memory_.device, kAsleepAt);
    view.claimed = at<uint64_t>(device_words_, 0);
    view.known_taken = at<uint64_t>(device_words_, sizeof(uint64_t));
    view.capacity = capacity_;
    return view;
}

bool CommandRing::has_command() const {
    Command& next = at<Command>(memory_.host, kCommandsAt)[num_taken_ & (capacity_ - 1)];
    // Pairs with: detail::post in a kernel.
    return std::atomic_ref<uint64_t>(next.sequence).load(std::memory_order_acquire) == num_taken_ + 1;
}

bool CommandRing::take(Command& command) {
    if (!has_command()) return false;
    const Command& next = at<Command>(memory_.host, kCommandsAt)[num_taken_ & (capacity_ - 1)];
    command.dst = next.dst;
    command.src = next.src;
    command.flag = next.flag;
    command.value = next.value;
    command.bytes = next.bytes;
    command.peer = next.peer;
    command.kind = next.kind;
    ++num_taken_;
    return true;
}

void CommandRing::tell_taken() {
    // Pairs with: detail::has_room in a kernel.
    std::atomic_ref<uint64_t>(*at<uint64_t>(memory_.host, kTakenAt)).store(num_taken_, std::memory_order_release);
}

void CommandRing::fall_asleep() {
    std::atomic_ref<uint32_t>(*at<uint32_t>(memory_.host, kAsleepAt)).exchange(1, std::memory_order_acq_rel);
}

void CommandRing::wake_up() {
    std::atomic_ref<uint32_t>(*at<uint32_t>(memory_.host, kAsleepAt)).store(0, std::memory_order_relaxed);
}

}  // namespace deep_ep::rail::host
