// What a rank process needs of an engine; each program has one (host.cu, nvshmem.cu).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "device/runtime.h"
#include "rail/engine.h"
#include "rail/streams.h"

namespace deep_ep::testing {

struct ProcessOptions {
    int rank = 0;
    int num_ranks = 1;
    size_t window_bytes = 0;
    std::string interface = {};  // the rest is the engine host's
    std::string reach = {};
    double timeout_s = 60;
};

std::unique_ptr<rail::Engine> make_process_engine(const std::shared_ptr<dev::Device>& device,
                                                  const ProcessOptions& options);

// Lines to and from the program that has started this one.
struct Talk {
    std::function<void(const std::string&)> say;
    std::function<std::string()> hear;
};

// Who sends, or receives, chunks at the same time.
struct Workers {
    int num_warps = 1;  // of a block
    int num_blocks = 1;
    bool are_blocks = false;  // a block does a chunk, instead of a warp; plain puts alone
};

// A stream of chunks from rank 0 to rank 1 as it is without an engine: seconds.
double run_plain(const rail::Engine& engine, dev::Device& device, dev::Stream stream, const Traffic& traffic,
                 const Workers& workers, const Talk& talk);

}  // namespace deep_ep::testing
