#pragma once

#include "device/compiler.h"
#include "device/runtime.h"
#include "kernels/params.h"

namespace deep_ep::kernels {

namespace notify_dispatch {
inline namespace EP_BACKEND {
void launch(const NotifyDispatchParams& params, dev::Stream stream);
}
}  // namespace notify_dispatch

namespace dispatch {
inline namespace EP_BACKEND {
void launch(const DispatchParams& params, dev::Stream stream);
}
}  // namespace dispatch

namespace combine {
inline namespace EP_BACKEND {
void launch(const CombineParams& params, dev::Stream stream);
}
}  // namespace combine

}  // namespace deep_ep::kernels
