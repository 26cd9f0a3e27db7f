#include "device/simt/shareable.h"

#include <unistd.h>

#include <cstring>

#include "core/error.h"
#include "device/simt/context.h"

#if defined(EP_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace deep_ep::simt {
namespace {

constexpr char kMagic[8] = {'e', 'p', 's', 'i', 'm', 't', '0', '2'};

struct Handle {
    char magic[8];
    SharedFileHandle file;
};

std::string nonce_of(const SharedFileHandle& handle) { return {handle.nonce, sizeof(handle.nonce)}; }

// The bytes of a buffer may be touched, whatever a thread's stack that was mapped here has left behind; those past its end, up
// to the end of its last page, are an error to touch.
void mark_mapped([[maybe_unused]] const MappedFile& memory) {
#if defined(EP_SIMT_ASAN)
    char* const end = static_cast<char*>(memory.address()) + memory.num_bytes();
    ASAN_UNPOISON_MEMORY_REGION(memory.address(), memory.num_bytes());
    ASAN_POISON_MEMORY_REGION(end, (4096 - memory.num_bytes() % 4096) % 4096);
#endif
}

void unmark([[maybe_unused]] const MappedFile& memory) {
#if defined(EP_SIMT_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(memory.address(), (memory.num_bytes() + 4095) / 4096 * 4096);
#endif
}

SharedFileHandle parse(const std::string& bytes) {
    Handle handle;
    if (bytes.size() != sizeof(handle) || std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) != 0) {
        throw TransportError(
            concat("not a handle of CPU shared memory (", bytes.size(), " bytes): do all ranks use the CPU device?"));
    }
    std::memcpy(&handle, bytes.data(), sizeof(handle));
    check_can_reach(handle.file);
    return handle.file;
}

}  // namespace

ShareableHeap& ShareableHeap::instance() {
    static ShareableHeap* const heap = new ShareableHeap;  // never destroyed: devices may outlive static objects
    return *heap;
}

void* ShareableHeap::allocate(size_t bytes, std::string& handle_bytes) {
    SharedFile made = make_shared_file(bytes);
    mark_mapped(made.memory);
    Handle handle{};
    std::memcpy(handle.magic, kMagic, sizeof(kMagic));
    handle.file = made.handle;
    handle_bytes.assign(reinterpret_cast<const char*>(&handle), sizeof(handle));
    void* const address = made.memory.address();
    std::lock_guard lock(mutex_);
    mappings_[address] = Mapping{std::move(made.memory), std::move(made.file), nonce_of(made.handle), 0};
    return address;
}

void ShareableHeap::free(void* address) {
    std::lock_guard lock(mutex_);
    const auto found = mappings_.find(address);
    EP_ENSURE(found != mappings_.end() && found->second.file, "free_shareable: ", address, " was not allocated here");
    unmark(found->second.memory);
    mappings_.erase(found);
}

void* ShareableHeap::open(const std::string& handle_bytes) {
    const SharedFileHandle handle = parse(handle_bytes);
    std::lock_guard lock(mutex_);
    for (auto& [address, mapping] : mappings_) {
        if (mapping.nonce != nonce_of(handle)) continue;
        ++mapping.num_opened;
        return address;
    }
    if (handle.pid == getpid()) throw TransportError("the shared memory has been freed by this process");
    MappedFile memory = map_shared_file(handle);
    void* const address = memory.address();
    mark_mapped(memory);
    mappings_[address] = Mapping{std::move(memory), FileDescriptor(), nonce_of(handle), 1};
    return address;
}

void ShareableHeap::close(void* address) {
    std::lock_guard lock(mutex_);
    const auto found = mappings_.find(address);
    if (found == mappings_.end()) return;  // the owner, in this process, has freed it already
    Mapping& mapping = found->second;
    if (--mapping.num_opened > 0 || mapping.file) return;
    unmark(mapping.memory);
    mappings_.erase(found);
}

size_t ShareableHeap::bytes_at(const void* address) const {
    std::lock_guard lock(mutex_);
    const auto found = mappings_.find(const_cast<void*>(address));
    return found == mappings_.end() ? 0 : found->second.memory.num_bytes();
}

}  // namespace deep_ep::simt
