#include "kernels/params.h"

namespace deep_ep::kernels {

#define EP_ENTRY(name, Params) .name = launch,
#define EP_NODES_ENTRY(name, Params) .name = EP_NODES_BACKEND::launch,
#if defined(EP_IS_CUDA_BACKEND)
const KernelTable& cuda_kernel_table() {
#else
const KernelTable& simt_kernel_table() {
#endif
    static const KernelTable table{EP_OPERATIONS_IN_A_NODE(EP_ENTRY) EP_OPERATIONS_ACROSS_NODES(EP_ENTRY)
                                       EP_LOW_LATENCY_ACROSS_NODES(EP_NODES_ENTRY)};
    return table;
}

}  // namespace deep_ep::kernels
