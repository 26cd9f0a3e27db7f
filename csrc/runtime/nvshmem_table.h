// The CUDA kernels of this build, with those across nodes from the library of the engine `nvshmem`.
#pragma once

#include "kernels/params.h"

namespace deep_ep::runtime {

// Only where EP_WITH_CUDA. Throws TransportError where the library is not loaded, or was made from other kernels.
const kernels::KernelTable& nvshmem_kernel_table();

}  // namespace deep_ep::runtime
