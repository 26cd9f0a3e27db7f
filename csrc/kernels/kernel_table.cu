#include "kernels/kernel_table.h"

namespace deep_ep::kernels {

#if defined(EP_IS_CUDA_BACKEND)
const KernelTable& cuda_kernel_table() {
#else
const KernelTable& simt_kernel_table() {
#endif
    // Overloads of one name: each entry takes the one of its type.
    static const KernelTable table{.layout = launch,
                                   .notify_dispatch = launch,
                                   .dispatch = launch,
                                   .combine = launch,
                                   .internode_notify = launch,
                                   .internode_dispatch = launch,
                                   .internode_combine = launch,
                                   .low_latency_dispatch = launch,
                                   .low_latency_combine = launch,
                                   .low_latency_clean = launch,
                                   .internode_low_latency_dispatch = EP_NODES_BACKEND::launch,
                                   .internode_low_latency_combine = EP_NODES_BACKEND::launch,
                                   .internode_low_latency_clean = EP_NODES_BACKEND::launch};
    return table;
}

}  // namespace deep_ep::kernels
