// Compiled into the library of the engine `nvshmem` alone, beside the kernels that it was compiled with.
#include "kernels/nvshmem_kernels.h"

#include "kernels/internode/internode_launchers.h"
#include "kernels/internode/low_latency_launchers.h"
#include "rail/nvshmem/border.h"

namespace deep_ep::kernels {
namespace {

using rail::nvshmem::Complaint;

template <class Params, void (*kLaunch)(const Params&, dev::Stream)>
bool launch(const Params* params, dev::Stream stream, Complaint* complaint) {
    return rail::nvshmem::guarded(complaint, [&] { kLaunch(*params, stream); });
}

}  // namespace
}  // namespace deep_ep::kernels

extern "C" const void* deep_ep_nvshmem_kernels() {
    using namespace deep_ep::kernels;
    static const NvshmemKernels kernels{
        .shape = kNvshmemKernelShape,
        .notify = &launch<InternodeNotifyParams, &internode::notify::launch>,
        .dispatch = &launch<InternodeDispatchParams, &internode::dispatch::launch>,
        .combine = &launch<InternodeCombineParams, &internode::combine::launch>,
        .low_latency_dispatch = &launch<LowLatencyDispatchParams, &internode::launch_low_latency_dispatch>,
        .low_latency_combine = &launch<LowLatencyCombineParams, &internode::launch_low_latency_combine>,
        .low_latency_clean = &launch<LowLatencyCall, &internode::launch_low_latency_clean>,
    };
    return &kernels;
}
