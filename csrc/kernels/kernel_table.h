// The operations of one back end. The runtime picks a table by device; nothing else knows that there are two.
#pragma once

#include "device/compiler.h"

namespace deep_ep::kernels {

// Each with its parameters, and here the only list of them. An operation is launched by the overload of launch() for its parameters,
// at the end of its file; all are asynchronous, in stream order.
#define EP_OPERATIONS_IN_A_NODE(OPERATION)                    \
    OPERATION(layout, LayoutParams)                           \
    OPERATION(notify_dispatch, NotifyDispatchParams)          \
    OPERATION(dispatch, DispatchParams)                       \
    OPERATION(combine, CombineParams)                         \
    OPERATION(low_latency_dispatch, LowLatencyDispatchParams) \
    OPERATION(low_latency_combine, LowLatencyCombineParams)   \
    OPERATION(low_latency_clean, LowLatencyCall)
// Over the engine that the table was compiled for.
#define EP_OPERATIONS_ACROSS_NODES(OPERATION)              \
    OPERATION(internode_notify, InternodeNotifyParams)     \
    OPERATION(internode_dispatch, InternodeDispatchParams) \
    OPERATION(internode_combine, InternodeCombineParams)
// The same, of kernels that are compiled once more: see device/compiler.h.
#define EP_LOW_LATENCY_ACROSS_NODES(OPERATION)                          \
    OPERATION(internode_low_latency_dispatch, LowLatencyDispatchParams) \
    OPERATION(internode_low_latency_combine, LowLatencyCombineParams)   \
    OPERATION(internode_low_latency_clean, LowLatencyCall)
#define EP_OPERATIONS(OPERATION)          \
    EP_OPERATIONS_IN_A_NODE(OPERATION)    \
    EP_OPERATIONS_ACROSS_NODES(OPERATION) \
    EP_LOW_LATENCY_ACROSS_NODES(OPERATION)

#define EP_PARAMS(name, Params) struct Params;
EP_OPERATIONS(EP_PARAMS)
#undef EP_PARAMS

#define EP_ENTRY(name, Params) void (*name)(const Params& params, dev::Stream stream);
struct KernelTable {
    EP_OPERATIONS(EP_ENTRY)
};
#undef EP_ENTRY

const KernelTable& simt_kernel_table();
const KernelTable& cuda_kernel_table();  // only where EP_WITH_CUDA

#define EP_LAUNCH(name, Params) void launch(const Params& params, dev::Stream stream);
inline namespace EP_BACKEND {
EP_OPERATIONS_IN_A_NODE(EP_LAUNCH)
EP_OPERATIONS_ACROSS_NODES(EP_LAUNCH)
}  // namespace EP_BACKEND
#if !defined(EP_ACROSS_NODES)
namespace EP_NODES_BACKEND {
EP_LOW_LATENCY_ACROSS_NODES(EP_LAUNCH)
}
#endif
#undef EP_LAUNCH

}  // namespace deep_ep::kernels
