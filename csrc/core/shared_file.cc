#include "core/shared_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "core/error.h"

namespace deep_ep {
namespace {

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
        char link[sizeof(SharedFileHandle::pid_namespace)] = {};
        static_cast<void>(readlink("/proc/self/ns/pid", link, sizeof(link) - 1));
        return std::string(link);
    }();
    return name;
}

// The peer's file, verified to be the one that the handle means.
FileDescriptor open_peer_file(const SharedFileHandle& handle) {
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
        char name[sizeof(SharedFileHandle::host)] = {};
        gethostname(name, sizeof(name) - 1);
        return std::string(name);
    }();
    return identity;
}

void check_can_reach(const SharedFileHandle& handle) {
    if (std::strncmp(handle.host, host_identity().c_str(), sizeof(handle.host)) != 0) {
        throw TransportError(concat("the shared memory of process ", handle.pid, " belongs to another host"));
    }
    if (std::strncmp(handle.pid_namespace, pid_namespace().c_str(), sizeof(handle.pid_namespace)) != 0) {
        throw TransportError(concat("the shared memory is that of process ", handle.pid, " in another pid namespace (",
                                    handle.pid_namespace, ", here ", pid_namespace(),
                                    "): the containers of a node must share process ids"));
    }
}

SharedFile make_shared_file(size_t num_bytes) {
    EP_ENSURE(num_bytes > 0, "shareable memory of 0 bytes");
    const std::string nonce = random_nonce();
    FileDescriptor file(memfd_create(("deep_ep-" + nonce).c_str(), MFD_CLOEXEC));
    if (!file) throw TransportError(concat("memfd_create: ", std::strerror(errno)));
    MappedFile memory;
    if (ftruncate(file.get(), static_cast<off_t>(num_bytes)) == 0) memory = MappedFile(file, num_bytes);
    if (!memory)
        throw TransportError(concat("cannot allocate ", num_bytes, " bytes of shared memory: ", std::strerror(errno)));
    SharedFileHandle handle{};
    handle.pid = getpid();
    handle.fd = file.get();
    handle.num_bytes = num_bytes;
    std::memcpy(handle.nonce, nonce.data(), sizeof(handle.nonce));
    std::strncpy(handle.host, host_identity().c_str(), sizeof(handle.host) - 1);
    std::strncpy(handle.pid_namespace, pid_namespace().c_str(), sizeof(handle.pid_namespace) - 1);
    return {std::move(memory), std::move(file), handle};
}

MappedFile map_shared_file(const SharedFileHandle& handle) {
    check_can_reach(handle);
    const FileDescriptor file = open_peer_file(handle);
    struct stat status {};
    const bool has_size = fstat(file.get(), &status) == 0 && static_cast<uint64_t>(status.st_size) == handle.num_bytes;
    if (!has_size) throw TransportError(concat("the shared memory of process ", handle.pid, " has changed its size"));
    MappedFile memory(file, handle.num_bytes);
    if (!memory) {
        throw TransportError(
            concat("cannot map ", handle.num_bytes, " bytes of process ", handle.pid, ": ", std::strerror(errno)));
    }
    return memory;
}

}  // namespace deep_ep
