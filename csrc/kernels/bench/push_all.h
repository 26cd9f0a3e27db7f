// The wire ceiling of a machine: every rank writes to all its peers at once, with nothing to wait for or decide.
//
// Part of the library, because a ceiling has to be measured by the process that compares itself with it; no operation
// uses it.
#pragma once

#include "device/compiler.h"
#include "device/runtime.h"
#include "kernels/params.h"

namespace deep_ep::kernels {

// The data regions are cut into num_ranks parts of bytes_per_peer. This rank reads part `rank` of its own and writes it
// to part `rank` of every peer's, so that no byte has two writers, and what is read is written by nobody.
struct PushAllParams {
    HeapParams heap;
    uint64_t bytes_per_peer;  // a multiple of 16; num_ranks * bytes_per_peer must fit the data region
};

namespace push_all {
inline namespace EP_BACKEND {
void launch(const PushAllParams& params, int num_blocks, dev::Stream stream);
}
}  // namespace push_all

}  // namespace deep_ep::kernels
