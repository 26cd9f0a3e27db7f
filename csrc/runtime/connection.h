// What one rank has of its group: the symmetric heap and the mailbox of its node, the rail to other nodes, what it knows of
// failures, and what the peers know of the call that runs. Every mode launches through one; a Buffer is one with its modes.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "comm/mailbox.h"
#include "comm/symmetric_heap.h"
#include "device/owned.h"
#include "kernels/params.h"
#include "layout/topology.h"
#include "rail/engine.h"
#include "runtime/failure.h"
#include "runtime/plan.h"

namespace deep_ep::runtime {

// What read_waits() finds.
struct Waits {
    std::vector<layout::WaitCell> cells;
    uint64_t num_calls;
    uint64_t num_low_latency_calls;
};

// Not thread-safe but for fail_unfinished() and look().
class Connection {
public:
    Connection(std::shared_ptr<dev::Device> device, const BufferOptions& options);

    std::string export_handle() const;
    // By rank of the whole group; those of other nodes are not looked at.
    void connect(const std::vector<std::string>& handles);
    // The same for the rail: an address, or nothing within a node; and, once all have the addresses, together with the rail
    // peers.
    std::string rail_address() const;
    std::string rail_name() const { return engine_ == nullptr ? "" : engine_->name(); }
    void connect_rail(const std::vector<std::string>& addresses);
    // Idempotent and bounded: what was posted to the rail is sent, and memory that peers still map after `timeout_s` is kept
    // until they let go.
    void destroy(double timeout_s) noexcept;
    bool is_open() const { return heap_ != nullptr; }

    const std::shared_ptr<dev::Device>& device() const { return device_; }
    const BufferOptions& options() const { return options_; }
    const layout::Topology& topology() const { return topology_; }
    const HeapPlan& plan() const { return plan_; }
    const RailRegion& rail_region() const { return rail_region_; }
    const rail::Engine& engine() const { return *engine_; }  // where there are several nodes
    // [ranks_per_node], on the device: the rail windows of this node, where a row of a low-latency dispatch crosses once for each node;
    // null where it crosses for each rank. The same choice on every rank.
    const uint8_t* const* node_windows() const { return node_windows_.get(); }
    const Machine& machine() const { return machine_; }
    const comm::SymmetricHeap& heap() const { return *heap_; }
    uint8_t* local(uint64_t offset) const { return heap_->local() + offset; }
    uint8_t* data() const;  // of the high-throughput mode
    kernels::HeapParams heap_params() const;
    kernels::WatchParams watch_params() const;

    // Throws a failure that is known (what a kernel has reported, or a peer noted: the same at every later operation), or says
    // that this was destroyed.
    void require_usable() const;
    // The same, and passes a warning on.
    void check();
    // Before each call, which may be more than one of the operations: check(), and what abandon_call() refers to.
    void begin_call();
    // From here on peers know, or will know, of the call that runs. (One that is captured into a graph is none yet.)
    void announce(dev::Stream stream, bool is_low_latency);
    // Through an entry of the table of kernels, on the device of this rank, whichever is current in the calling thread.
    template <class Params>
    void launch(void (*entry)(const Params&, dev::Stream), const std::type_identity_t<Params>& params,
                dev::Stream stream) const {
        const dev::CurrentDevice current(*device_);
        entry(params, stream);
    }
    // The host gave up within a call, for the reason `text`. If peers know of the call it fails this Buffer and stops them;
    // else the Buffer stays as it was, and a peer that waits in vain quotes the reason.
    void abandon_call(const std::string& text);
    void fail_unfinished(const std::string& text, bool is_low_latency);
    void fail(FailureClass kind, const std::string& text, Spread spread) { desk_->fail(kind, text, spread); }
    // The sentence that check() would throw, as far as somebody has looked; or nothing.
    std::string failure() const { return desk_->failure(); }
    // Of layout::wait_cell: kernels add to them as long as this is open.
    layout::WaitCell* wait_cells() const { return wait_cells_.get(); }
    // Waits for no kernel.
    Waits read_waits() const;
    std::string look() { return desk_->look(); }
    // Lets the watcher of this process look at this Buffer, until destroy().
    void start_watching();
    // Called with a sentence, by whoever calls this Buffer, as soon as a wait has passed the warning threshold.
    void set_warning_handler(std::function<void(const std::string&)> handler) { on_warning_ = std::move(handler); }

    // The host waits until `is_done`; throws a failure. False: `limit_s` is over.
    bool wait_until(const std::function<bool()>& is_done, double limit_s);

private:
    std::unique_ptr<rail::Engine> make_engine() const;
    bool may_share_windows() const;
    void share_windows();
    void collect_warning();

    std::shared_ptr<dev::Device> device_;
    const BufferOptions options_;
    const layout::Topology topology_;
    const HeapPlan plan_;
    const RailRegion rail_region_;
    const Machine machine_;
    std::shared_ptr<comm::Mailbox> mailbox_;
    std::unique_ptr<comm::SymmetricHeap> heap_;
    std::unique_ptr<rail::Engine> engine_;
    dev::DeviceArray<const uint8_t*> node_windows_;
    dev::HostMappedObject<layout::HostStatus> status_;
    dev::DeviceArray<layout::LocalState> local_;
    dev::DeviceArray<layout::WaitCell> wait_cells_;
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
