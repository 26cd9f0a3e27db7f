// The wire ceiling of a machine: every rank writes to all its peers at once, with nothing to wait for or decide.
#pragma once

#include <cstdint>

#include "device/runtime.h"
#include "layout/heap.h"

namespace deep_ep::bench {

// Each region is cut into num_ranks parts of bytes_per_peer. This rank reads part `rank` of its own and writes it to part
// `rank` of every peer's, so that no byte has two writers, and what is read is written by nobody.
struct PushAllParams {
    uint8_t* bases[layout::kMaxRanks];  // of the regions
    int rank, num_ranks;
    uint64_t bytes_per_peer;  // a multiple of 16
};

void push_all_on_cpu(const PushAllParams& params, int num_blocks, dev::Stream stream);
void push_all_on_cuda(const PushAllParams& params, int num_blocks, dev::Stream stream);  // only where EP_WITH_CUDA

}  // namespace deep_ep::bench
