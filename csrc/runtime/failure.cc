#include "runtime/failure.h"

#include <chrono>
#include <iomanip>
#include <sstream>
#include <thread>

#include "core/error.h"
#include "runtime/failure_report.h"

namespace deep_ep::runtime {

namespace {

// How long a rank that was told to give up waits for the reason, which the host of the other rank writes.
constexpr auto kReasonPatience = std::chrono::milliseconds(300);
constexpr int kReasonLooks = 3;  // the same for the watcher, which must not sleep over one Buffer

bool is_set(const uint64_t& state) { return std::atomic_ref(const_cast<uint64_t&>(state)).load() != 0; }

[[noreturn]] void raise(const Failure& failure) {
    switch (failure.kind) {
        case FailureClass::kTimeout: throw TimeoutError(failure.text);
        case FailureClass::kInvalidArgument: throw InvalidArgument(failure.text);
        case FailureClass::kOther: break;
    }
    throw Error(failure.text);
}

FailureClass class_of(layout::FailureKind kind) {
    return kind == layout::FailureKind::kBadInput ? FailureClass::kInvalidArgument : FailureClass::kTimeout;
}

}  // namespace

std::vector<uint64_t> read_started(dev::Device& device, const comm::SymmetricHeap& heap,
                                   const layout::ControlLayout& control, layout::Operation operation) {
    // The two modes count their calls apart, and cleaning is none of either.
    const bool is_low_latency =
        operation == layout::Operation::kLowLatencyDispatch || operation == layout::Operation::kLowLatencyCombine;
    const layout::Field& field = operation == layout::Operation::kLowLatencyClean ? control.low_latency.cleaned
                                 : is_low_latency                                 ? control.low_latency.started
                                                                                  : control.started;
    std::vector<uint64_t> started(field.bytes() / sizeof(uint64_t));
    device.copy_now(started.data(), heap.local() + field.offset, field.bytes());
    return started;
}

FailureDesk::FailureDesk(std::shared_ptr<dev::Device> device, std::shared_ptr<comm::Mailbox> mailbox,
                         const comm::SymmetricHeap& heap, const layout::ControlLayout& control,
                         const layout::HostStatus* status, int num_ranks)
    : device_(std::move(device)),
      mailbox_(std::move(mailbox)),
      heap_(&heap),
      control_(control),
      status_(status),
      rank_(mailbox_->rank()),
      num_ranks_(num_ranks) {}

void FailureDesk::check() {
    if (!has_failed() && !is_set(status_->failure.state)) return;
    const std::lock_guard lock(mutex_);
    collect();
    raise(failure_);
}

std::string FailureDesk::failure() {
    const std::lock_guard lock(mutex_);
    return failure_.text;
}

void FailureDesk::fail(FailureClass kind, const std::string& text, Spread spread) {
    const std::lock_guard lock(mutex_);
    if (is_closed_ || has_failed()) return;
    adopt({kind, text});
    if (spread == Spread::kPeers) mailbox_->note_abort(text);
    abort_everybody(spread);
}

std::string FailureDesk::look() {
    const std::lock_guard lock(mutex_);
    if (is_closed_ || has_failed() || is_reason_due()) return "";
    collect();
    if (!has_failed()) collect_notes();
    return failure_.text;
}

void FailureDesk::close() {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    device_.reset();  // or the watcher might be the last to hold it
    mailbox_.reset();
}

// What a kernel of this rank has reported. It has told the peers' kernels, unless it found bad input where no peer takes
// part; the reason is told here.
void FailureDesk::collect() {
    if (has_failed() || !is_set(status_->failure.state)) return;
    const layout::WaitRecord& record = status_->failure;
    const Peers peers{.remark = [this](int peer) { return remark(peer); },
                      .reason = [this](int origin) { return reason_of(origin); }};
    adopt({class_of(record.kind),
           describe_failure(record, rank_, read_started(*device_, *heap_, control_, record.operation), peers)});
    if (record.kind == layout::FailureKind::kAborted) return;  // who gave up first has told
    mailbox_->note_abort(failure_.text);
    if (record.kind == layout::FailureKind::kBadInput) abort_everybody(Spread::kPeers);
}

// A kernel was told to give up by a rank whose host has not said why yet, but will at its watcher's next look.
bool FailureDesk::is_reason_due() {
    const layout::WaitRecord& record = status_->failure;
    if (!is_set(record.state) || record.kind != layout::FailureKind::kAborted) return false;
    const int origin = layout::abort_origin(record.seen);
    if (origin != layout::abort_missing(record.seen) || mailbox_->abort_note(origin).has_value()) return false;
    return mailbox_->presence(origin) == comm::Presence::kHere && num_looks_for_reason_++ < kReasonLooks;
}

void FailureDesk::collect_notes() {
    for (int peer = 0; peer < num_ranks_; ++peer) {
        if (peer == rank_) continue;
        const auto note = mailbox_->abort_note(peer);
        if (!note.has_value()) continue;
        adopt({FailureClass::kTimeout, describe_note(rank_, peer, *note)});
        write_abort(rank_, layout::make_abort_code(peer, peer));
        return;
    }
}

void FailureDesk::adopt(Failure failure) {
    failure_ = std::move(failure);
    has_failed_.store(true, std::memory_order_release);
}

std::string FailureDesk::reason_of(int origin) const {
    const bool has_waited = num_looks_for_reason_ >= kReasonLooks;
    const auto deadline = std::chrono::steady_clock::now() + (has_waited ? kReasonPatience * 0 : kReasonPatience);
    for (;;) {
        if (auto note = mailbox_->abort_note(origin)) return *note;
        if (mailbox_->presence(origin) != comm::Presence::kHere || std::chrono::steady_clock::now() >= deadline)
            return "";
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

std::string FailureDesk::remark(int peer) const {
    const comm::Presence presence = mailbox_->presence(peer);
    if (presence == comm::Presence::kGone) return "its process has ended";
    if (presence == comm::Presence::kLeft) return "it has destroyed its Buffer";
    if (const auto refusal = mailbox_->refusal(peer)) {
        std::ostringstream out;
        out << std::fixed << std::setprecision(1) << refusal->age_s << " s ago it refused a call: " << refusal->text;
        return out.str();
    }
    return "";
}

// A word of the heap, through a stream of its own: it arrives while kernels run.
void FailureDesk::write_abort(int peer, uint64_t code) noexcept {
    try {
        device_->copy_now(heap_->base(peer) + control_.abort.offset, &code, sizeof(code));
    } catch (...) {
        // The device is out of order. The peers' watchers read the note.
    }
}

void FailureDesk::abort_everybody(Spread spread) noexcept {
    if (!heap_->is_connected()) return;
    for (int peer = 0; peer < num_ranks_; ++peer) {
        if (peer == rank_ || spread == Spread::kPeers) write_abort(peer, layout::make_abort_code(rank_, rank_));
    }
}

}  // namespace deep_ep::runtime
