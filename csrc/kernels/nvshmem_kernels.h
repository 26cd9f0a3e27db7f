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
struct NvshmemKernels {
    uint64_t shape;  // kNvshmemKernelShape
    bool (*notify)(const InternodeNotifyParams* params, dev::Stream stream, rail::nvshmem::Complaint* complaint);
    bool (*dispatch)(const InternodeDispatchParams* params, dev::Stream stream, rail::nvshmem::Complaint* complaint);
    bool (*combine)(const InternodeCombineParams* params, dev::Stream stream, rail::nvshmem::Complaint* complaint);
    bool (*low_latency_dispatch)(const LowLatencyDispatchParams* params, dev::Stream stream,
                                 rail::nvshmem::Complaint* complaint);
    bool (*low_latency_combine)(const LowLatencyCombineParams* params, dev::Stream stream,
                                rail::nvshmem::Complaint* complaint);
    bool (*low_latency_clean)(const LowLatencyCall* call, dev::Stream stream, rail::nvshmem::Complaint* complaint);
};

// Both sides must have been compiled from the same parameters. (Their names are by the sources' digest too, deep_ep/_nvshmem.py.)
constexpr uint64_t kNvshmemKernelShape =
    ((sizeof(InternodeNotifyParams) * 65537 + sizeof(InternodeDispatchParams)) * 65537 +
     sizeof(InternodeCombineParams)) *
        31 +
    sizeof(LowLatencyDispatchParams) + sizeof(LowLatencyCombineParams);

}  // namespace deep_ep::kernels
