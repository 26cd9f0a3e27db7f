// The host's end of the ring of commands: memory, and taking commands out. One thread takes.
#pragma once

#include <memory>

#include "device/runtime.h"
#include "rail/host/ring.h"

namespace deep_ep::rail::host {

class CommandRing {
public:
    // `capacity`: a power of two.
    CommandRing(std::shared_ptr<dev::Device> device, uint32_t capacity);
    ~CommandRing();
    CommandRing(const CommandRing&) = delete;
    CommandRing& operator=(const CommandRing&) = delete;

    // With `window` and `event` still to be filled in.
    RingView view() const;

    bool has_command() const;
    // The next command. Its place is free for others after tell_taken().
    bool take(Command& command);
    void tell_taken();

    // The thread says that it is going to sleep, and must then look once more; see prim::wake_host.
    void fall_asleep();
    void wake_up();

    // In a forked child: the memory is the parent's.
    void abandon() { is_abandoned_ = true; }

private:
    const std::shared_ptr<dev::Device> device_;
    const uint32_t capacity_;
    dev::HostMapped memory_;        // words, then commands
    void* device_words_ = nullptr;  // claimed, known_taken
    uint64_t num_taken_ = 0;
    bool is_abandoned_ = false;
};

}  // namespace deep_ep::rail::host
