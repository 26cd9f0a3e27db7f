#include "runtime/connection.h"

#include <atomic>
#include <utility>

#include "core/error.h"
#include "core/host_word.h"
#include "core/interruption.h"
#include "runtime/failure_report.h"
#include "runtime/watcher.h"

namespace deep_ep::runtime {

namespace {

uint64_t to_ns(double s) { return static_cast<uint64_t>(s * 1e9); }

const BufferOptions& checked(const BufferOptions& options) {
    EP_CHECK(options.num_ranks > 0 && options.num_ranks <= layout::kMaxRanks, "num_ranks must be in [1, ",
             layout::kMaxRanks, "], got ", options.num_ranks);
    EP_CHECK(options.rank >= 0 && options.rank < options.num_ranks, "rank must be in [0, ", options.num_ranks,
             "), got ", options.rank);
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
      plan_(plan_heap(options)),
      machine_(Machine::of(*device_, options.num_ranks)),
      mailbox_(std::make_shared<comm::Mailbox>(options.rank, options.num_ranks)),
      heap_(std::make_unique<comm::SymmetricHeap>(device_, mailbox_, options.num_ranks, plan_.num_bytes)),
      status_(device_),
      local_(device_, 1),
      desk_(
          std::make_shared<FailureDesk>(device_, mailbox_, *heap_, plan_.control, status_.host(), options.num_ranks)) {}

std::string Connection::export_handle() const { return comm::join_handles(*mailbox_, *heap_); }

void Connection::connect(const std::vector<std::string>& handles) {
    require_usable();
    comm::connect(handles, *mailbox_, *heap_);
}

kernels::HeapParams Connection::heap_params() const {
    EP_ENSURE(heap_->is_connected(), "this Buffer is not connected to its peers");
    kernels::HeapParams params{.bases = {},
                               .rank = options_.rank,
                               .num_ranks = options_.num_ranks,
                               .control = plan_.control,
                               .first_rank = 0,
                               .num_nodes = 1};
    for (int peer = 0; peer < options_.num_ranks; ++peer) params.bases[peer] = heap_->base(peer);
    return params;
}

kernels::WatchParams Connection::watch_params() const {
    return {local_.get(), status_.device(), to_ns(options_.timeout_s), to_ns(options_.warn_s)};
}

void Connection::require_usable() const {
    if (heap_ == nullptr) throw Error("this Buffer has been destroyed");
    desk_->check();
}

void Connection::collect_warning() {
    if (load_acquire(status_->warning.state) == 0) return;
    const Peers peers{.remark = [this](int peer) { return desk_->remark(peer); }, .reason = nullptr};
    const std::string text =
        describe_warning(status_->warning, options_.rank,
                         read_started(*device_, *heap_, plan_.control, status_->warning.operation), peers);
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
    desk_->close();
    heap_->release(timeout_s);
    heap_.reset();
    mailbox_.reset();
    local_.reset();
    status_.reset();
}

}  // namespace deep_ep::runtime
