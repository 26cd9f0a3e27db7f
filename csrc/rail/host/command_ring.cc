#include "rail/host/command_ring.h"

#include <atomic>

#include "core/error.h"
#include "core/host_word.h"

namespace deep_ep::rail::host {

namespace {

// Words of their own lines, before the commands.
constexpr size_t kTakenAt = 0, kAsleepAt = 128, kCommandsAt = 256;

template <class T> T* at(void* memory, size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(memory) + offset);
}

}  // namespace

CommandRing::CommandRing(const std::shared_ptr<dev::Device>& device, uint32_t capacity)
    : capacity_(capacity),
      memory_(device, device->allocate_host_mapped(kCommandsAt + capacity * sizeof(CommandSlot))),
      device_words_(device, 2) {
    EP_ENSURE(capacity > 0 && (capacity & (capacity - 1)) == 0, "a ring of ", capacity, " commands");
}

RingView CommandRing::view() const {
    RingView view{};
    view.commands = at<CommandSlot>(memory_.get().device, kCommandsAt);
    view.taken = at<uint64_t>(memory_.get().device, kTakenAt);
    view.is_asleep = at<uint32_t>(memory_.get().device, kAsleepAt);
    view.claimed = device_words_.get();
    view.known_taken = device_words_.get() + 1;
    view.capacity = capacity_;
    return view;
}

const CommandSlot& CommandRing::next_slot() const {
    return at<CommandSlot>(memory_.get().host, kCommandsAt)[num_taken_ & (capacity_ - 1)];
}

bool CommandRing::has_command() const {
    // Pairs with: detail::post in a kernel.
    return load_acquire(next_slot().sequence) == num_taken_ + 1;
}

bool CommandRing::take(Command& command) {
    if (!has_command()) return false;
    command = next_slot().command;
    ++num_taken_;
    return true;
}

void CommandRing::tell_taken() {
    // Pairs with: detail::has_room in a kernel.
    std::atomic_ref<uint64_t>(*at<uint64_t>(memory_.get().host, kTakenAt)).store(num_taken_, std::memory_order_release);
}

void CommandRing::fall_asleep() {
    std::atomic_ref<uint32_t>(*at<uint32_t>(memory_.get().host, kAsleepAt)).exchange(1, std::memory_order_acq_rel);
}

void CommandRing::wake_up() {
    std::atomic_ref<uint32_t>(*at<uint32_t>(memory_.get().host, kAsleepAt)).store(0, std::memory_order_relaxed);
}

}  // namespace deep_ep::rail::host
