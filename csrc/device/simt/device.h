// The CPU as a device: memory, streams, events and kernels run by a Scheduler.
//
// Several devices may share one scheduler (several ranks in one process); a device that runs kernels must outlive
// what they use, which its deferred frees take care of: memory freed while kernels run is released when they end.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "device/runtime.h"
#include "device/simt/quiet_mutex.h"
#include "device/simt/scheduler.h"

namespace deep_ep::simt {

struct DeviceState;

struct DeviceOptions {
    int num_sms = 4;
    int max_shared_bytes = 227 * 1024;
    bool has_bulk_copy = true;
    int useful_block_threads = 128;  // a fiber costs more than it brings once a core has a few hundred of them
};

class SimtDevice : public dev::Device {
public:
    SimtDevice(Scheduler& scheduler, int ordinal, const DeviceOptions& options = {});
    ~SimtDevice() override;

    dev::DeviceKind kind() const override { return dev::DeviceKind::kCpu; }
    int num_sms() const override { return options_.num_sms; }
    int max_shared_bytes() const override { return options_.max_shared_bytes; }
    bool has_bulk_copy() const override { return options_.has_bulk_copy; }
    int useful_block_threads() const override { return options_.useful_block_threads; }
    std::string unique_id() const override;

    void* allocate(size_t bytes) override;
    void free(void* ptr) override;
    dev::HostMapped allocate_host_mapped(size_t bytes) override;
    void free_host_mapped(const dev::HostMapped& memory) override;
    dev::ShareableMemory allocate_shareable(size_t bytes, dev::Placement placement = dev::Placement::kDevice) override;
    void free_shareable(const dev::ShareableMemory& memory) override;
    void* open_shared(const std::string& handle) override;
    void close_shared(void* address) override;
    bool holds(const std::string&) const override { return false; }

    bool enter() override { return false; }
    void leave() noexcept override {}

    dev::Stream create_stream() override;
    void destroy_stream(dev::Stream stream) override;
    void synchronize_stream(dev::Stream stream) override;
    dev::StreamKind stream_kind(dev::Stream) override { return dev::StreamKind::kPlain; }
    std::shared_ptr<const std::atomic<bool>> watch_graph(dev::Stream) override;
    dev::Event create_event() override;
    void destroy_event(dev::Event event) override;
    void record_event(dev::Event event, dev::Stream stream) override;
    void stream_wait_event(dev::Stream stream, dev::Event event) override;
    void synchronize_event(dev::Event event) override;
    bool query_event(dev::Event event) override;

    void memset_async(void* ptr, int value, size_t bytes, dev::Stream stream) override;
    void memcpy_async(void* dst, const void* src, size_t bytes, dev::Stream stream) override;
    void copy_now(void* dst, const void* src, size_t bytes) override;
    bool host_wait(const std::function<bool()>& done, double timeout_s) override;

private:
    void* allocate_named(size_t bytes, const char* what);
    void check_process() const;

    std::shared_ptr<Core> core_;
    const DeviceOptions options_;
    const int process_;  // a forked child has no scheduler thread
    DeviceState* const state_;
    QuietMutex mutex_;
    std::map<void*, size_t> allocations_;
    int num_allocations_ = 0;
};

// A new device on this process's background scheduler, which starts on first use. DEEP_EP_CPU_SMS sets its SMs.
std::shared_ptr<dev::Device> make_cpu_device();

}  // namespace deep_ep::simt
