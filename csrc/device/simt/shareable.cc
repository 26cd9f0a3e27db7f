#include "device/simt/shareable.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "core/error.h"
#include "device/simt/context.h"

#if defined(EP_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace deep_ep::simt {
namespace {

constexpr char kMagic[8] = {'e', 'p', 's', 'i', 'm', 't', '0', '1'};

struct Handle {
    char magic[8];
    int64_t pid;
    int64_t fd;
    uint64_t bytes;
    char nonce[32];  // hexadecimal; part of the file's name, so a reused pid or fd is noticed
    char host[64];
    char pid_namespace[32];  // containers of one machine may have their own, and each a process 1
};

std::string random_nonce() {
    unsigned char random[16];
    if (getrandom(random, sizeof(random), 0) != static_cast<ssize_t>(sizeof(random))) {
        throw TransportError(concat("getrandom: ", std::strerror(errno)));
    }
    std::string nonce;
    for (unsigned char byte : random) {
        nonce += "0123456789abcdef"[byte >> 4];
        nonce += "0123456789abcdef"[byte & 15];
    }
    return nonce;
}

// Empty where the kernel does not tell: then it is the same for all, and the peer's descriptor decides.
const std::string& pid_namespace() {
    static const std::string name = [] {
        char link[sizeof(Handle::pid_namespace)] = {};
        static_cast<void>(readlink("/proc/self/ns/pid", link, sizeof(link) - 1));
        return std::string(link);
    }();
    return name;
}

// Makes bytes past the end of the buffer, up to the end of its last page, an error to touch.
void poison_tail([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool is_poisoned) {
#if defined(EP_SIMT_ASAN)
    char* end = static_cast<char*>(address) + bytes;
    const size_t tail = (4096 - bytes % 4096) % 4096;
    if (is_poisoned) {
        ASAN_POISON_MEMORY_REGION(end, tail);
    } else {
        ASAN_UNPOISON_MEMORY_REGION(end, tail);
    }
#endif
}

Handle parse(const std::string& bytes) {
    Handle handle;
    if (bytes.size() != sizeof(handle) || std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) != 0) {
        throw TransportError(
            concat("not a handle of CPU shared memory (", bytes.size(), " bytes): do all ranks use the CPU device?"));
    }
    std::memcpy(&handle, bytes.data(), sizeof(handle));
    if (std::strncmp(handle.host, host_identity().c_str(), sizeof(handle.host)) != 0) {
        throw TransportError("the CPU shared memory belongs to another host");
    }
    if (std::strncmp(handle.pid_namespace, pid_namespace().c_str(), sizeof(handle.pid_namespace)) != 0) {
        throw TransportError(concat("the CPU shared memory is that of process ", handle.pid,
                                    " in another pid namespace (", handle.pid_namespace, ", here ", pid_namespace(),
                                    "): the containers of a node must share process ids"));
    }
    return handle;
}

// The peer's file, verified to be the one that the handle means.
FileDescriptor open_peer_file(const Handle& handle) {
    const std::string path = concat("/proc/", handle.pid, "/fd/", handle.fd);
    const std::string peer = concat("process ", handle.pid);
    char target[256] = {};
    if (readlink(path.c_str(), target, sizeof(target) - 1) < 0) {
        const int error = errno;
        throw TransportError(concat("cannot reach the shared memory of ", peer, ": ", std::strerror(error),
                                    error == ENOENT ? " (has it ended, freed the memory, or another pid namespace?)"
                                                    : " (another user, or /proc is restricted?)"));
    }
    if (std::string(target).find(std::string(handle.nonce, sizeof(handle.nonce))) == std::string::npos) {
        throw TransportError(
            concat("the shared memory of ", peer, " is gone: its descriptor ", handle.fd, " now is ", target));
    }
    FileDescriptor file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    if (!file) throw TransportError(concat("cannot open the shared memory of ", peer, ": ", std::strerror(errno)));
    return file;
}

}  // namespace

std::string host_identity() {
    static const std::string identity = [] {
        std::string boot;
        std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
        if (!boot.empty()) return boot;  // containers of one machine may differ in name
        char name[sizeof(Handle::host)] = {};
        gethostname(name, sizeof(name) - 1);
        return std::string(name);
    }();
    return identity;
}

ShareableHeap& ShareableHeap::instance() {
    static ShareableHeap* const heap = new ShareableHeap;  // never destroyed: devices may outlive static objects
    return *heap;
}

void* ShareableHeap::allocate(size_t bytes, std::string& handle_bytes) {
    EP_ENSURE(bytes > 0, "shareable memory of 0 bytes");
    const std::string nonce = random_nonce();
    FileDescriptor file(memfd_create(("deep_ep-" + nonce).c_str(), MFD_CLOEXEC));
    if (!file) throw TransportError(concat("memfd_create: ", std::strerror(errno)));
    MappedFile memory;
    if (ftruncate(file.get(), static_cast<off_t>(bytes)) == 0) memory = MappedFile(file, bytes);
    if (!memory)
        throw TransportError(concat("cannot allocate ", bytes, " bytes of shared memory: ", std::strerror(errno)));
    void* const address = memory.address();
    poison_tail(address, bytes, true);
    Handle handle{};
    std::memcpy(handle.magic, kMagic, sizeof(kMagic));
    handle.pid = getpid();
    handle.fd = file.get();
    handle.bytes = bytes;
    std::memcpy(handle.nonce, nonce.data(), sizeof(handle.nonce));
    std::strncpy(handle.host, host_identity().c_str(), sizeof(handle.host) - 1);
    std::strncpy(handle.pid_namespace, pid_namespace().c_str(), sizeof(handle.pid_namespace) - 1);
    handle_bytes.assign(reinterpret_cast<const char*>(&handle), sizeof(handle));
    std::lock_guard lock(mutex_);
    mappings_[address] = Mapping{std::move(memory), std::move(file), nonce, 0};
    return address;
}

void ShareableHeap::free(void* address) {
    std::lock_guard lock(mutex_);
    const auto found = mappings_.find(address);
    EP_ENSURE(found != mappings_.end() && found->second.file, "free_shareable: ", address, " was not allocated here");
    poison_tail(address, found->second.memory.num_bytes(), false);
    mappings_.erase(found);
}

void* ShareableHeap::open(const std::string& handle_bytes) {
    const Handle handle = parse(handle_bytes);
    const std::string nonce(handle.nonce, sizeof(handle.nonce));
    std::lock_guard lock(mutex_);
    for (auto& [address, mapping] : mappings_) {
        if (mapping.nonce != nonce) continue;
        ++mapping.num_opened;
        return address;
    }
    if (handle.pid == getpid()) throw TransportError("the shared memory has been freed by this process");
    const FileDescriptor file = open_peer_file(handle);
    struct stat status {};
    const bool has_size = fstat(file.get(), &status) == 0 && static_cast<uint64_t>(status.st_size) == handle.bytes;
    if (!has_size) throw TransportError(concat("the shared memory of process ", handle.pid, " has changed its size"));
    MappedFile memory(file, handle.bytes);
    if (!memory) {
        throw TransportError(
            concat("cannot map ", handle.bytes, " bytes of process ", handle.pid, ": ", std::strerror(errno)));
    }
    void* const address = memory.address();
    poison_tail(address, handle.bytes, true);
    mappings_[address] = Mapping{std::move(memory), FileDescriptor(), nonce, 1};
    return address;
}

void ShareableHeap::close(void* address) {
    std::lock_guard lock(mutex_);
    const auto found = mappings_.find(address);
    if (found == mappings_.end()) return;  // the owner, in this process, has freed it already
    Mapping& mapping = found->second;
    if (--mapping.num_opened > 0 || mapping.file) return;
    poison_tail(address, mapping.memory.num_bytes(), false);
    mappings_.erase(found);
}

size_t ShareableHeap::bytes_at(const void* address) const {
    std::lock_guard lock(mutex_);
    const auto found = mappings_.find(const_cast<void*>(address));
    return found == mappings_.end() ? 0 : found->second.memory.num_bytes();
}

}  // namespace deep_ep::simt
