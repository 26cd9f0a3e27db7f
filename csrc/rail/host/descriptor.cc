#include "rail/host/descriptor.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <set>

#include "core/error.h"

namespace deep_ep::rail::host {

namespace {

struct OpenDescriptors {
    std::mutex mutex;
    std::set<int> fds;
};

// Never destroyed: an engine may outlive static objects.
OpenDescriptors& open_descriptors() {
    static auto* const instance = new OpenDescriptors;
    return *instance;
}

void close_in_child() {
    for (const int fd : open_descriptors().fds) ::close(fd);
    new (&open_descriptors()) OpenDescriptors;  // the mutex is held by the parent's thread
}

OpenDescriptors& watched_descriptors() {
    static const int hooks [[maybe_unused]] = pthread_atfork([] { open_descriptors().mutex.lock(); },
                                                             [] { open_descriptors().mutex.unlock(); }, close_in_child);
    return open_descriptors();
}

}  // namespace

Descriptor::Descriptor(int fd) : fd_(fd), process_(getpid()) {
    if (fd < 0) return;
    OpenDescriptors& open = watched_descriptors();
    const std::lock_guard lock(open.mutex);
    open.fds.insert(fd);
}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
    if (this == &other) return *this;
    close();
    fd_ = std::exchange(other.fd_, -1);
    process_ = other.process_;
    return *this;
}

void Descriptor::close() {
    const int fd = std::exchange(fd_, -1);
    if (fd < 0 || process_ != getpid()) return;
    OpenDescriptors& open = watched_descriptors();
    const std::lock_guard lock(open.mutex);
    open.fds.erase(fd);
    ::close(fd);
}

Event::Event() : descriptor_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!descriptor_) throw TransportError(concat("rail: eventfd: ", std::strerror(errno)));
}

void Event::signal() const {
    const uint64_t one = 1;
    static_cast<void>(!write(fd(), &one, sizeof(one)));  // fails only when it is full, which wakes as well
}

void Event::clear() const {
    uint64_t count;
    static_cast<void>(!read(fd(), &count, sizeof(count)));
}

}  // namespace deep_ep::rail::host
