// What the host side may ask of a device: memory, streams, events. One implementation per device kind.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/non_copyable.h"
#include "device/compiler.h"

namespace deep_ep::dev {

enum class DeviceKind { kCpu, kCuda };

// What a handle of a stream stands for. kCaptured: work goes into a graph. kAmbiguous: the handle means another stream
// in another thread, or one of another device than this.
enum class StreamKind { kPlain, kCaptured, kAmbiguous };

// Host memory that kernels can read and write while the host does: `host` and `device` name the same bytes.
struct HostMapped {
    void* host = nullptr;
    void* device = nullptr;
};

// Where memory that is shared lies: with its device, or in host memory that every GPU of the machine reaches, also one that
// does not reach this. On the CPU that is the same.
enum class Placement { kDevice, kHost };

// Memory that other processes can map. `handle` is what they need: plain bytes, to be sent through any channel.
struct ShareableMemory {
    void* address = nullptr;
    std::string handle;
};

class Device : NonCopyable {
public:
    virtual ~Device() = default;

    virtual DeviceKind kind() const = 0;
    virtual int num_sms() const = 0;
    virtual int max_shared_bytes() const = 0;  // dynamic, per block
    virtual bool has_bulk_copy() const = 0;
    virtual int useful_block_threads() const = 0;  // a block with more of them is not faster
    // Identifies the physical device on this host (a GPU's UUID, the CPU's host identity): two ranks may share one.
    virtual std::string unique_id() const = 0;

    // Device-local memory, zero-filled; 256-byte aligned.
    virtual void* allocate(size_t bytes) = 0;
    virtual void free(void* ptr) = 0;

    virtual HostMapped allocate_host_mapped(size_t bytes) = 0;  // zero-filled
    virtual void free_host_mapped(const HostMapped& memory) = 0;

    // Zero-filled. Peers open the handle (same process included) and close what they opened before the owner frees it.
    virtual ShareableMemory allocate_shareable(size_t bytes, Placement placement = Placement::kDevice) = 0;
    virtual void free_shareable(const ShareableMemory& memory) = 0;
    virtual void* open_shared(const std::string& handle) = 0;
    virtual void close_shared(void* address) = 0;
    // Whether a peer that gave this handle runs on this device too. None does on the CPU: nobody has to share it.
    virtual bool holds(const std::string& handle) const = 0;

    // Makes this device current in the calling thread: launches go to the current one. True: another one was, and leave() follows.
    virtual bool enter() = 0;
    virtual void leave() noexcept = 0;

    virtual Stream create_stream() = 0;
    virtual void destroy_stream(Stream stream) = 0;
    virtual void synchronize_stream(Stream stream) = 0;
    virtual StreamKind stream_kind(Stream stream) = 0;

    // `stream` is being captured. What is returned becomes true when that graph, with everything made of it, is gone.
    virtual std::shared_ptr<const std::atomic<bool>> watch_graph(Stream stream) = 0;

    virtual Event create_event() = 0;
    virtual void destroy_event(Event event) = 0;
    virtual void record_event(Event event, Stream stream) = 0;
    virtual void stream_wait_event(Stream stream, Event event) = 0;
    virtual void synchronize_event(Event event) = 0;
    virtual bool query_event(Event event) = 0;

    virtual void memset_async(void* ptr, int value, size_t bytes, Stream stream) = 0;
    virtual void memcpy_async(void* dst, const void* src, size_t bytes, Stream stream) = 0;

    // Blocking, off every stream; host or device pointers. For lifecycle words, not for data.
    virtual void copy_now(void* dst, const void* src, size_t bytes) = 0;

    // The host waits until `done()`: spins kindly on a GPU, drives or yields to the executor on the CPU. Returns
    // false when `timeout_s` passed first.
    virtual bool host_wait(const std::function<bool()>& done, double timeout_s) = 0;
};

// The device is current in this scope.
class CurrentDevice : NonCopyable {
public:
    explicit CurrentDevice(Device& device) : device_(device), has_entered_(device.enter()) {}
    ~CurrentDevice() {
        if (has_entered_) device_.leave();
    }

private:
    Device& device_;
    const bool has_entered_;
};

}  // namespace deep_ep::dev
