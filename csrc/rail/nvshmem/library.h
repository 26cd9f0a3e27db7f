// The border between the extension and the library of the engine `nvshmem`, which is compiled on the user's machine,
// perhaps by another compiler: plain C types, no exceptions, no memory that one side frees for the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rail/engine.h"

namespace deep_ep::rail::nvshmem {

struct Version {
    int32_t major, minor, patch;
};

constexpr size_t kUniqueIdBytes = 128;

// Where a function of the library says why it failed.
struct Complaint {
    char text[1000];
};

// What the library's own kernel is started with: rail::set(), from the host.
struct SetParams {
    Params rail;
    int32_t peer;
    uint64_t flag;
    uint64_t value;
};

// Functions that return bool complain where they return false. Those marked with * are collective over NVSHMEM's world,
// and wait for as long as a peer does not come.
struct Library {
    uint32_t abi;    // kLibraryAbi
    uint32_t bytes;  // sizeof(Library)
    Version built;   // the NVSHMEM whose headers and device code are inside

    // kernels::NvshmemKernels, which this layer does not know; null: none.
    const void* kernels;

    bool (*is_initialized)();
    int (*my_pe)();
    int (*num_pes)();
    bool (*make_unique_id)(char* id, Complaint* complaint);
    // * Of the GPU that `on_device` points into.
    bool (*initialize)(const void* on_device, const char* id, int rank, int num_ranks, Complaint* complaint);
    // Tells NVSHMEM of the device code in here. It is initialized, whoever did that.
    bool (*join)(const void* on_device, Complaint* complaint);
    // * Memory at the same place of every heap; null: there is not so much.
    bool (*allocate)(const void* on_device, size_t bytes, void** memory, Complaint* complaint);
    // * What was posted before has arrived.
    bool (*barrier)(const void* on_device, Complaint* complaint);
    // That rank's window where loads and stores of this GPU reach it; null elsewhere.
    void* (*reach)(const void* window, int pe);
    // Whether CUDA promises that every GPU sees what a NIC has written to the memory of this one in its order, not only this one.
    bool (*orders_nic_for_all)(const void* window);
    // Asynchronous, on the current device, of which the stream is. The first launch of a kernel also loads it.
    bool (*launch_set)(const SetParams* params, void* stream, Complaint* complaint);
};

constexpr uint32_t kLibraryAbi = 3;
constexpr const char* kLibrarySymbol = "deep_ep_nvshmem_library";
using GetLibrary = const Library* (*)();

}  // namespace deep_ep::rail::nvshmem
