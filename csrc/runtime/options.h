// What a Buffer is made with.
#pragma once

#include <cstdint>

namespace deep_ep::runtime {

constexpr int64_t kLendPartOfData = -1;

struct BufferOptions {
    int rank;
    int num_ranks;
    int64_t num_data_bytes;         // of the high-throughput mode
    int64_t num_low_latency_bytes;  // of the low-latency mode
    double timeout_s;
    double warn_s;
    bool is_shrinkable;          // low latency: a peer that does not come is masked
    int64_t num_lend_bytes = 0;  // for tensors that peers write and read in place; kLendPartOfData: some of the data
};

}  // namespace deep_ep::runtime
