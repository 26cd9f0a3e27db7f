// The counts that a kernel tells the host, and the host's wait for them.
#pragma once

#include <cstdint>
#include <vector>

#include "device/owned.h"
#include "layout/status.h"
#include "runtime/connection.h"

namespace deep_ep::runtime {

struct RecvCounts {
    int64_t num_tokens;
    std::vector<int> num_tokens_per_expert;
    int64_t num_rail_tokens;  // that this rank forwards for its rail peers; 0 within a node
};

class CountExchange {
public:
    // The connection outlives this.
    explicit CountExchange(Connection& connection);
    void release() noexcept { counts_.reset(); }

    // Whether a call with so many experts could be counted: throws InvalidArgument where not.
    void check_experts(int num_experts) const;
    // The next kernel that is launched with counts() tells the host, under this ticket.
    uint64_t begin(int num_local_experts);
    layout::HostCounts* counts() const { return counts_.device(); }
    uint64_t ticket() const { return ticket_; }
    // Until the counts of all ranks have arrived.
    RecvCounts wait();

private:
    Connection& connection_;
    dev::HostMappedObject<layout::HostCounts> counts_;
    uint64_t ticket_ = 0;        // of the last exchange that the host waits for
    int num_local_experts_ = 0;  // in that one
};

}  // namespace deep_ep::runtime
