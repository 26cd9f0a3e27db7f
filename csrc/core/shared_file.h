// Memory that other processes of this host can map: an anonymous file (memfd) that peers reach through the owner's /proc
// entry. Nothing has a name, so nothing is left behind when a process dies, and the pages live as long as any mapping.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/mapped_file.h"

namespace deep_ep {

// What a peer needs to find the file: plain bytes.
struct SharedFileHandle {
    int64_t pid;
    int64_t fd;
    uint64_t num_bytes;
    char nonce[32];  // hexadecimal; part of the file's name, so a reused pid or fd is noticed
    char host[64];
    char pid_namespace[32];  // containers of one machine may have their own, and each a process 1
};

// As its owner has it. Peers can open it while `file` lives.
struct SharedFile {
    MappedFile memory;
    FileDescriptor file;
    SharedFileHandle handle;
};

// Zero-filled. Throws TransportError.
SharedFile make_shared_file(size_t num_bytes);

// Throws TransportError where the handle is of another host or pid namespace.
void check_can_reach(const SharedFileHandle& handle);

// In another process than the owner's. Throws TransportError with the reason: those, or an owner that has ended.
MappedFile map_shared_file(const SharedFileHandle& handle);

// What tells hosts apart: boot identity and host name.
std::string host_identity();

}  // namespace deep_ep
