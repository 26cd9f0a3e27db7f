// Launching a kernel, the same on both devices.
//
// A kernel is a type:
//     struct Kernel {
//         using Params = ...;                 // trivially copyable, built on the host
//         struct Shared { ... };              // static shared memory, trivially constructible, not initialised
//         static constexpr int kMaxThreads = ...;  // optional: the most threads of a block, for the register budget
//         static constexpr int kMinBlocks = ...;   // optional: blocks that an SM must be able to hold, for the same
//         static EP_DEVICE void run(const Params& params, Shared& shared);
//     };
// Dynamic shared memory is LaunchConfig::dynamic_shared_bytes, reached through prim::dynamic_shared().
#pragma once

#include "device/compiler.h"

namespace deep_ep::dev {

struct LaunchConfig {
    int num_blocks = 1;
    int num_threads = 32;  // a multiple of 32, at most 1024
    int dynamic_shared_bytes = 0;
    bool is_cooperative = false;  // blocks wait for each other, or for peers: all must be resident at once
    const char* name = "";        // for reports
};

inline namespace EP_BACKEND {
// On the current device (CurrentDevice), of which the stream is. Asynchronous, in stream order. Throws CudaError / Error when the
// launch is refused.
template <class K> void launch(const LaunchConfig& config, Stream stream, const typename K::Params& params);
}  // namespace EP_BACKEND

}  // namespace deep_ep::dev

#include "launch_impl.h"  // device/cuda/ or device/simt/, by include path
