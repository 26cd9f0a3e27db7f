// The library of the engine `nvshmem`: what needs NVSHMEM's headers. `python -m deep_ep build-nvshmem` compiles it.
#include "rail/nvshmem/library.h"

#include <cuda_runtime_api.h>
#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstring>

#include "device/cuda/cuda_error.h"
#include "device/cuda/guard.h"
#include "device/launch.h"
#include "rail/nvshmem/border.h"
#include "rail/rail.h"

namespace deep_ep::rail::nvshmem {
namespace {

static_assert(sizeof(nvshmemx_uniqueid_t) == kUniqueIdBytes, "the id of another NVSHMEM");

int device_of(const void* memory) {
    cudaPointerAttributes attributes{};
    EP_CUDA(cudaPointerGetAttributes(&attributes, memory));
    return attributes.device;
}

bool is_initialized() { return nvshmemx_init_status() >= NVSHMEM_STATUS_IS_INITIALIZED; }

int my_pe() { return nvshmem_my_pe(); }

int num_pes() { return nvshmem_n_pes(); }

bool make_unique_id(char* id, Complaint* complaint) {
    nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (const int status = nvshmemx_get_uniqueid(&made); status != 0)
        return complain(complaint, concat("nvshmemx_get_uniqueid: status ", status));
    std::memcpy(id, &made, sizeof(made));
    return true;
}

bool initialize(const void* on_device, const char* id, int rank, int num_ranks, Complaint* complaint) {
    return guarded(complaint, [&] {
        const dev::cuda::DeviceGuard guard(device_of(on_device));
        nvshmemx_uniqueid_t given;
        std::memcpy(&given, id, sizeof(given));
        nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
        nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &given, &attributes);
        // Not nvshmemx_init_attr, which ends the process where this returns a status.
        if (const int status = nvshmemx_hostlib_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes); status != 0)
            throw TransportError(concat("nvshmemx_hostlib_init_attr: status ", status));
        // Where no transport reaches a peer it returns 0 and tries again at each later call, the first of which ends the process.
        if (!is_initialized())
            throw TransportError(
                "no transport reaches every rank; stderr has NVSHMEM's own words. NVSHMEM_REMOTE_TRANSPORT "
                "chooses one, DEEP_EP_RAIL=host does without");
    });
}

bool join(const void* on_device, Complaint* complaint) {
    return guarded(complaint, [&] {
        const dev::cuda::DeviceGuard guard(device_of(on_device));
        nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
        // The world is there: this counts one more user of it, and fills in the state of the device code in here.
        if (const int status = nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes); status != 0)
            throw TransportError(concat("nvshmemx_init_attr: status ", status));
    });
}

bool allocate(const void* on_device, size_t bytes, void** memory, Complaint* complaint) {
    return guarded(complaint, [&] {
        const dev::cuda::DeviceGuard guard(device_of(on_device));
        *memory = nvshmem_align(256, bytes);
        if (*memory != nullptr && device_of(*memory) != device_of(on_device))
            throw TransportError(concat("NVSHMEM was initialized on GPU ", device_of(*memory), ", and this is GPU ",
                                        device_of(on_device)));
    });
}

bool barrier(const void* on_device, Complaint* complaint) {
    return guarded(complaint, [&] {
        const dev::cuda::DeviceGuard guard(device_of(on_device));
        nvshmem_barrier_all();
    });
}

void* reach(const void* window, int pe) { return nvshmem_ptr(window, pe); }

bool orders_nic_for_all(const void* window) {
    int ordering = 0;
    const cudaError_t error =
        cudaDeviceGetAttribute(&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, device_of(window));
    return error == cudaSuccess && ordering >= cudaGPUDirectRDMAWritesOrderingAllDevices;
}

struct SetKernel {
    using Params = SetParams;
    struct Shared {};

    static EP_DEVICE void run(const Params& params, Shared&) {
        const Rail rail(params.rail);
        if (threadIdx.x == 0) set(rail, params.peer, {params.flag, params.value}, 0);
    }
};

bool launch_set(const SetParams* params, void* stream, Complaint* complaint) {
    return guarded(complaint, [&] {
        dev::LaunchConfig config;
        config.name = "set from the host";
        dev::launch<SetKernel>(config, stream, *params);
    });
}

}  // namespace
}  // namespace deep_ep::rail::nvshmem

// Of csrc/kernels/internode/nvshmem_kernels.cc, where it is linked in.
extern "C" __attribute__((weak)) const void* deep_ep_nvshmem_kernels();

extern "C" __attribute__((visibility("default"))) const deep_ep::rail::nvshmem::Library* deep_ep_nvshmem_library() {
    using namespace deep_ep::rail::nvshmem;
    static const Library library{
        .abi = kLibraryAbi,
        .bytes = sizeof(Library),
        .built = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION},
        .kernels = deep_ep_nvshmem_kernels == nullptr ? nullptr : deep_ep_nvshmem_kernels(),
        .is_initialized = &is_initialized,
        .my_pe = &my_pe,
        .num_pes = &num_pes,
        .make_unique_id = &make_unique_id,
        .initialize = &initialize,
        .join = &join,
        .allocate = &allocate,
        .barrier = &barrier,
        .reach = &reach,
        .orders_nic_for_all = &orders_nic_for_all,
        .launch_set = &launch_set,
    };
    return &library;
}
