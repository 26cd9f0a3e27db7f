// NVSHMEM's world as this process sees it. There is one for each process, whoever has made it (torch's symmetric memory
// uses it too), and it never ends before the process: to leave it, and to free its memory, takes all of its members.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "core/non_copyable.h"
#include "rail/nvshmem/library.h"

namespace deep_ep::rail::nvshmem {

// What carries messages to the ranks that loads and stores do not reach; decides how large a put should be.
enum class Transport {
    kGpu,           // the GPU posts to the NIC itself: IBGDA
    kProxy,         // a thread of the host posts, in order: IBRC, UCX
    kFencingProxy,  // a thread of the host posts, and waits for a put before its flag: libfabric
};

// Of NVSHMEM_REMOTE_TRANSPORT ("" is NVSHMEM's default) and NVSHMEM_IB_ENABLE_IBGDA.
Transport transport_of(const std::string& remote_transport, bool is_ibgda_enabled);

// What a rank must know of every other before they meet: plain bytes between processes.
struct Introduction {
    char magic[8];
    int32_t rank;
    Version built, loaded;
    int32_t is_initialized, pe, num_pes;
    uint64_t window_bytes;
    Transport transport;
    int32_t num_windows;             // that the world has made so far
    uint64_t free_windows;           // bit i: window i is large enough, and nobody here uses it
    char unique_id[kUniqueIdBytes];  // of rank 0, where there is no world yet
};

class World : NonCopyable {
public:
    static constexpr int kNoWindow = -1;

    // `loaded`: the version of the NVSHMEM in this process. Throws TransportError where the library does not fit it.
    World(const Library& library, Version loaded, Transport transport);

    struct Lease {
        int number = kNoWindow;
        void* address = nullptr;
    };

    Version loaded() const { return loaded_; }
    Transport transport() const { return transport_; }
    const Library& library() const { return library_; }

    Introduction introduce(int rank, size_t window_bytes);
    // * Makes the world, or joins the one that is there, and takes a window of it. All of this process's rank in it are in
    // `all`, by rank. `on_device`: memory on the GPU. Throws TransportError, on every rank, where they do not fit together.
    Lease meet(const std::vector<Introduction>& all, int rank, const void* on_device);
    // *
    void barrier(const void* on_device);
    void give_back(int window);

    // By rank, its place in the world.
    std::vector<int32_t> pes_of(const std::vector<Introduction>& all) const;

private:
    struct Place {
        void* address;
        size_t bytes;
        bool is_free;
    };

    uint64_t free_windows(size_t bytes) const;
    Lease take_window(const std::vector<Introduction>& all, const void* on_device);

    const Library& library_;
    const Version loaded_;
    const Transport transport_;
    std::mutex mutex_;
    bool has_joined_ = false;
    std::vector<Place> windows_;
};

}  // namespace deep_ep::rail::nvshmem
