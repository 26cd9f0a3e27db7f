// Compiled into the library of the engine `nvshmem` alone, beside the kernels that it was compiled with.
#include "kernels/nvshmem_kernels.h"

#include "kernels/kernel_table.h"
#include "rail/nvshmem/border.h"

namespace deep_ep::kernels {
namespace {

using rail::nvshmem::Complaint;

template <class Params> bool guarded_launch(const Params* params, dev::Stream stream, Complaint* complaint) {
    return rail::nvshmem::guarded(complaint, [&] { launch(*params, stream); });
}

template <class Params> bool guarded_nodes_launch(const Params* params, dev::Stream stream, Complaint* complaint) {
    return rail::nvshmem::guarded(complaint, [&] { EP_NODES_BACKEND::launch(*params, stream); });
}

}  // namespace
}  // namespace deep_ep::kernels

extern "C" const void* deep_ep_nvshmem_kernels() {
    using namespace deep_ep::kernels;
    static const NvshmemKernels kernels{
        .shape = kNvshmemKernelShape,
        .notify = guarded_launch,
        .dispatch = guarded_launch,
        .combine = guarded_launch,
        .low_latency_dispatch = guarded_nodes_launch,
        .low_latency_combine = guarded_nodes_launch,
        .low_latency_clean = guarded_nodes_launch,
    };
    return &kernels;
}
