#pragma once

#include "device/compiler.h"
#include "device/runtime.h"
#include "kernels/params_internode.h"

namespace deep_ep::kernels::internode {

namespace notify {
inline namespace EP_BACKEND {
void launch(const InternodeNotifyParams& params, dev::Stream stream);
}
}  // namespace notify

namespace dispatch {
inline namespace EP_BACKEND {
void launch(const InternodeDispatchParams& params, dev::Stream stream);
}
}  // namespace dispatch

namespace combine {
inline namespace EP_BACKEND {
void launch(const InternodeCombineParams& params, dev::Stream stream);
}
}  // namespace combine

}  // namespace deep_ep::kernels::internode
