// The shared files of the CPU devices of this process, by address.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "core/shared_file.h"
#include "device/simt/quiet_mutex.h"

namespace deep_ep::simt {

class ShareableHeap {
public:
    // Zero-filled; the handle is plain bytes.
    void* allocate(size_t bytes, std::string& handle);
    void free(void* address);
    // In the process that owns the memory this is its own address.
    void* open(const std::string& handle);
    void close(void* address);
    size_t bytes_at(const void* address) const;

    // All devices of a process share one: a handle may come from any of them.
    static ShareableHeap& instance();

private:
    struct Mapping {
        MappedFile memory;
        FileDescriptor file;  // of the owner; none: opened from a peer
        std::string nonce;
        int num_opened;
    };
    mutable QuietMutex mutex_;
    std::map<void*, Mapping> mappings_;
};

}  // namespace deep_ep::simt
