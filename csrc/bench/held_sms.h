// SMs that somebody else has: what tests of co-residency run beside the operations.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "core/non_copyable.h"
#include "device/owned.h"

namespace deep_ep::bench {

// One launch at a time, on a stream of its own or a given one. The destructor releases, and waits for its own stream.
class HeldSms : NonCopyable {
public:
    explicit HeldSms(std::shared_ptr<dev::Device> device);
    ~HeldSms();

    // Launches and returns: blocks that take `num_sms` SMs, and keep them until release() or for timeout_s. Null: a
    // stream of its own.
    void hold(int num_sms, double timeout_s, dev::Stream stream);
    // Blocks of the last hold() that have begun.
    int num_held() const;
    void release();
    int num_sms() const { return device_->num_sms(); }
    // Waits for the stream of its own.
    void synchronize() { device_->synchronize_stream(stream_.get()); }

private:
    struct Words {
        std::atomic<uint32_t> num_resident, is_released;
    };
    Words& words() const { return *static_cast<Words*>(memory_.get().host); }

    std::shared_ptr<dev::Device> device_;
    dev::Owned<dev::HostMapped, &dev::Device::free_host_mapped> memory_;
    dev::OwnedStream stream_;
    uint32_t num_before_ = 0;  // blocks of earlier launches
};

}  // namespace deep_ep::bench
