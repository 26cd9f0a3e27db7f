// A Buffer: the symmetric heap of one rank and the operations on it. Plans and launches; owns no stream.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "comm/mailbox.h"
#include "comm/symmetric_heap.h"
#include "device/owned.h"
#include "kernels/kernel_table.h"
#include "runtime/failure.h"
#include "runtime/lender.h"

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

using kernels::CombineArgs;
using kernels::DispatchArgs;
using kernels::LayoutArgs;
using kernels::LowLatencyArgs;
using kernels::LowLatencyCombineArgs;
using kernels::LowLatencyDispatchArgs;
using kernels::NotifyArgs;

struct RecvCounts {
    int64_t num_tokens;
    std::vector<int> num_tokens_per_expert;
};

struct LowLatencyGrid {
    int num_blocks, num_warps;
};

// Throws unless every rank can have the same number of experts.
void check_num_experts(int num_experts, int num_ranks);

// Not thread-safe. All operations of one Buffer go to one stream (or are ordered by the caller as if they did), and
// every rank makes the same sequence of them.
class Buffer {
public:
    Buffer(std::shared_ptr<dev::Device> device, const BufferOptions& options);
    ~Buffer();

    std::string export_handle() const;
    void connect(const std::vector<std::string>& handles);
    uint8_t* data() const;
    int64_t num_data_bytes() const { return options_.num_data_bytes; }

    void get_dispatch_layout(const LayoutArgs& args, dev::Stream stream);
    void notify_dispatch(const NotifyArgs& args, dev::Stream stream);
    // After notify_dispatch: waits until the counts of all ranks have arrived.
    RecvCounts wait_counts();
    void dispatch(const DispatchArgs& args, int num_sms, dev::Stream stream);
    void combine(const CombineArgs& args, int num_sms, dev::Stream stream);

    // Memory for outputs of dispatch and inputs of combine that peers reach in place, for later work on `stream`: a piece of
    // each size, or none where there is no room for all. See Lender for what callers have to see to. Where `stream` is
    // captured, the graph owns the memory.
    std::vector<std::unique_ptr<LentMemory>> lend(const std::vector<int64_t>& sizes, dev::Stream stream,
                                                  bool is_captured);
    // One piece, or null; for work in the order of calls.
    std::unique_ptr<LentMemory> lend(int64_t num_bytes);
    int64_t num_lend_bytes() const { return static_cast<int64_t>(lender_->num_bytes()); }
    void note_stream(dev::Stream stream, bool is_ours) { lender_->note_stream(stream, is_ours); }

    // Low latency: both phases in one launch, or two launches: a send phase returns the ticket that its receive phase
    // needs. At most two calls may be open (sent, not received) at a time.
    void low_latency_dispatch(const LowLatencyDispatchArgs& args, dev::Stream stream);
    void low_latency_combine(const LowLatencyCombineArgs& args, dev::Stream stream);
    uint64_t send_low_latency_dispatch(const LowLatencyDispatchArgs& args, dev::Stream stream);
    void receive_low_latency_dispatch(const LowLatencyDispatchArgs& args, uint64_t ticket, dev::Stream stream);
    uint64_t send_low_latency_combine(const LowLatencyCombineArgs& args, dev::Stream stream);
    void receive_low_latency_combine(const LowLatencyCombineArgs& args, uint64_t ticket, dev::Stream stream);
    // A barrier of the group; no call may be open.
    void clean_low_latency(dev::Stream stream);
    uint8_t* low_latency_data() const;
    // Bytes of the low-latency region for calls of this shape, bfloat16 or FP8.
    static int64_t low_latency_size_hint(int num_max_tokens, int hidden, int num_ranks, int num_experts);
    // int32 [num_ranks], on the device; not zero: left out.
    int* masked_ranks() const;

    // Measures the links: `num_sms` SMs write `bytes_per_peer` to every peer at once. For benchmarks only; it overwrites
    // the data regions and takes part in no protocol.
    void bench_push(int64_t bytes_per_peer, int num_sms, dev::Stream stream);

    // Throws what a kernel has reported, or a peer noted; a Buffer that failed once throws the same at every later
    // operation.
    void check();
    // The sentence that check() would throw, as far as somebody has looked; or nothing.
    std::string failure() const { return desk_->failure(); }
    // Before each call, which may be more than one of the operations: check(), and what abandon_call() refers to.
    void begin_call();
    // The host gave up within a call, for the reason `text`. If peers know of the call it fails this Buffer and stops them;
    // else the Buffer stays as it was, and a peer that waits in vain quotes the reason.
    void abandon_call(const std::string& text);
    // The receive phase of the call with that ticket will never be launched. Any thread.
    void abandon_hook(uint64_t ticket, const std::string& text);
    // Lets the watcher of this process look at this Buffer, until destroy().
    void start_watching();
    std::string look_for_failures() { return desk_->look(); }
    // Called with a sentence, by whoever calls this Buffer, as soon as a wait has passed the warning threshold.
    void set_warning_handler(std::function<void(const std::string&)> handler) { on_warning_ = std::move(handler); }

    // Idempotent and bounded: memory that peers still map after `timeout_s` is kept until they let go. Never throws.
    void destroy(double timeout_s) noexcept;

private:
    void divide_heap();
    void require_usable() const;
    void fail_unfinished(const std::string& text, bool is_low_latency);
    void announce(dev::Stream stream, bool is_low_latency);
    layout::WindowLayout check_dispatch_rows(int num_tokens, int64_t row_bytes, const layout::SlotLayout& slot) const;
    void check_counted_experts(int num_experts) const;
    LowLatencyGrid plan_low_latency(int hidden) const;
    kernels::LowLatencyCall low_latency_call(const LowLatencyArgs& args,
                                             const layout::LowLatencyMessage& message) const;
    kernels::LowLatencyDispatchParams low_latency_params(const LowLatencyDispatchArgs& args) const;
    kernels::LowLatencyCombineParams low_latency_params(const LowLatencyCombineArgs& args) const;
    void open_low_latency_call(kernels::LowLatencyCall& call);
    void make_whole_low_latency_call(kernels::LowLatencyCall& call);
    void close_low_latency_call(kernels::LowLatencyCall& call, uint64_t ticket);
    void collect_warning();
    kernels::HeapParams heap_params() const;
    kernels::WatchParams watch_params() const;
    kernels::Geometry plan_plain(int num_sms, int max_threads) const;
    kernels::Geometry plan_dispatch(int num_sms, const layout::SlotLayout& slot, bool is_lent) const;
    kernels::Geometry plan_combine(int num_sms, const layout::SlotLayout& slot, bool is_lent) const;
    uint64_t lent_offset(const void* address) const;
    layout::Loan loan_for(const DispatchArgs& args) const;
    layout::Loan loan_for(const CombineArgs& args) const;
    bool may_lend() const { return num_lend_bytes() > 0 && options_.num_ranks > 1; }
    bool can_stage(const kernels::Geometry& geometry) const;
    int stage_room(int state_bytes) const;  // dynamic shared memory that a block can have
    int max_layout_counts() const;
    uint64_t num_data_bytes_for(const layout::SlotLayout& slot) const;
    layout::WindowLayout window_for(const layout::SlotLayout& slot, const char* operation) const;

    std::shared_ptr<dev::Device> device_;
    BufferOptions options_;
    const kernels::KernelTable* kernels_;
    layout::ControlLayout control_;
    std::shared_ptr<comm::Mailbox> mailbox_;
    std::unique_ptr<comm::SymmetricHeap> heap_;
    uint64_t num_heap_bytes_ = 0;
    uint64_t num_slot_bytes_ = 0;  // of the data region, from its start
    // In the heap, behind the slots or behind the data of both modes: a copy of combine's weights, then what is lent.
    uint64_t weights_offset_ = 0, num_weight_bytes_ = 0, lend_offset_ = 0;
    std::shared_ptr<Lender> lender_;
    dev::HostMappedObject<layout::HostStatus> status_;
    dev::HostMappedObject<layout::HostCounts> counts_;
    dev::DeviceArray<layout::LocalState> local_;
    dev::DeviceArray<int> layout_partials_;
    dev::DeviceArray<int> masked_;        // [num_ranks]
    dev::DeviceArray<uint64_t> wait_ns_;  // [num_ranks], then [num_ranks] of LowLatencyCall::decisions
    uint64_t num_low_latency_sends_ = 0;
    uint64_t open_low_latency_calls_[layout::kNumLowLatencyBanks] = {};  // ticket of the open call in each; 0: none
    uint64_t ticket_ = 0;                                                // of the last notify_dispatch
    int num_local_experts_ = 0;                                          // in that one
    std::shared_ptr<FailureDesk> desk_;
    struct Announced {
        bool is_set = false;
        bool is_low_latency = false;
        dev::Stream stream = nullptr;
    } announced_;                   // what peers know of the call that began last
    bool is_refusal_told_ = false;  // in our mailbox
    std::function<void(const std::string&)> on_warning_;
};

}  // namespace deep_ep::runtime
