// Low latency across nodes, over the engine that the unit was compiled for.
#pragma once

#include "device/compiler.h"
#include "device/runtime.h"
#include "kernels/params_low_latency.h"

namespace deep_ep::kernels::internode {
inline namespace EP_NODES_BACKEND {

void launch_low_latency_dispatch(const LowLatencyDispatchParams& params, dev::Stream stream);
void launch_low_latency_combine(const LowLatencyCombineParams& params, dev::Stream stream);
// Needs only what does not depend on a shape.
void launch_low_latency_clean(const LowLatencyCall& call, dev::Stream stream);

}  // namespace EP_NODES_BACKEND
}  // namespace deep_ep::kernels::internode
