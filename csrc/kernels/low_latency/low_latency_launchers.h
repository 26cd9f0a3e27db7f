#pragma once

#include "device/compiler.h"
#include "device/runtime.h"
#include "kernels/params_low_latency.h"

namespace deep_ep::kernels::low_latency {

namespace dispatch {
inline namespace EP_BACKEND {
void launch(const LowLatencyDispatchParams& params, dev::Stream stream);
}
}  // namespace dispatch

namespace combine {
inline namespace EP_BACKEND {
void launch(const LowLatencyCombineParams& params, dev::Stream stream);
}
}  // namespace combine

namespace clean {
inline namespace EP_BACKEND {
// Needs only what does not depend on a shape.
void launch(const LowLatencyCall& call, dev::Stream stream);
}  // namespace EP_BACKEND
}  // namespace clean

}  // namespace deep_ep::kernels::low_latency
