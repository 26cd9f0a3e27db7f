#include "kernels/kernel_table.h"

#include "kernels/internode/internode_launchers.h"
#include "kernels/internode/low_latency_launchers.h"
#include "kernels/intranode/intranode_launchers.h"
#include "kernels/layout/dispatch_layout.h"
#include "kernels/low_latency/low_latency_launchers.h"

namespace deep_ep::kernels {

#if defined(EP_IS_CUDA_BACKEND)
const KernelTable& cuda_kernel_table() {
#else
const KernelTable& simt_kernel_table() {
#endif
    static const KernelTable table{
        .layout = dispatch_layout::launch,
        .notify_dispatch = notify_dispatch::launch,
        .dispatch = dispatch::launch,
        .combine = combine::launch,
        .internode_notify = internode::notify::launch,
        .internode_dispatch = internode::dispatch::launch,
        .internode_combine = internode::combine::launch,
        .low_latency_dispatch = low_latency::dispatch::launch,
        .low_latency_combine = low_latency::combine::launch,
        .low_latency_clean = low_latency::clean::launch,
        .internode_low_latency_dispatch = internode::launch_low_latency_dispatch,
        .internode_low_latency_combine = internode::launch_low_latency_combine,
        .internode_low_latency_clean = internode::launch_low_latency_clean,
    };
    return table;
}

}  // namespace deep_ep::kernels
