// The kernels across nodes that the library of the engine `nvshmem` brings along: what it exports of them, in plain C as all
// of its border (rail/nvshmem/library.h).
#pragma once

#include <cstdint>

#include "device/runtime.h"
#include "kernels/params_internode.h"
#include "kernels/params_low_latency.h"
#include "rail/nvshmem/library.h"

namespace deep_ep::kernels {

// Asynchronous; they complain where they return false.
#define EP_EXPORTED(name, Params) \
    bool (*name)(const Params* params, dev::Stream stream, rail::nvshmem::Complaint* complaint);
struct NvshmemKernels {
    uint64_t shape;  // kNvshmemKernelShape
    EP_OPERATIONS_ACROSS_NODES(EP_EXPORTED)
    EP_LOW_LATENCY_ACROSS_NODES(EP_EXPORTED)
};
#undef EP_EXPORTED

// Both sides must have been compiled from the same parameters. (Their names are by the sources' digest too, deep_ep/_nvshmem.py.)
constexpr uint64_t kNvshmemKernelShape =
    ((sizeof(InternodeNotifyParams) * 65537 + sizeof(InternodeDispatchParams)) * 65537 +
     sizeof(InternodeCombineParams)) *
        31 +
    sizeof(LowLatencyDispatchParams) + sizeof(LowLatencyCombineParams);

}  // namespace deep_ep::kernels
