// The low-latency kernels once more, for groups of several nodes: see kernels/low_latency/reach.h. All of this unit lives in
// EP_NODES_BACKEND.
#define EP_ACROSS_NODES 1

#include "kernels/low_latency/clean.cu"
#include "kernels/low_latency/combine.cu"
#include "kernels/low_latency/dispatch.cu"

#include "kernels/internode/low_latency_launchers.h"

namespace deep_ep::kernels::internode {
inline namespace EP_NODES_BACKEND {

void launch_low_latency_dispatch(const LowLatencyDispatchParams& params, dev::Stream stream) {
    low_latency::dispatch::launch(params, stream);
}

void launch_low_latency_combine(const LowLatencyCombineParams& params, dev::Stream stream) {
    low_latency::combine::launch(params, stream);
}

void launch_low_latency_clean(const LowLatencyCall& call, dev::Stream stream) { low_latency::clean::launch(call, stream); }

}  // namespace EP_NODES_BACKEND
}  // namespace deep_ep::kernels::internode
