#include "rail_sim/sim_engine.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "device/prim.h"
#include "device/simt/happens_before.h"

namespace deep_ep::rail::sim {

namespace hb = simt::hb;
using prim::Order;
using prim::Scope;

namespace {

constexpr double kForeverS = 1e8;

}

// Bookkeeping is done under Quiet: what kernels of all ranks do to it must order them in no way.
struct SimNetwork::Message {
    int from;
    Request request;
    std::vector<char> snapshot;                       // of the source, at the post
    std::vector<std::pair<uint32_t, uint32_t>> left;  // pieces: begin, end
    uint64_t posted = 0;                              // 1: released by the poster
    void* context = nullptr;  // of its own, so that a flag tells ThreadSanitizer of its own put only

    ~Message() { hb::destroy_context(context); }
};

SimNetwork::SimNetwork(const std::vector<simt::SimtDevice*>& devices, const SimOptions& options)
    : options_(options), random_(options.seed), odds_(1u << random_.below(4)), num_posted_(devices.size()) {
    for (size_t rank = 0; rank < devices.size(); ++rank)
        engines_.push_back(
            std::make_unique<SimEngine>(*this, *devices[rank], static_cast<int>(rank), options.window_bytes));
}

SimNetwork::~SimNetwork() = default;

char* SimNetwork::place(int rank, uint64_t offset) const {
    return static_cast<char*>(engines_[static_cast<size_t>(rank)]->window().host) + offset;
}

// The first is what run() throws: what others say afterwards, waiting in vain, matters less.
void SimNetwork::break_rule(const std::string& text) const {
    if (broken_rule_.empty()) broken_rule_ = text;
    throw Error(text);
}

bool SimNetwork::has_room(int rank) const {
    const hb::Quiet quiet;
    return num_posted_[static_cast<size_t>(rank)] < options_.max_posted;
}

void SimNetwork::check_places(int rank, const Request& request) const {
    const auto is_inside = [&](uint64_t offset, uint64_t bytes) {
        return offset % 8 == 0 && offset <= options_.window_bytes && bytes <= options_.window_bytes - offset;
    };
    if (request.peer < 0 || request.peer >= options_.num_ranks || request.peer == rank)
        break_rule(concat("sim: rank ", rank, " posts to rank ", request.peer, ", which is no peer"));
    if (!is_inside(request.flag, 8) || !is_inside(request.dst, request.bytes) || !is_inside(request.src, request.bytes))
        break_rule(concat("sim: rank ", rank, " posts ", request.bytes, " bytes from ", request.src, " to ",
                          request.dst, " with the word at ", request.flag, ", of a window of ", options_.window_bytes));
}

void SimNetwork::post(int rank, const Request& request) {
    Message* message = nullptr;
    {
        const hb::Quiet quiet;
        check_places(rank, request);
        const std::pair key{request.peer, request.flag};
        if (request.kind != Kind::kAdd && open_.count(key) != 0)
            break_rule(concat("sim: rank ", rank, " writes the flag at ", request.flag, " of rank ", request.peer,
                              " again, which has not confirmed the value before"));
        auto made = std::make_unique<Message>();
        made->from = rank;
        made->request = request;
        const char* source = place(rank, request.src);
        made->snapshot.assign(source, source + request.bytes);
        for (uint32_t begin = 0; begin < request.bytes;) {
            const uint32_t end = begin + 1 + static_cast<uint32_t>(random_.below(request.bytes - begin));
            made->left.emplace_back(begin, end);
            begin = end;
        }
        message = made.get();
        under_way_.push_back(std::move(made));
        if (request.kind != Kind::kAdd) open_[key] = nullptr;  // until it is stored
        ++num_posted_[static_cast<size_t>(rank)];
        engines_[static_cast<size_t>(rank)]->count(request);
    }
    // Pairs with: is_posted.
    prim::store<Order::kRelease, Scope::kSys>(&message->posted, uint64_t{1});
}

void SimNetwork::check_source(const Message& message) const {
    if (message.snapshot.empty()) return;
    if (std::memcmp(place(message.from, message.request.src), message.snapshot.data(), message.snapshot.size()) != 0)
        break_rule(concat("sim: rank ", message.from, " has changed what it put from ", message.request.src,
                          " to rank ", message.request.peer, ", which has not yet said that it has read it"));
}

void SimNetwork::confirm(int rank, uint64_t flag, uint64_t value) {
    const hb::Quiet quiet;
    const auto found = open_.find({rank, flag});
    if (found == open_.end()) return;  // a counter, or a second look
    if (found->second == nullptr)
        break_rule(concat("sim: rank ", rank, " confirms the value ", value, " of the flag at ", flag,
                          " while another is under way"));
    check_source(*found->second);
    open_.erase(found);
}

std::vector<const uint8_t*> SimNetwork::share_windows(const std::vector<int>& neighbours) {
    std::vector<const uint8_t*> windows;
    if (options_.shares_windows)
        for (const int rank : neighbours) windows.push_back(reinterpret_cast<const uint8_t*>(place(rank, 0)));
    return windows;
}

// In the window of whichever rank the word is.
void SimNetwork::confirm_at(int rank, const uint64_t* word, uint64_t value) {
    for (const auto& engine : engines_) {
        const auto offset = static_cast<uint64_t>(reinterpret_cast<const char*>(word) - place(engine->rank(), 0));
        if (offset < options_.window_bytes) return confirm(engine->rank(), offset, value);
    }
    break_rule(concat("sim: rank ", rank, " confirms a word that is in no window"));
}

bool SimNetwork::has_messages() const {
    const hb::Quiet quiet;
    return !under_way_.empty();
}

bool SimNetwork::draws_a_step() {
    const hb::Quiet quiet;
    return random_.below(odds_) == 0;
}

bool SimNetwork::is_posted(const Message& message) const {
    return prim::load<Order::kAcquire, Scope::kSys>(&message.posted) != 0;
}

// Any message, any of its pieces; its word when all pieces are there.
void SimNetwork::step() {
    std::unique_ptr<Message>* chosen = nullptr;
    {
        const hb::Quiet quiet;
        chosen = &under_way_[random_.below(under_way_.size())];
        if ((*chosen)->context == nullptr) (*chosen)->context = hb::create_context("sim message");
    }
    Message& message = **chosen;
    {
        const hb::As as(message.context);
        if (!is_posted(message)) return;
        if (!message.left.empty()) return carry_piece(message);
        carry_word(message);
    }
    const hb::Quiet quiet;
    --num_posted_[static_cast<size_t>(message.from)];
    std::unique_ptr<Message> owned = std::move(*chosen);
    std::erase(under_way_, nullptr);
    if (owned->request.kind != Kind::kAdd) open_[{owned->request.peer, owned->request.flag}] = std::move(owned);
}

void SimNetwork::carry_piece(Message& message) {
    std::pair<uint32_t, uint32_t> piece;
    {
        const hb::Quiet quiet;
        const size_t index = random_.below(message.left.size());
        piece = message.left[index];
        message.left.erase(message.left.begin() + static_cast<std::ptrdiff_t>(index));
        check_source(message);
    }
    std::memcpy(place(message.request.peer, message.request.dst) + piece.first,
                place(message.from, message.request.src) + piece.first, piece.second - piece.first);
}

void SimNetwork::carry_word(Message& message) {
    auto* word = reinterpret_cast<uint64_t*>(place(message.request.peer, message.request.flag));
    if (message.request.kind == Kind::kAdd) {
        prim::fetch_add<Order::kAcqRel, Scope::kSys>(word, message.request.value);
    } else {
        prim::store<Order::kRelease, Scope::kSys>(word, message.request.value);
    }
}

void SimNetwork::run(simt::Scheduler& scheduler, const std::function<void()>& body) {
    bool is_over = false;
    struct Ending {
        bool& is_over;
        ~Ending() { is_over = true; }
    };
    const auto run_body = [&] {
        const Ending ending{is_over};
        body();
    };
    try {
        scheduler.run_hosts({run_body, [&] { carry_messages(is_over); }});
    } catch (const Error&) {
        if (!broken_rule_.empty()) throw Error(broken_rule_);
        throw;
    }
}

// A visit that carries nothing is a delay. It counts as progress, so that nobody takes it for a deadlock.
void SimNetwork::carry_messages(const bool& is_over) {
    for (;;) {
        bool has_yielded = false;
        const auto has_work = [&] {
            const hb::Quiet quiet;
            return std::exchange(has_yielded, true) && (has_messages() || is_over);
        };
        engines_.front()->wait(has_work);
        if (!has_messages()) return;
        for (int i = 0; i < options_.steps && has_messages(); ++i)
            if (draws_a_step()) step();
    }
}

// ---------------------------------------------------------------------------------------------------------------

SimEngine::SimEngine(SimNetwork& network, simt::SimtDevice& device, int rank, size_t window_bytes)
    : network_(network), device_(device), rank_(rank) {
    const dev::HostMapped memory = device.allocate_host_mapped(window_bytes);
    window_ = {memory.host, memory.device, window_bytes};
}

SimEngine::~SimEngine() { device_.free_host_mapped({window_.host, window_.device}); }

Params SimEngine::params() const {
    const View view{const_cast<SimEngine*>(this), static_cast<char*>(window_.device)};
    return Params::of(view);
}

void SimEngine::set(int peer, uint64_t flag, uint64_t value) {
    network_.post(rank_, {Kind::kSet, peer, 0, 0, 0, flag, value});
}

void SimEngine::count(const Request& request) {
    Traffic& traffic = traffic_[request.peer];
    ++traffic.num_messages;
    traffic.num_bytes += request.bytes + request.told_bytes;
}

Traffic SimEngine::sent_to(int peer) const {
    const auto found = traffic_.find(peer);
    return found == traffic_.end() ? Traffic{} : found->second;
}

void SimEngine::wait(const std::function<bool()>& done) { static_cast<void>(device_.host_wait(done, kForeverS)); }

}  // namespace deep_ep::rail::sim
