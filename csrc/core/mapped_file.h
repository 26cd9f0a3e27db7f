// What the system gives a process: descriptors and mappings, each with one owner.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <utility>

namespace deep_ep {

class FileDescriptor {
public:
    explicit FileDescriptor(int fd = -1) : fd_(fd) {}
    ~FileDescriptor() {
        if (fd_ >= 0) ::close(fd_);
    }
    FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    FileDescriptor& operator=(FileDescriptor&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }

    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }

private:
    int fd_;  // negative: none
};

// Pages of a file that other processes map too.
class MappedFile {
public:
    MappedFile() = default;
    // Where the system refuses, it is empty and errno says why.
    MappedFile(const FileDescriptor& file, size_t num_bytes)
        : address_(mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file.get(), 0)),
          num_bytes_(num_bytes) {
        if (address_ == MAP_FAILED) address_ = nullptr;
    }
    ~MappedFile() {
        if (address_ != nullptr) munmap(address_, num_bytes_);
    }
    MappedFile(MappedFile&& other) noexcept
        : address_(std::exchange(other.address_, nullptr)), num_bytes_(other.num_bytes_) {}
    MappedFile& operator=(MappedFile&& other) noexcept {
        std::swap(address_, other.address_);
        std::swap(num_bytes_, other.num_bytes_);
        return *this;
    }

    void* address() const { return address_; }
    size_t num_bytes() const { return num_bytes_; }
    explicit operator bool() const { return address_ != nullptr; }

private:
    void* address_ = nullptr;
    size_t num_bytes_ = 0;
};

}  // namespace deep_ep
