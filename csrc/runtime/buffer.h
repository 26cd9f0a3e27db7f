// A Buffer: what one rank has of its group, and the modes that work on it. Owns no stream.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/connection.h"
#include "runtime/high_throughput.h"
#include "runtime/low_latency.h"

namespace deep_ep::runtime {

// Not thread-safe. All operations of one Buffer go to one stream (or are ordered by the caller as if they did), and
// every rank makes the same sequence of them.
class Buffer {
public:
    Buffer(std::shared_ptr<dev::Device> device, const BufferOptions& options);
    ~Buffer() { destroy(0.0); }

    std::string export_handle() const { return connection_.export_handle(); }
    void connect(const std::vector<std::string>& handles) { connection_.connect(handles); }
    std::string rail_address() const { return connection_.rail_address(); }
    void connect_rail(const std::vector<std::string>& addresses) { connection_.connect_rail(addresses); }
    // Of data in the rail window, 0 within a node; and the engine that carries it, or nothing.
    int64_t num_rail_bytes() const { return static_cast<int64_t>(connection_.rail_region().num_data_bytes); }
    std::string rail_name() const { return connection_.rail_name(); }
    uint8_t* data() const;
    int64_t num_data_bytes() const { return connection_.options().num_data_bytes; }

    void get_dispatch_layout(const LayoutArgs& args, dev::Stream stream) {
        high_throughput_.get_dispatch_layout(args, stream);
    }
    // After the count exchange of a dispatch.
    RecvCounts wait_counts() { return high_throughput_.wait_counts(); }
    // Where the group is one node; they throw InternalError where it is not, and internode() where it is.
    void notify_dispatch(const NotifyArgs& args, dev::Stream stream) {
        high_throughput_.intranode().notify_dispatch(args, stream);
    }
    void dispatch(const DispatchArgs& args, int num_sms, dev::Stream stream) {
        high_throughput_.intranode().dispatch(args, num_sms, stream);
    }
    void combine(const CombineArgs& args, int num_sms, dev::Stream stream) {
        high_throughput_.intranode().combine(args, num_sms, stream);
    }
    Internode& internode() { return high_throughput_.internode(); }

    // Memory for outputs of dispatch and inputs of combine that peers reach in place, for later work on `stream`: a piece of
    // each size, or none where there is no room for all. See Lender for what callers have to see to. Where `stream` is
    // captured, the graph owns the memory.
    std::vector<std::unique_ptr<LentMemory>> lend(const std::vector<int64_t>& sizes, dev::Stream stream,
                                                  bool is_captured) {
        return high_throughput_.loans().lend(sizes, stream, is_captured);
    }
    // One piece, or null; for work in the order of calls.
    std::unique_ptr<LentMemory> lend(int64_t num_bytes);
    int64_t num_lend_bytes() { return high_throughput_.loans().num_bytes(); }
    void note_stream(dev::Stream stream, bool is_ours) { high_throughput_.loans().note_stream(stream, is_ours); }

    LowLatency& low_latency() { return low_latency_; }

    // Throws what a kernel has reported, or a peer noted; a Buffer that failed once throws the same at every later
    // operation.
    void check() { connection_.check(); }
    // The sentence that check() would throw, as far as somebody has looked; or nothing.
    std::string failure() const { return connection_.failure(); }
    // Before each call, which may be more than one of the operations: check(), and what abandon_call() refers to.
    void begin_call() { connection_.begin_call(); }
    // The host gave up within a call, for the reason `text`. If peers know of the call it fails this Buffer and stops them;
    // else the Buffer stays as it was, and a peer that waits in vain quotes the reason.
    void abandon_call(const std::string& text) { connection_.abandon_call(text); }
    // Lets the watcher of this process look at this Buffer, until destroy().
    void start_watching() { connection_.start_watching(); }
    std::string look_for_failures() { return connection_.look(); }
    // How often each peer was late, see layout::wait_cell; device memory, this Buffer's.
    layout::WaitCell* wait_cells() const { return connection_.wait_cells(); }
    Waits read_waits() const { return connection_.read_waits(); }
    // Called with a sentence, by whoever calls this Buffer, as soon as a wait has passed the warning threshold.
    void set_warning_handler(std::function<void(const std::string&)> handler) {
        connection_.set_warning_handler(std::move(handler));
    }

    // Idempotent and bounded: memory that peers still map after `timeout_s` is kept until they let go. Never throws.
    void destroy(double timeout_s) noexcept;

private:
    const kernels::KernelTable& kernels_;
    Connection connection_;
    HighThroughput high_throughput_;
    LowLatency low_latency_;
};

}  // namespace deep_ep::runtime
