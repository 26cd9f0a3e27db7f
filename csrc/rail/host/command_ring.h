// The host's end of the ring of commands: memory, and taking commands out. One thread takes.
#pragma once

#include <memory>

#include "device/owned.h"
#include "rail/host/ring.h"

namespace deep_ep::rail::host {

using OwnedHostMapped = dev::Owned<dev::HostMapped, &dev::Device::free_host_mapped>;

class CommandRing {
public:
    // `capacity`: a power of two.
    CommandRing(const std::shared_ptr<dev::Device>& device, uint32_t capacity);

    // With `window` and `event` still to be filled in.
    RingView view() const;

    bool has_command() const;
    // The next command. Its place is free for others after tell_taken().
    bool take(Command& command);
    void tell_taken();

    // The thread says that it is going to sleep, and must then look once more; see prim::wake_host.
    void fall_asleep();
    void wake_up();

private:
    const CommandSlot& next_slot() const;

    uint32_t capacity_;
    OwnedHostMapped memory_;                   // words, then commands
    dev::DeviceArray<uint64_t> device_words_;  // claimed, known_taken
    uint64_t num_taken_ = 0;
};

}  // namespace deep_ep::rail::host
