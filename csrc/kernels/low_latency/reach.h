// Whether the kernels of this translation unit reach ranks of other nodes. The sources are compiled twice for each device, as a
// group of one node is to pay nothing for others: csrc/kernels/internode/low_latency.cu is the second time.
#pragma once

#include "device/compiler.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

#if defined(EP_ACROSS_NODES)
constexpr bool kAcrossNodes = true;
#else
constexpr bool kAcrossNodes = false;
#endif

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
