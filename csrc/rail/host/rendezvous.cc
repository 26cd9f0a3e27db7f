#include "rail/host/rendezvous.h"

#include <poll.h>
#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <set>

#include "core/error.h"
#include "core/interruption.h"

namespace deep_ep::rail::host {

namespace {

using Clock = std::chrono::steady_clock;
using Token = std::array<unsigned char, 32>;

constexpr uint64_t kMagic = 0x3130'6c69'6172'5045;        // "EPrail01"; also tells a machine of the other byte order
constexpr auto kStrayPatience = std::chrono::seconds(5);  // for somebody who connects and says nothing
constexpr size_t kMaxVisitors = 256;                      // who have not said who they are

// What a rank tells the group.
struct Blob {
    uint64_t magic;
    uint64_t window_bytes;
    int32_t rank;
    uint32_t address_bytes;
    Token token;
    sockaddr_storage address;
};

// The first words on a connection, both ways.
struct Hello {
    uint64_t magic;
    int32_t from;
    int32_t to;
    Token token_of_from;
    Token token_of_to;
};

std::string describe(int error) { return concat(std::strerror(error), " (errno ", error, ")"); }

Token random_token() {
    Token token;
    if (getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size()))
        throw TransportError(concat("rail: getrandom: ", describe(errno)));
    return token;
}

std::string pack(const Blob& blob) { return {reinterpret_cast<const char*>(&blob), sizeof(blob)}; }

Blob unpack(const std::string& bytes, int rank) {
    Blob blob{};
    EP_CHECK(bytes.size() == sizeof(blob), "rail: the address of rank ", rank, " has ", bytes.size(),
             " bytes, expected ", sizeof(blob), ": is its deep_ep of another version?");
    std::memcpy(&blob, bytes.data(), sizeof(blob));
    EP_CHECK(blob.magic == kMagic && blob.rank == rank, "rail: what rank ", rank,
             " gave as its address is none, or that of another rank or version");
    return blob;
}

SocketAddress address_in(const Blob& blob) {
    return {reinterpret_cast<const sockaddr*>(&blob.address), static_cast<socklen_t>(blob.address_bytes)};
}

// One way of a handshake, whatever pieces it comes or goes in.
class Transfer {
public:
    // kLost: the other side is gone.
    enum class State { kUnderWay, kDone, kLost };

    State receive(int fd) {
        return advance([&](char* at, size_t left) { return recv(fd, at, left, MSG_DONTWAIT); });
    }
    State send(int fd) {
        return advance([&](char* at, size_t left) { return ::send(fd, at, left, MSG_DONTWAIT | MSG_NOSIGNAL); });
    }
    Hello hello{};

private:
    template <class Step> State advance(Step step) {
        while (done_ < sizeof(hello)) {
            const ssize_t count = step(reinterpret_cast<char*>(&hello) + done_, sizeof(hello) - done_);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return State::kUnderWay;
            if (count <= 0) return State::kLost;
            done_ += static_cast<size_t>(count);
        }
        return State::kDone;
    }

    size_t done_ = 0;
};

// A connection that is not a peer's yet.
struct Visitor {
    Descriptor socket;
    int rank = -1;  // whom we have called; -1: somebody who called us
    bool is_connected = false;
    Transfer out, in;
    Clock::time_point deadline;

    short events() const { return rank >= 0 && !has_sent ? POLLOUT : POLLIN; }
    bool has_sent = false;
};

class Meeting {
public:
    Meeting(int rank, const std::vector<Blob>& blobs, const std::vector<int>& peers, const Descriptor& listener)
        : rank_(rank), blobs_(blobs), wanted_(peers.begin(), peers.end()), listener_(listener) {}

    std::map<int, Peer> run(const SocketAddress& own, double timeout_s) {
        const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                 std::chrono::duration<double>(std::min(timeout_s, 1e6)));
        for (const int peer : wanted_)
            if (peer < rank_) call(peer, own);
        InterruptionPoll interruption;
        while (met_.size() < wanted_.size()) {
            if (Clock::now() >= deadline) throw TransportError(describe_missing(timeout_s));
            wait();
            interruption.poll();
            serve();
        }
        return std::move(met_);
    }

private:
    Hello make_hello(int to) const {
        return {kMagic, rank_, to, blobs_[static_cast<size_t>(rank_)].token, blobs_[static_cast<size_t>(to)].token};
    }

    void call(int peer, const SocketAddress& own) {
        const SocketAddress to = address_in(blobs_[static_cast<size_t>(peer)]);
        Visitor visitor;
        visitor.socket = begin_connect(own, to);
        visitor.rank = peer;
        visitor.out.hello = make_hello(peer);
        visitor.deadline = Clock::time_point::max();
        visitors_.push_back(std::move(visitor));
    }

    void wait() {
        std::vector<pollfd> polled{{listener_.get(), POLLIN, 0}};
        for (const Visitor& visitor : visitors_) polled.push_back({visitor.socket.get(), visitor.events(), 0});
        const int slice_ms = static_cast<int>(InterruptionPoll::kInterval.count());
        static_cast<void>(poll(polled.data(), polled.size(), slice_ms));
    }

    void serve() {
        accept_all();
        for (auto& visitor : visitors_)
            if (visitor.rank >= 0 ? serve_called(visitor) : serve_caller(visitor)) visitor.socket.close();
        std::erase_if(visitors_, [](const Visitor& visitor) { return !visitor.socket; });
    }

    void accept_all() {
        for (;;) {
            const int fd = accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd < 0) return;
            Visitor visitor;
            visitor.socket = Descriptor(fd);
            visitor.deadline = Clock::now() + kStrayPatience;
            if (visitors_.size() >= kMaxVisitors + wanted_.size()) continue;  // it may call again
            visitors_.push_back(std::move(visitor));
        }
    }

    // True: the visitor is to be forgotten (or has become a peer).
    bool serve_called(Visitor& visitor) {
        const int peer = visitor.rank;
        if (!visitor.is_connected && !has_connected(visitor)) return false;
        if (!visitor.has_sent) {
            const auto state = visitor.out.send(visitor.socket.get());
            if (state == Transfer::State::kLost) fail_call(peer, "it closed the connection at once");
            visitor.has_sent = state == Transfer::State::kDone;
        }
        const auto state = visitor.in.receive(visitor.socket.get());
        if (state == Transfer::State::kLost)
            fail_call(peer, "whoever listens there turned this rank away, or has given up");
        if (state == Transfer::State::kUnderWay) return false;
        if (!is_genuine(visitor.in.hello, peer)) fail_call(peer, "whoever listens there is not of this group");
        return join(visitor, peer);
    }

    bool has_connected(Visitor& visitor) {
        pollfd polled{visitor.socket.get(), POLLOUT, 0};
        if (poll(&polled, 1, 0) != 1) return false;
        if (const int error = take_error(visitor.socket); error != 0) fail_call(visitor.rank, describe(error));
        return visitor.is_connected = true;
    }

    bool serve_caller(Visitor& visitor) {
        const auto state = visitor.in.receive(visitor.socket.get());
        const bool is_late = Clock::now() >= visitor.deadline;
        if (state == Transfer::State::kUnderWay && !is_late) return false;
        const int peer = visitor.in.hello.from;
        if (state != Transfer::State::kDone || peer <= rank_ || wanted_.count(peer) == 0 || met_.count(peer) != 0 ||
            !is_genuine(visitor.in.hello, peer)) {
            ++num_turned_away_;
            return true;
        }
        visitor.out.hello = make_hello(peer);
        // A fresh socket has room for it.
        if (visitor.out.send(visitor.socket.get()) != Transfer::State::kDone) return true;
        return join(visitor, peer);
    }

    bool is_genuine(const Hello& hello, int peer) const {
        const Hello expected{kMagic, peer, rank_, blobs_[static_cast<size_t>(peer)].token,
                             blobs_[static_cast<size_t>(rank_)].token};
        return hello.magic == expected.magic && hello.from == expected.from && hello.to == expected.to &&
               hello.token_of_from == expected.token_of_from && hello.token_of_to == expected.token_of_to;
    }

    bool join(Visitor& visitor, int peer) {
        met_[peer] = {std::move(visitor.socket), address_in(blobs_[static_cast<size_t>(peer)])};
        return true;
    }

    [[noreturn]] void fail_call(int peer, const std::string& why) const {
        throw TransportError(
            concat("rail: cannot connect to rank ", peer, " at ", text_of(peer), ": ", why, ". ", kHint));
    }

    std::string text_of(int peer) const { return address_in(blobs_[static_cast<size_t>(peer)]).text(); }

    std::string describe_missing(double timeout_s) const {
        std::string missing;
        for (const int peer : wanted_)
            if (met_.count(peer) == 0)
                missing += concat(missing.empty() ? "" : ", ", "rank ", peer,
                                  peer < rank_ ? " at " : " (it calls this rank at ",
                                  text_of(peer < rank_ ? peer : rank_), peer < rank_ ? "" : ")");
        const std::string strays =
            num_turned_away_ == 0 ? "" : concat(" (", num_turned_away_, " connections of strangers were turned away)");
        return concat("rail: no connection after ", timeout_s, " s to ", missing, strays, ". ", kHint);
    }

    static constexpr const char* kHint =
        "Every rank must reach the others there (firewall, interface); DEEP_EP_RAIL_INTERFACE names the interface to "
        "use";

    const int rank_;
    const std::vector<Blob>& blobs_;
    const std::set<int> wanted_;
    const Descriptor& listener_;
    std::vector<Visitor> visitors_;
    std::map<int, Peer> met_;
    int num_turned_away_ = 0;
};

}  // namespace

Rendezvous::Rendezvous(int rank, uint64_t window_bytes, const SocketAddress& own)
    : rank_(rank),
      window_bytes_(window_bytes),
      own_(own),
      listener_(listen_on(own)),
      address_(bound_address(listener_)) {
    Blob blob{};
    blob.magic = kMagic;
    blob.window_bytes = window_bytes;
    blob.rank = rank;
    blob.address_bytes = address_.length();
    blob.token = random_token();
    std::memcpy(&blob.address, address_.get(), address_.length());
    blob_ = pack(blob);
}

std::map<int, Peer> Rendezvous::meet(const std::vector<std::string>& blobs, const std::vector<int>& peers,
                                     double timeout_s) {
    EP_CHECK(rank_ < static_cast<int>(blobs.size()) && blobs[static_cast<size_t>(rank_)] == blob_,
             "rail: the addresses that were gathered do not hold that of this rank (", rank_, ")");
    EP_ENSURE(listener_, "the rail is connected already");
    std::vector<Blob> unpacked(blobs.size());
    unpacked[static_cast<size_t>(rank_)] = unpack(blob_, rank_);
    for (const int peer : peers) {
        EP_CHECK(peer >= 0 && peer < static_cast<int>(blobs.size()) && peer != rank_, "rail: rank ", rank_,
                 " cannot have rank ", peer, " as a peer in a group of ", blobs.size());
        const Blob& blob = unpacked[static_cast<size_t>(peer)] = unpack(blobs[static_cast<size_t>(peer)], peer);
        EP_CHECK(blob.window_bytes == window_bytes_, "rail: windows must have the same size on every rank, got ",
                 window_bytes_, " bytes on rank ", rank_, " and ", blob.window_bytes, " on rank ", peer);
    }
    auto met = Meeting(rank_, unpacked, peers, listener_).run(own_, timeout_s);
    listener_.close();
    return met;
}

}  // namespace deep_ep::rail::host
