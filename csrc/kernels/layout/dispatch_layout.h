#pragma once

#include "device/compiler.h"
#include "device/runtime.h"
#include "kernels/params.h"

namespace deep_ep::kernels::dispatch_layout {

inline namespace EP_BACKEND {
void launch(const LayoutParams& params, int num_blocks, dev::Stream stream);
}

}  // namespace deep_ep::kernels::dispatch_layout
