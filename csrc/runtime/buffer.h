// A Buffer: what one rank has of its group, and the modes that work on it. Owns no stream.
#pragma once

#include "core/error.h"
#include "runtime/high_throughput.h"
#include "runtime/internode.h"
#include "runtime/low_latency.h"

namespace deep_ep::runtime {

// Not thread-safe. All operations of one Buffer go to one stream (or are ordered by the caller as if they did), and
// every rank makes the same sequence of them.
class Buffer : public Connection {
public:
    Buffer(std::shared_ptr<dev::Device> device, const BufferOptions& options);
    ~Buffer() { destroy(0.0); }

    HighThroughput& high_throughput() { return high_throughput_; }
    LowLatency& low_latency() { return low_latency_; }
    Internode& internode() {
        EP_ENSURE(topology().num_nodes() > 1, "this call is for a Buffer across nodes");
        return internode_;
    }

    // Idempotent and bounded: memory that peers still map after `timeout_s` is kept until they let go. Never throws.
    void destroy(double timeout_s) noexcept;

private:
    const kernels::KernelTable& kernels_;
    HighThroughput high_throughput_;
    Internode internode_;
    LowLatency low_latency_;
};

}  // namespace deep_ep::runtime
