#include "rail/host/host_engine.h"

#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>

#include "core/error.h"

namespace deep_ep::rail::host {

namespace {

constexpr int kCommandsATurn = 256;  // then the sockets have theirs
// Where kernels cannot wake the sender: how long it looks without a pause, and how long its naps are then.
constexpr int64_t kSpinNs = 50'000, kFirstNapUs = 50, kLongestNapUs = 200;
constexpr int64_t kFlushSliceUs = 1000;

int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Header make_header(const Command& command) {
    const auto kind = command.kind == Kind::kAdd ? MessageKind::kAdd : MessageKind::kPut;
    const uint32_t num_bytes = command.kind == Kind::kPut ? command.bytes : 0;
    return {kind, num_bytes, command.dst, command.flag, command.value};
}

}  // namespace

HostEngine::HostEngine(std::shared_ptr<dev::Device> device, const HostOptions& options)
    : device_(std::move(device)),
      options_(options),
      process_(getpid()),
      is_woken_by_kernels_(device_->kind() == dev::DeviceKind::kCpu),
      window_memory_(options.shares_window
                         ? OwnedHostMapped()
                         : OwnedHostMapped(device_, device_->allocate_host_mapped(options.window_bytes))),
      shared_memory_(options.shares_window ? dev::make_shareable(device_, options.window_bytes, dev::Placement::kHost)
                                           : dev::OwnedShareable()),
      window_(options.shares_window
                  ? Window{shared_memory_.get().address, shared_memory_.get().address, options.window_bytes}
                  : Window{window_memory_.get().host, window_memory_.get().device, options.window_bytes}),
      ring_(device_, options.ring_capacity),
      rendezvous_(options.rank, options.window_bytes, find_own_address(options.interface, options.reach)) {}

HostEngine::~HostEngine() {
    if (process_ == getpid()) {
        release(0);
        return;
    }
    // The threads are the parent's, and so is the memory: a lock of the device may be held by a thread that is not here.
    static_cast<void>(sender_.release());
    static_cast<void>(receiver_.release());
    static_cast<void>(new auto(std::move(ring_)));
    static_cast<void>(new auto(std::move(window_memory_)));
    static_cast<void>(new auto(std::move(shared_memory_)));
    static_cast<void>(new auto(std::move(mappings_)));
}

std::string HostEngine::name() const { return "host (TCP, " + rendezvous_.address().text() + ")"; }

void HostEngine::connect(const std::vector<std::string>& addresses, const std::vector<int>& peers) {
    const size_t border = rendezvous_.blob().size();
    std::vector<std::string> blobs;
    for (const std::string& address : addresses) {
        blobs.push_back(address.substr(0, border));
        window_handles_.push_back(address.substr(std::min(border, address.size())));
    }
    for (auto& [rank, peer] : rendezvous_.meet(blobs, peers, options_.timeout_s)) {
        tune(peer.socket, options_.timeout_s);
        connections_.try_emplace(rank, rank, std::move(peer.socket), peer.address, window_);
    }
    receiver_ = start_thread("deep_ep rail in", &HostEngine::run_receiver);
    sender_ = start_thread("deep_ep rail out", &HostEngine::run_sender);
}

// What a rank's receiver has stored is in memory of this machine: its flags tell everybody here the same.
std::vector<const uint8_t*> HostEngine::share_windows(const std::vector<int>& neighbours) {
    std::vector<const uint8_t*> windows;
    if (!options_.shares_window) return windows;
    for (const int rank : neighbours) {
        if (rank != options_.rank)
            mappings_.push_back(dev::open_mapping(device_, window_handles_.at(static_cast<size_t>(rank))));
        const void* window = rank == options_.rank ? window_.device : mappings_.back().get();
        windows.push_back(static_cast<const uint8_t*>(window));
    }
    return windows;
}

// Signals are for the threads that were there before.
std::unique_ptr<std::thread> HostEngine::start_thread(const char* name, void (HostEngine::*body)()) {
    sigset_t all, kept;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &kept);
    auto thread = std::make_unique<std::thread>([this, name, body] {
        prctl(PR_SET_NAME, name, 0, 0, 0);
        prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);  // nanoseconds: a nap is short
        try {
            (this->*body)();
        } catch (const std::exception& error) {
            note_failure(concat("rail: its thread '", name, "' has ended: ", error.what()));
        }
    });
    pthread_sigmask(SIG_SETMASK, &kept, nullptr);
    return thread;
}

Params HostEngine::params() const {
    RingView view = ring_.view();
    view.window = static_cast<char*>(window_.device);
    view.event = sender_event_.fd();
    return Params::of(view);
}

void HostEngine::set(int peer, uint64_t flag, uint64_t value) {
    Command command{};
    command.kind = Kind::kSet;
    command.peer = peer;
    command.flag = flag;
    command.value = value;
    {
        const std::lock_guard lock(mutex_);
        host_posts_.push_back(command);
    }
    sender_event_.signal();
}

void HostEngine::check() const {
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) throw TransportError(failure_);
}

void HostEngine::note_failure(const std::string& text) {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = text;
}

bool HostEngine::has_left(int peer) const {
    const auto found = connections_.find(peer);
    return found != connections_.end() && found->second.has_left();
}

Traffic HostEngine::sent_to(int peer) const {
    const auto found = connections_.find(peer);
    return found == connections_.end() ? Traffic{} : found->second.traffic();
}

void HostEngine::release(double timeout_s) {
    if (std::exchange(is_released_, true)) return;
    const double bounded_s = std::clamp(timeout_s, 0.0, 1e6);
    release_deadline_ns_.store(now_ns() + static_cast<int64_t>(bounded_s * 1e9), std::memory_order_release);
    sender_event_.signal();
    if (sender_ != nullptr) sender_->join();
    is_receiver_stopped_.store(true, std::memory_order_release);
    receiver_event_.signal();
    if (receiver_ != nullptr) receiver_->join();
    connections_.clear();
    mappings_.clear();
    window_ = {};
    window_memory_.reset();
}

// ---------------------------------------------------------------------------------------------------------------
// The sender: from the ring to queues, from queues to sockets
// ---------------------------------------------------------------------------------------------------------------

void HostEngine::run_sender() {
    for (;;) {
        bool has_worked = take_commands();
        has_worked |= take_host_posts();
        has_worked |= send_all();
        if (has_worked) {
            busy_until_ns_ = now_ns() + kSpinNs;
            nap_us_ = 0;
            continue;
        }
        const int64_t deadline_ns = release_deadline_ns_.load(std::memory_order_acquire);
        if (deadline_ns == kNever) {
            sleep_until_work();
        } else if (held_ && now_ns() < deadline_ns) {
            wait_for_sockets(kFlushSliceUs);
        } else {
            break;
        }
    }
    say_farewell();
}

bool HostEngine::take_commands() {
    if (held_ && !queue_held()) return false;
    int num_taken = 0;
    Command command;
    while (num_taken < kCommandsATurn && !held_ && ring_.take(command)) {
        queue_command(command);
        ++num_taken;
    }
    if (num_taken > 0) ring_.tell_taken();
    return num_taken > 0;
}

bool HostEngine::take_host_posts() {
    std::vector<Command> posts;
    {
        const std::lock_guard lock(mutex_);
        posts.swap(host_posts_);
    }
    for (const Command& post : posts) {
        const auto found = connections_.find(post.peer);
        if (found != connections_.end()) found->second.queue(make_header(post), nullptr);
    }
    return !posts.empty();
}

// The peer that the held command is for may have taken something by now.
bool HostEngine::queue_held() {
    const Command command = *std::exchange(held_, std::nullopt);
    queue_command(command);
    return !held_;
}

void HostEngine::queue_command(const Command& command) {
    const auto found = connections_.find(command.peer);
    if (found == connections_.end())
        return note_failure(concat("rail: a kernel posts to rank ", command.peer, ", which is no peer of this rank"));
    const Header header = make_header(command);
    if (command.src > window_.bytes || header.num_bytes > window_.bytes - command.src)
        return note_failure(concat("rail: a kernel sends ", header.num_bytes, " bytes at ", command.src,
                                   " of a window of ", window_.bytes));
    Connection& connection = found->second;
    if (connection.num_queued() >= options_.max_queued) {
        held_ = command;
        return;
    }
    connection.queue(header, static_cast<const char*>(window_.host) + command.src);
}

bool HostEngine::send_all() {
    bool goes_on = false;
    for (auto& [peer, connection] : connections_)
        if (connection.num_queued() > 0) goes_on |= connection.send() == Flow::kGoesOn;
    return goes_on;
}

void HostEngine::sleep_until_work() {
    if (held_) return wait_for_sockets(-1);  // the ring does not matter until a peer takes something
    if (is_woken_by_kernels_) {
        ring_.fall_asleep();
        if (!ring_.has_command()) wait_for_sockets(-1);
        ring_.wake_up();
        return;
    }
    if (now_ns() >= busy_until_ns_) nap_us_ = std::clamp(2 * nap_us_, kFirstNapUs, kLongestNapUs);
    wait_for_sockets(nap_us_);
}

// Until somebody signals, a peer takes more of what is queued for it, or the time is over (negative: never).
void HostEngine::wait_for_sockets(int64_t timeout_us) {
    std::vector<pollfd> polled{{sender_event_.fd(), POLLIN, 0}};
    for (const auto& [peer, connection] : connections_)
        if (connection.num_queued() > 0) polled.push_back({connection.fd(), POLLOUT, 0});
    const timespec timeout{timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
    const int num_ready = ppoll(polled.data(), polled.size(), timeout_us < 0 ? nullptr : &timeout, nullptr);
    if (num_ready > 0 && polled[0].revents != 0) sender_event_.clear();
}

// Behind whatever is queued.
void HostEngine::say_farewell() {
    for (auto& [peer, connection] : connections_) {
        connection.queue({MessageKind::kFarewell, 0, 0, 0, 0}, nullptr);
        static_cast<void>(connection.send());
    }
    // What is not acknowledged when the socket is closed may be lost.
    const int64_t deadline_ns = release_deadline_ns_.load(std::memory_order_acquire);
    const auto is_settled = [](const auto& entry) { return entry.second.has_ended() || entry.second.is_drained(); };
    while (now_ns() < deadline_ns && !std::all_of(connections_.begin(), connections_.end(), is_settled)) {
        std::this_thread::sleep_for(std::chrono::microseconds(kFlushSliceUs));
        static_cast<void>(send_all());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The receiver: from sockets into the window
// ---------------------------------------------------------------------------------------------------------------

void HostEngine::run_receiver() {
    const Descriptor epoll(epoll_create1(EPOLL_CLOEXEC));
    const auto watch = [&](int fd, Connection* connection) {
        epoll_event event{};
        event.events = EPOLLIN;
        event.data.ptr = connection;
        if (!epoll || epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &event) != 0)
            throw TransportError(concat("epoll: ", std::strerror(errno), " (errno ", errno, ")"));
    };
    watch(receiver_event_.fd(), nullptr);
    for (auto& [peer, connection] : connections_) watch(connection.fd(), &connection);
    while (!is_receiver_stopped_.load(std::memory_order_acquire)) {
        epoll_event events[16];
        const int num_ready = epoll_wait(epoll.get(), events, 16, -1);
        for (int i = 0; i < num_ready; ++i) {
            auto* connection = static_cast<Connection*>(events[i].data.ptr);
            if (connection == nullptr || connection->receive() != Flow::kEnded) continue;
            epoll_ctl(epoll.get(), EPOLL_CTL_DEL, connection->fd(), nullptr);
            if (const std::string failure = connection->failure(); !failure.empty()) note_failure(failure);
        }
    }
}

}  // namespace deep_ep::rail::host
