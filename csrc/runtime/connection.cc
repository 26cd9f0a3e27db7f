#include "runtime/connection.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <utility>

#include "core/error.h"
#include "core/host_word.h"
#include "core/interruption.h"
#include "runtime/watcher.h"

namespace deep_ep::runtime {

namespace {

uint64_t to_ns(double s) { return static_cast<uint64_t>(s * 1e9); }

const BufferOptions& checked(const BufferOptions& options) {
    const layout::Topology topology = options.topology();
    EP_CHECK(options.num_ranks > 0, "num_ranks must be positive, got ", options.num_ranks);
    EP_CHECK(topology.ranks_per_node <= layout::kMaxRanks, "a node can have at most ", layout::kMaxRanks,
             " ranks, got ", topology.ranks_per_node);
    EP_CHECK(topology.num_nodes() <= layout::kMaxNodes, "a group can span at most ", layout::kMaxNodes, " nodes, got ",
             topology.num_nodes());
    EP_CHECK(options.num_ranks % topology.ranks_per_node == 0, "ranks_per_node must divide num_ranks (",
             options.num_ranks, "), got ", topology.ranks_per_node);
    EP_CHECK(options.rank >= 0 && options.rank < options.num_ranks, "rank must be in [0, ", options.num_ranks,
             "), got ", options.rank);
    EP_CHECK(options.num_rail_bytes >= 0 && options.num_rail_bytes % 128 == 0,
             "num_rail_bytes must be a multiple of 128, got ", options.num_rail_bytes);
    EP_CHECK(options.num_data_bytes >= 0 && options.num_data_bytes % 128 == 0,
             "num_data_bytes must be a multiple of 128, got ", options.num_data_bytes);
    EP_CHECK(options.num_low_latency_bytes >= 0 && options.num_low_latency_bytes % 128 == 0,
             "num_low_latency_bytes must be a multiple of 128, got ", options.num_low_latency_bytes);
    EP_CHECK(
        options.num_lend_bytes == kLendPartOfData || (options.num_lend_bytes >= 0 && options.num_lend_bytes % 128 == 0),
        "num_lend_bytes must be a multiple of 128, got ", options.num_lend_bytes);
    EP_CHECK(options.timeout_s > 0, "timeout_s must be positive, got ", options.timeout_s);
    return options;
}

bool is_captured(dev::Device& device, dev::Stream stream) noexcept {
    try {
        return device.stream_kind(stream) == dev::StreamKind::kCaptured;
    } catch (...) {
        return false;  // the device is out of order: that captures nothing
    }
}

}  // namespace

Connection::Connection(std::shared_ptr<dev::Device> device, const BufferOptions& options)
    : device_(std::move(device)),
      options_(checked(options)),
      topology_(options.topology()),
      plan_(plan_heap(options)),
      rail_region_(plan_rail(options)),
      machine_(Machine::of(*device_, options.num_ranks, options_.heap)),
      mailbox_(std::make_shared<comm::Mailbox>(topology_.index(), topology_.ranks_per_node)),
      heap_(std::make_unique<comm::SymmetricHeap>(device_, mailbox_, topology_.ranks_per_node, plan_.num_bytes,
                                                  options_.heap)),
      engine_(make_engine()),
      status_(device_),
      local_(device_, 1),
      wait_cells_(device_, static_cast<size_t>(layout::num_wait_cells(options.num_ranks))),
      desk_(std::make_shared<FailureDesk>(
          device_, mailbox_,
          Surroundings{topology_, heap_.get(), plan_.control, status_.host(), engine_.get(), rail_region_.control,
                       rail_region_.low_latency_control, rail_region_.has_low_latency() && options.is_shrinkable})) {
    layout::WaitCell* const cells = wait_cells_.get();
    const uint64_t warn_ns = to_ns(options.warn_s);
    device_->copy_now(&local_.get()->wait_cells, &cells, sizeof(cells));
    device_->copy_now(&local_.get()->warn_ns, &warn_ns, sizeof(warn_ns));
}

std::unique_ptr<rail::Engine> Connection::make_engine() const {
    if (topology_.num_nodes() == 1) return nullptr;
    return options_.make_engine(device_, {options_.rail, options_.rank, static_cast<size_t>(rail_region_.num_bytes()),
                                          options_.timeout_s, may_share_windows()});
}

// A rank that is left out of calls, and does not know it, still reads what it was sent: with a copy for each rank that is its own.
bool Connection::may_share_windows() const {
    return rail_region_.has_low_latency() && topology_.ranks_per_node > 1 && !options_.is_shrinkable;
}

void Connection::share_windows() {
    std::vector<int> neighbours;
    for (int index = 0; index < topology_.ranks_per_node; ++index) neighbours.push_back(topology_.neighbour(index));
    const std::vector<const uint8_t*> windows = engine_->share_windows(neighbours);
    if (windows.empty()) return;
    node_windows_ = {device_, windows.size()};
    device_->copy_now(node_windows_.get(), windows.data(), windows.size() * sizeof(windows[0]));
}

std::string Connection::export_handle() const { return comm::join_handles(*mailbox_, *heap_); }

void Connection::connect(const std::vector<std::string>& handles) {
    require_usable();
    EP_ENSURE(handles.size() == static_cast<size_t>(options_.num_ranks), "handles: expected one for each of ",
              options_.num_ranks, " ranks, got ", handles.size());
    const auto first = handles.begin() + topology_.neighbour(0);
    comm::connect({first, first + topology_.ranks_per_node}, *mailbox_, *heap_);
}

std::string Connection::rail_address() const { return engine_ == nullptr ? "" : engine_->address(); }

void Connection::connect_rail(const std::vector<std::string>& addresses) {
    require_usable();
    if (engine_ == nullptr) return;
    // Low latency goes straight to any rank; see docs/protocols/low_latency_nodes.md.
    std::vector<int> peers;
    for (int rank = 0; rank < topology_.num_ranks; ++rank)
        if (!topology_.is_neighbour(rank) &&
            (rail_region_.has_low_latency() || topology_.index_of(rank) == topology_.index()))
            peers.push_back(rank);
    engine_->connect(addresses, peers);
    if (may_share_windows()) share_windows();
}

uint8_t* Connection::data() const {
    require_usable();
    return local(plan_.control.bytes);
}

kernels::HeapParams Connection::heap_params() const {
    EP_ENSURE(heap_->is_connected(), "this Buffer is not connected to its peers");
    kernels::HeapParams params{.bases = {},
                               .rank = topology_.index(),
                               .num_ranks = topology_.ranks_per_node,
                               .control = plan_.control,
                               .first_rank = topology_.neighbour(0),
                               .num_nodes = topology_.num_nodes()};
    for (int index = 0; index < topology_.ranks_per_node; ++index) params.bases[index] = heap_->base(index);
    return params;
}

kernels::WatchParams Connection::watch_params() const {
    return {local_.get(), status_.device(), to_ns(options_.timeout_s), layout::kLateNs};
}

Waits Connection::read_waits() const {
    if (heap_ == nullptr) throw Error("this Buffer has been destroyed");
    Waits waits{.cells = std::vector<layout::WaitCell>(static_cast<size_t>(layout::num_wait_cells(options_.num_ranks))),
                .num_calls = 0,
                .num_low_latency_calls = 0};
    device_->copy_now(waits.cells.data(), wait_cells_.get(), waits.cells.size() * sizeof(layout::WaitCell));
    device_->copy_now(&waits.num_calls, &local_.get()->num_calls, sizeof(uint64_t));
    device_->copy_now(&waits.num_low_latency_calls, &local_.get()->num_low_latency_sends, sizeof(uint64_t));
    return waits;
}

void Connection::require_usable() const {
    if (heap_ == nullptr) throw Error("this Buffer has been destroyed");
    desk_->check();
}

void Connection::collect_warning() {
    if (load_acquire(status_->warning.state) == 0) return;
    const std::string text = desk_->describe_warning(status_->warning);
    std::atomic_ref(status_->warning.state).store(0);
    if (on_warning_) on_warning_(text);
}

void Connection::check() {
    require_usable();
    collect_warning();
}

void Connection::begin_call() {
    check();
    announced_ = {};
}

void Connection::announce(dev::Stream stream, bool is_low_latency) {
    announced_ = {.is_set = true, .is_low_latency = is_low_latency, .stream = stream};
    if (std::exchange(is_refusal_told_, false)) mailbox_->withdraw_refusal();
}

void Connection::abandon_call(const std::string& text) {
    if (heap_ == nullptr || desk_->has_failed()) return;
    if (announced_.is_set && !is_captured(*device_, announced_.stream)) {
        fail_unfinished(text, announced_.is_low_latency);
        return;
    }
    is_refusal_told_ = true;
    mailbox_->note_refusal(text);
}

// Peers that may leave this rank out of low-latency calls do so, and go on.
void Connection::fail_unfinished(const std::string& text, bool is_low_latency) {
    desk_->fail(
        FailureClass::kOther,
        concat("DeepEP error: rank ", options_.rank, ": a call that the peers know of was not finished: ", text),
        is_low_latency && options_.is_shrinkable ? Spread::kNobody : Spread::kPeers);
}

void Connection::start_watching() { watch(desk_); }

bool Connection::wait_until(const std::function<bool()>& is_done, double limit_s) {
    InterruptionPoll interruption;
    const bool has_ended = device_->host_wait(
        [&] {
            collect_warning();
            interruption.poll();
            return is_done() || load_acquire(status_->failure.state) != 0 || desk_->has_failed();
        },
        limit_s);
    check();
    return has_ended;
}

void Connection::destroy(double timeout_s) noexcept {
    if (heap_ == nullptr) return;
    using Clock = std::chrono::steady_clock;
    const auto deadline = Clock::now() + std::chrono::duration<double>(std::clamp(timeout_s, 0.0, 1e6));
    const auto left_s = [&] { return std::max(0.0, std::chrono::duration<double>(deadline - Clock::now()).count()); };
    desk_->close();
    // What our engine receives may be for a neighbour that has not done with its calls.
    const bool is_window_shared = node_windows() != nullptr;
    if (is_window_shared && !desk_->has_failed()) heap_->part(timeout_s);
    if (engine_ != nullptr) engine_->release(is_window_shared ? left_s() : timeout_s);
    std::shared_ptr<rail::Engine> engine = std::move(engine_);
    if (!is_window_shared) engine.reset();
    heap_->release(left_s(), std::move(engine));
    heap_.reset();
    node_windows_.reset();
    mailbox_.reset();
    local_.reset();
    wait_cells_.reset();
    status_.reset();
}

}  // namespace deep_ep::runtime
