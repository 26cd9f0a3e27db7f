#include "runtime/failure.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iomanip>
#include <sstream>
#include <string_view>
#include <thread>

#include "core/error.h"
#include "core/host_word.h"
#include "core/text.h"

namespace deep_ep::runtime {

namespace {

// How long a rank that was told to give up waits for the reason, which the host of the other rank writes.
constexpr auto kReasonPatience = std::chrono::milliseconds(300);
constexpr size_t kMaxRailReason = sizeof(uint64_t) * (layout::kRailReasonWords - 1);
constexpr int kReasonLooks = 3;  // the same for the watcher, which must not sleep over one Buffer

bool is_set(const uint64_t& state) { return std::atomic_ref(const_cast<uint64_t&>(state)).load() != 0; }

[[noreturn]] void raise(const Failure& failure) {
    switch (failure.kind) {
        case FailureClass::kTimeout: throw TimeoutError(failure.text);
        case FailureClass::kInvalidArgument: throw InvalidArgument(failure.text);
        case FailureClass::kTransport: throw TransportError(failure.text);
        case FailureClass::kOther: break;
    }
    throw Error(failure.text);
}

FailureClass class_of(layout::FailureKind kind) {
    return kind == layout::FailureKind::kBadInput ? FailureClass::kInvalidArgument : FailureClass::kTimeout;
}

}  // namespace

FailureDesk::FailureDesk(std::shared_ptr<dev::Device> device, std::shared_ptr<comm::Mailbox> mailbox,
                         const Surroundings& surroundings)
    : device_(std::move(device)), mailbox_(std::move(mailbox)), at_(surroundings) {}

void FailureDesk::check() {
    if (!has_failed() && !is_set(at_.status->failure.state)) return;
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
    const uint64_t code = layout::make_abort_code(at_.topology.rank, at_.topology.rank);
    if (spread == Spread::kNobody) return write_abort(at_.topology.index(), code | layout::kLonelyAbort);
    mailbox_->note_abort(text);
    abort_neighbours(code);
    abort_rail_peers(code);
}

std::string FailureDesk::look() {
    const std::lock_guard lock(mutex_);
    if (is_closed_ || has_failed() || is_reason_due()) return "";
    collect();
    if (!has_failed()) collect_engine_failure();
    if (!has_failed()) collect_notes();
    if (!has_failed()) collect_rail_aborts();
    return failure_.text;
}

std::string FailureDesk::describe_warning(const layout::WaitRecord& record) const {
    Peers known = peers(record.operation);
    known.reason = known.stall = [](int) { return std::string(); };  // nobody has given up
    return runtime::describe_warning(record, known);
}

void FailureDesk::close() {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    device_.reset();  // or the watcher might be the last to hold it
    mailbox_.reset();
}

// What a kernel of this rank has reported. It has told the peers' kernels, unless it found bad input where no peer takes
// part; the reason is told here. So are hosts in other nodes, whose kernels may not run.
void FailureDesk::collect() {
    if (has_failed() || !is_set(at_.status->failure.state)) return;
    const layout::WaitRecord& record = at_.status->failure;
    adopt({class_of(record.kind), describe_failure(record, peers(record.operation))});
    const int rank = at_.topology.rank;
    const bool is_told = record.kind == layout::FailureKind::kAborted;
    const uint64_t code =
        is_told ? record.seen
                : layout::make_abort_code(rank, record.kind == layout::FailureKind::kTimeout ? record.peer : rank);
    abort_rail_peers(code);
    if (is_told && is_here(layout::abort_origin(code))) return;  // who gave up first has told
    mailbox_->note_abort(failure_.text);
    if (record.kind == layout::FailureKind::kBadInput) abort_neighbours(code);
}

// A kernel was told to give up by a rank whose host has not said why yet, but will at its watcher's next look.
bool FailureDesk::is_reason_due() {
    const layout::WaitRecord& record = at_.status->failure;
    if (!is_set(record.state) || record.kind != layout::FailureKind::kAborted) return false;
    const int origin = layout::abort_origin(record.seen);
    if (origin != layout::abort_missing(record.seen) || note_of(origin).has_value()) return false;
    return may_still_say(origin) && num_looks_for_reason_++ < kReasonLooks;
}

void FailureDesk::collect_engine_failure() {
    if (at_.engine == nullptr) return;
    try {
        at_.does_without_peers ? at_.engine->check_itself() : at_.engine->check();
        return;
    } catch (const TransportError& error) {
        adopt({FailureClass::kTransport, describe_transport(at_.topology, error.what())});
    }
    const uint64_t code = layout::make_abort_code(at_.topology.rank, at_.topology.rank);
    mailbox_->note_abort(failure_.text);
    abort_neighbours(code);
    abort_rail_peers(code);
}

void FailureDesk::collect_notes() {
    for (int index = 0; index < at_.topology.ranks_per_node; ++index) {
        if (index == at_.topology.index()) continue;
        const auto note = mailbox_->abort_note(index);
        if (!note.has_value()) continue;
        const int peer = at_.topology.neighbour(index);
        adopt({FailureClass::kTimeout, describe_note(at_.topology, peer, *note)});
        const uint64_t code = layout::make_abort_code(peer, peer);
        write_abort(at_.topology.index(), code);
        abort_rail_peers(code);
        return;
    }
}

// Kernels of this rank look at these words themselves; here for a rank that runs none.
void FailureDesk::collect_rail_aborts() {
    if (at_.engine == nullptr) return;
    for (int node = 0; node < at_.topology.num_nodes(); ++node) {
        const uint64_t code = abort_over_rail(node);
        if (code == 0) continue;
        adopt({FailureClass::kTimeout, describe_rail_abort(code, peers(layout::Operation::kDispatch))});
        mailbox_->note_abort(failure_.text);
        abort_neighbours(code);
        abort_rail_peers(code);
        return;
    }
}

// What the kernels or the host of the rail peer in that node have set.
uint64_t FailureDesk::abort_over_rail(int node) const {
    const auto word = [&](int who) {
        return rail_word(at_.rail.abort.at(static_cast<uint64_t>(who * at_.topology.num_nodes() + node)));
    };
    const uint64_t code = word(0);
    return code != 0 ? code : word(1);
}

void FailureDesk::adopt(Failure failure) {
    failure_ = std::move(failure);
    has_failed_.store(true, std::memory_order_release);
}

Peers FailureDesk::peers(layout::Operation operation) const {
    return {.topology = at_.topology,
            .progress = progress(operation),
            .remark = [this](int peer) { return remark(peer); },
            .reason = [this](int origin) { return reason_of(origin); },
            .stall = [this](int peer) { return stall_of(peer); }};
}

// How far the others are, by what they have written to this rank.
std::vector<Progress> FailureDesk::progress(layout::Operation operation) const {
    // The two modes count their calls apart, and cleaning is none of either.
    const layout::Field& field = operation == layout::Operation::kLowLatencyClean ? at_.control.low_latency.cleaned
                                 : layout::is_low_latency(operation)              ? at_.control.low_latency.started
                                                                                  : at_.control.started;
    std::vector<uint64_t> started(field.bytes() / sizeof(uint64_t));
    device_->copy_now(started.data(), at_.heap->local() + field.offset, field.bytes());
    std::vector<Progress> known;
    for (int peer = 0; peer < at_.topology.num_ranks; ++peer) {
        if (peer == at_.topology.rank) continue;
        if (is_here(peer))
            known.push_back({peer, started[static_cast<size_t>(index_of(peer))]});
        else if (layout::is_low_latency(operation))
            known.push_back({peer, far_progress(operation, peer)});
        else if (index_of(peer) == at_.topology.index())
            known.push_back({peer, rail_word(at_.rail.entered.at(static_cast<uint64_t>(at_.topology.node_of(peer))))});
    }
    return known;
}

// By what a rank of another node has put here: its tables come first in each call, unless it waits for its bank, and says so.
uint64_t FailureDesk::far_progress(layout::Operation operation, int peer) const {
    const layout::LowLatencyRailControl& words = at_.low_latency_rail;
    const auto idx = static_cast<uint64_t>(peer), num_ranks = static_cast<uint64_t>(at_.topology.num_ranks);
    if (operation == layout::Operation::kLowLatencyClean) return rail_word(words.cleaned.at(idx));
    uint64_t last = rail_word(words.entered.at(idx));
    for (uint64_t bank = 0; bank < layout::kNumLowLatencyBanks; ++bank)
        last = std::max(last, rail_word(words.table_full.at(bank * num_ranks + idx)));
    return last;
}

// Of a rank of another node its rail peer in this one hears the reason over the rail, and has it in its own note.
std::optional<std::string> FailureDesk::note_of(int origin) const {
    const bool is_rail_peer = !is_here(origin) && index_of(origin) == at_.topology.index();
    if (!is_rail_peer) return mailbox_->abort_note(index_of(origin));
    std::string text = rail_note(at_.topology.node_of(origin));
    return text.empty() ? std::nullopt : std::optional(std::move(text));
}

// Words come in any order: the text is there when all of them are.
std::string FailureDesk::rail_note(int node) const {
    const auto word = [&](uint64_t i) {
        return rail_word(at_.rail.reason.at(static_cast<uint64_t>(node) * layout::kRailReasonWords + i));
    };
    std::string text(std::min(word(0), kMaxRailReason), ' ');
    for (size_t begin = 0; begin < text.size(); begin += sizeof(uint64_t)) {
        const uint64_t letters = word(1 + begin / sizeof(uint64_t));
        if (letters == 0) return "";
        std::memcpy(text.data() + begin, &letters, std::min(sizeof(letters), text.size() - begin));
    }
    return text;
}

// Whoever would have it in its note is there.
bool FailureDesk::may_still_say(int origin) const {
    if (!is_here(origin) && index_of(origin) == at_.topology.index()) return !at_.engine->has_left(origin);
    return mailbox_->presence(index_of(origin)) == comm::Presence::kHere;
}

std::string FailureDesk::reason_of(int origin) const {
    const bool has_waited = num_looks_for_reason_ >= kReasonLooks;
    const auto deadline = std::chrono::steady_clock::now() + (has_waited ? kReasonPatience * 0 : kReasonPatience);
    for (;;) {
        if (auto note = note_of(origin)) return *note;
        if (!may_still_say(origin) || std::chrono::steady_clock::now() >= deadline) return "";
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

// Deadlines are the same everywhere, so a rank that stalls because of a third one gives up at the same time.
std::string FailureDesk::stall_of(int peer) const {
    if (at_.engine == nullptr) return "";  // this rank knows itself how far all others are
    if (is_here(peer)) return reason_of(peer);
    const auto deadline = std::chrono::steady_clock::now() + kReasonPatience;
    uint64_t code = 0;
    while ((code = abort_over_rail(at_.topology.node_of(peer))) == 0 && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return code == 0 ? "" : describe_abort_code(code, at_.topology);
}

// What a neighbour's mailbox says, or the engine of a rail peer.
std::string FailureDesk::remark(int peer) const {
    constexpr auto kLeft = "it has destroyed its Buffer";
    if (!is_here(peer)) return at_.engine->has_left(peer) ? kLeft : at_.engine->loss_of(peer);
    const comm::Presence presence = mailbox_->presence(index_of(peer));
    if (presence == comm::Presence::kGone) return "its process has ended";
    if (presence == comm::Presence::kLeft) return kLeft;
    if (const auto refusal = mailbox_->refusal(index_of(peer))) {
        std::ostringstream out;
        out << std::fixed << std::setprecision(1) << refusal->age_s << " s ago it refused a call: " << refusal->text;
        return out.str();
    }
    return "";
}

uint64_t FailureDesk::rail_word(uint64_t offset) const {
    const rail::Window window = at_.engine->window();
    if (window.host != nullptr)
        return load_acquire(*reinterpret_cast<uint64_t*>(static_cast<char*>(window.host) + offset));
    uint64_t word = 0;
    device_->copy_now(&word, static_cast<const char*>(window.device) + offset, sizeof(word));
    return word;
}

// A word of the heap, through a stream of its own: it arrives while kernels run.
void FailureDesk::write_abort(int index, uint64_t code) noexcept {
    if (!at_.heap->is_connected()) return;
    try {
        device_->copy_now(at_.heap->base(index) + at_.control.abort.offset, &code, sizeof(code));
    } catch (...) {
        // The device is out of order. The peers' watchers read the note.
    }
}

// And of this rank itself.
void FailureDesk::abort_neighbours(uint64_t code) noexcept {
    for (int index = 0; index < at_.topology.ranks_per_node; ++index) write_abort(index, code);
}

// Each rank has a word for each rail peer's host, and words for its reason, which that writes once at most.
void FailureDesk::abort_rail_peers(uint64_t code) noexcept {
    if (at_.engine == nullptr) return;
    const int num_nodes = at_.topology.num_nodes(), node = at_.topology.node();
    const uint64_t flag = at_.rail.abort.at(static_cast<uint64_t>(num_nodes + node));
    for (int other = 0; other < num_nodes; ++other) {
        if (other == node) continue;
        try {
            at_.engine->set(at_.topology.rail_peer(other), flag, code);
        } catch (...) {
            // No memory for it: neighbours and kernels tell as well.
        }
    }
    if (layout::abort_origin(code) == at_.topology.rank && layout::abort_missing(code) == at_.topology.rank)
        tell_reason();
}

// After all peers know of the failure. A zero byte would be no letter.
void FailureDesk::tell_reason() noexcept {
    const std::string_view text =
        whole_letters(std::string_view(failure_.text).substr(0, failure_.text.find('\0')), kMaxRailReason);
    const uint64_t first = static_cast<uint64_t>(at_.topology.node()) * layout::kRailReasonWords;
    for (int other = 0; other < at_.topology.num_nodes(); ++other) {
        if (other == at_.topology.node()) continue;
        const int peer = at_.topology.rail_peer(other);
        try {
            at_.engine->set(peer, at_.rail.reason.at(first), text.size());
            for (size_t begin = 0; begin < text.size(); begin += sizeof(uint64_t)) {
                uint64_t letters = 0;
                std::memcpy(&letters, text.data() + begin, std::min(sizeof(letters), text.size() - begin));
                at_.engine->set(peer, at_.rail.reason.at(first + 1 + begin / sizeof(uint64_t)), letters);
            }
        } catch (...) {
            // No memory for it: that this rank failed is told.
        }
    }
}

}  // namespace deep_ep::runtime
