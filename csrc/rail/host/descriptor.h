// File descriptors of this process that a forked child must not keep: a socket that a child holds looks alive to the peer
// when the parent has died.
#pragma once

#include <utility>

namespace deep_ep::rail::host {

// Owns a descriptor. In a forked child it is closed at once, and the object there is as good as empty.
class Descriptor {
public:
    Descriptor() = default;
    explicit Descriptor(int fd);  // negative: empty
    ~Descriptor() { close(); }
    Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)), process_(other.process_) {}
    Descriptor& operator=(Descriptor&& other) noexcept;

    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    void close();

private:
    int fd_ = -1;
    int process_ = 0;
};

// Wakes a thread that waits in poll() or epoll_wait().
class Event {
public:
    Event();
    int fd() const { return descriptor_.get(); }
    void signal() const;
    void clear() const;

private:
    Descriptor descriptor_;
};

}  // namespace deep_ep::rail::host
