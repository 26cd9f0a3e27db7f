// The low-latency mode: its calls, and which of them are open.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/params_low_latency.h"
#include "runtime/connection.h"

namespace deep_ep::runtime {

using kernels::LowLatencyArgs;
using kernels::LowLatencyCombineArgs;
using kernels::LowLatencyDispatchArgs;

// What to launch, for a call's ticket: both phases at once; the send phase, which returns a ticket; or else the receive
// phase of the call with that ticket.
constexpr uint64_t kSendPhase = 0;
constexpr uint64_t kBothPhases = ~uint64_t{0};

class LowLatency {
public:
    // Both outlive this.
    LowLatency(Connection& connection, const kernels::KernelTable& kernels);
    void release() noexcept;

    // At most two calls may be open (sent, not received) at a time.
    uint64_t dispatch(const LowLatencyDispatchArgs& args, uint64_t ticket, dev::Stream stream);
    uint64_t combine(const LowLatencyCombineArgs& args, uint64_t ticket, dev::Stream stream);
    // A barrier of the group; no call may be open.
    void clean(dev::Stream stream);
    // The receive phase of the call with that ticket will never be launched. Any thread.
    void abandon_hook(uint64_t ticket, const std::string& text);

    uint8_t* data() const;
    // int32 [num_ranks], on the device; not zero: left out.
    int* masked_ranks() const;
    // Bytes of the low-latency region for calls of this shape, bfloat16 or FP8.
    static int64_t size_hint(int num_max_tokens, int hidden, int num_ranks, int num_experts);

private:
    kernels::LowLatencyCall make_call(const LowLatencyArgs& args, const layout::LowLatencyMessage& message) const;
    kernels::LowLatencyDispatchParams make_params(const LowLatencyDispatchArgs& args) const;
    kernels::LowLatencyCombineParams make_params(const LowLatencyCombineArgs& args) const;
    void require_rail() const;
    kernels::LowLatencyRail make_rail() const;
    bool spans_nodes() const { return connection_.topology().num_nodes() > 1; }
    uint64_t num_far_ranks() const;
    int64_t needed_bytes(const layout::LowLatencyMessage& message) const;
    bool fits(const layout::LowLatencyMessage& message) const;
    bool fits_entry_slots(const kernels::LowLatencyCall& call) const;
    uint64_t enter(kernels::LowLatencyCall& call, uint64_t ticket);
    uint64_t open();
    void close(uint64_t ticket);
    template <class Args, class Params>
    uint64_t run(const Args& args, void (*entry)(const Params&, dev::Stream), uint64_t ticket, dev::Stream stream);

    Connection& connection_;
    const kernels::KernelTable& kernels_;
    const int num_ranks_;
    dev::DeviceArray<int> masked_;        // [num_ranks]
    dev::DeviceArray<uint64_t> wait_ns_;  // [num_ranks], then [num_ranks] of LowLatencyCall::decisions
    dev::DeviceArray<uint64_t> told_;     // of LowLatencyRail, where there are several nodes
    uint64_t num_sends_ = 0;
    uint64_t open_calls_[layout::kNumLowLatencyBanks] = {};  // ticket of the open call in each; 0: none
};

}  // namespace deep_ep::runtime
