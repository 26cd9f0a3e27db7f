// Compiled into the library of the engine `nvshmem` alone, beside the kernels that it was compiled with.
#include "kernels/nvshmem_kernels.h"

#include "rail/nvshmem/border.h"

namespace deep_ep::kernels {
namespace {

using rail::nvshmem::Complaint;

#define EP_GUARDED(name, Params)                                                    \
    .name = [](const Params* params, dev::Stream stream, Complaint* complaint) {    \
        return rail::nvshmem::guarded(complaint, [&] { launch(*params, stream); }); \
    },
#define EP_NODES_GUARDED(name, Params)                                                                \
    .name = [](const Params* params, dev::Stream stream, Complaint* complaint) {                      \
        return rail::nvshmem::guarded(complaint, [&] { EP_NODES_BACKEND::launch(*params, stream); }); \
    },
const NvshmemKernels kKernels{.shape = kNvshmemKernelShape,
                              EP_OPERATIONS_ACROSS_NODES(EP_GUARDED) EP_LOW_LATENCY_ACROSS_NODES(EP_NODES_GUARDED)};

}  // namespace
}  // namespace deep_ep::kernels

extern "C" const void* deep_ep_nvshmem_kernels() { return &deep_ep::kernels::kKernels; }
