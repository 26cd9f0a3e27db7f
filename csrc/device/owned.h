// What a device gives, owned: each of these belongs to one owner, moves, and goes back to its device with it.
#pragma once

#include <memory>
#include <utility>

#include "device/runtime.h"

namespace deep_ep::dev {

// `kRelease` is the member of Device that takes the handle back. It never throws out of here: where it fails, the driver is
// unloading or the context is broken, and the system takes back what is left.
template <class Handle, auto kRelease> class Owned {
public:
    Owned() = default;
    Owned(std::shared_ptr<Device> device, Handle handle) : device_(std::move(device)), handle_(std::move(handle)) {}
    ~Owned() { reset(); }
    Owned(Owned&& other) noexcept
        : device_(std::move(other.device_)), handle_(std::exchange(other.handle_, Handle{})) {}
    Owned& operator=(Owned&& other) noexcept {
        if (this == &other) return *this;
        reset();
        device_ = std::move(other.device_);
        handle_ = std::exchange(other.handle_, Handle{});
        return *this;
    }

    const Handle& get() const { return handle_; }
    explicit operator bool() const { return device_ != nullptr; }

    void reset() noexcept {
        const std::shared_ptr<Device> device = std::exchange(device_, nullptr);
        const Handle handle = std::exchange(handle_, Handle{});
        if (device == nullptr) return;
        try {
            ((*device).*kRelease)(handle);
        } catch (...) {
        }
    }

private:
    std::shared_ptr<Device> device_;  // null: nothing is owned
    Handle handle_{};
};

using OwnedStream = Owned<Stream, &Device::destroy_stream>;
using OwnedEvent = Owned<Event, &Device::destroy_event>;
using OwnedShareable = Owned<ShareableMemory, &Device::free_shareable>;
using Mapping = Owned<void*, &Device::close_shared>;  // of a peer's shareable memory

inline OwnedEvent make_event(const std::shared_ptr<Device>& device) { return {device, device->create_event()}; }

inline OwnedShareable make_shareable(const std::shared_ptr<Device>& device, size_t num_bytes, Placement placement) {
    return {device, device->allocate_shareable(num_bytes, placement)};
}

inline Mapping open_mapping(const std::shared_ptr<Device>& device, const std::string& handle) {
    return {device, device->open_shared(handle)};
}

// `count` objects in device-local memory, zero-filled.
template <class T> class DeviceArray {
public:
    DeviceArray() = default;
    DeviceArray(const std::shared_ptr<Device>& device, size_t count)
        : memory_(device, device->allocate(sizeof(T) * count)) {}

    T* get() const { return static_cast<T*>(memory_.get()); }
    void reset() noexcept { memory_.reset(); }

private:
    Owned<void*, &Device::free> memory_;
};

// One object in memory that kernels and the host read and write, zero-filled.
template <class T> class HostMappedObject {
public:
    HostMappedObject() = default;
    explicit HostMappedObject(const std::shared_ptr<Device>& device)
        : memory_(device, device->allocate_host_mapped(sizeof(T))) {}

    T* host() const { return static_cast<T*>(memory_.get().host); }
    T* device() const { return static_cast<T*>(memory_.get().device); }
    T* operator->() const { return host(); }
    void reset() noexcept { memory_.reset(); }

private:
    Owned<HostMapped, &Device::free_host_mapped> memory_;
};

}  // namespace deep_ep::dev
