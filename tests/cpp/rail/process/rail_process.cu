// One rank of a group of processes that are joined by the engine `host` alone; tests/rail_group.py starts them and passes
// their words on. It says, a line each:
//     address HEX                 and is told those of all ranks, in order, each "address HEX"
//     connected                   and is told what to do:
//     streams MESSAGES SLOTS BYTES        every rank sends to every other -> {"errors": ..., "lost": ..., "bytes": ...}
//     rate CHUNKS SLOTS BYTES             rank 0 sends to rank 1 -> {"seconds": ...}
//     plain CHUNKS SLOTS BYTES            the same over a bare socket
//     watch SECONDS                       posts to every peer until the engine reports a failure -> {"failure": ..., "seconds": ...}
//     quit
// An error ends it with a line "error ..." and status 1.
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "rail/host_world.h"
#include "rail/streams.h"

namespace deep_ep::testing {
namespace {

using rail::host::Descriptor;
using rail::host::HostEngine;
using rail::host::HostOptions;
using rail::host::SocketAddress;
using Clock = std::chrono::steady_clock;

constexpr uint64_t kTimeoutNs = 100'000'000'000;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// A stream of chunks from rank 0 to rank 1, whose bytes nobody looks at: what the engine costs. One warp each.
struct RateKernel : TrafficKernel<RateKernel> {
    static EP_DEVICE void take_part(const Traffic& p, const rail::Rail& rail, const Patience& patience) {
        bool is_whole = true;
        for (int i = 0; i < p.num_messages && is_whole; ++i)
            is_whole = p.rank == 0 ? send(p, rail, patience, i) : receive(p, rail, patience, i);
        if (!is_whole && prim::lane_idx() == 0) count(p.num_lost, 1);
    }

    static EP_DEVICE bool send(const Traffic& p, const rail::Rail& rail, const Patience& patience, int i) {
        const int slot = i % p.places.num_slots, previous = i - p.places.num_slots;
        if (previous >= 0 && !wait_for_flag(rail, patience, p.places.taken(1, slot), p.tag(previous))) return false;
        const rail::Copy copy{p.places.received(0, slot), p.places.staging(1, slot), p.places.slot_bytes};
        return rail::put(rail, 1, copy, {p.places.arrived(0, slot), p.tag(i)}, patience);
    }

    static EP_DEVICE bool receive(const Traffic& p, const rail::Rail& rail, const Patience& patience, int i) {
        const int slot = i % p.places.num_slots;
        if (!wait_for_flag(rail, patience, p.places.arrived(0, slot), p.tag(i))) return false;
        bool is_posted = true;
        if (prim::lane_idx() == 0 && i + p.places.num_slots < p.num_messages)
            is_posted = rail::set(rail, 0, {p.places.taken(1, slot), p.tag(i)}, patience);
        return __all_sync(prim::kFullMask, is_posted);
    }
};

std::string to_hex(const std::string& bytes) {
    std::string text;
    for (const char byte : bytes) {
        char digits[3];
        std::snprintf(digits, sizeof(digits), "%02x", static_cast<unsigned char>(byte));
        text += digits;
    }
    return text;
}

std::string from_hex(const std::string& text) {
    std::string bytes;
    for (size_t i = 0; i + 1 < text.size(); i += 2)
        bytes += static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16));
    return bytes;
}

void say(const std::string& line) { std::cout << line << std::endl; }

std::istringstream hear() {
    std::string line;
    if (!std::getline(std::cin, line)) throw Error("nobody tells this process anything any more");
    return std::istringstream(line);
}

class Process {
public:
    Process(const HostOptions& options, int num_ranks)
        : rank_(options.rank),
          num_ranks_(num_ranks),
          device_(make_test_device(options.rank)),
          engine_(device_, options) {
        counts_ = static_cast<uint64_t*>(device_->allocate(2 * sizeof(uint64_t)));
        stream_ = device_->create_stream();
    }
    ~Process() {
        engine_.release(10);
        device_->destroy_stream(stream_);
        device_->free(counts_);
    }
    Process(const Process&) = delete;
    Process& operator=(const Process&) = delete;

    void connect() {
        say("address " + to_hex(engine_.address()));
        for (int rank = 0; rank < num_ranks_; ++rank) {
            auto line = hear();
            std::string word, text;
            line >> word >> text;
            addresses_.push_back(from_hex(text));
            if (rank != rank_) peers_.push_back(rank);
        }
        engine_.connect(addresses_, peers_);
        say("connected");
    }

    void serve() {
        for (;;) {
            auto line = hear();
            std::string word;
            line >> word;
            if (word == "quit") return;
            if (word == "watch") {
                double seconds = 0;
                line >> seconds;
                watch(seconds);
                continue;
            }
            int num_messages = 0, num_slots = 0;
            uint32_t slot_bytes = 0;
            line >> num_messages >> num_slots >> slot_bytes;
            const Places places{num_ranks_, num_slots, slot_bytes};
            EP_CHECK(num_slots <= Places::kMaxSlots, "there are words for ", Places::kMaxSlots, " slots");
            EP_CHECK(places.bytes() <= engine_.window().bytes, "the window has ", engine_.window().bytes,
                     " bytes, and this needs ", places.bytes());
            ++call_;
            if (word == "streams") run_streams(places, num_messages);
            if (word == "rate") run_rate(places, num_messages);
            if (word == "plain") run_plain(places, num_messages);
        }
    }

private:
    template <class K> double run(const Places& places, int num_messages, int num_warps) {
        const Traffic traffic{engine_.params(), places,  rank_,      num_messages, 1, call_,
                              kTimeoutNs,       counts_, counts_ + 1};
        dev::LaunchConfig config;
        config.num_threads = num_warps * prim::kWarpSize;
        config.name = "rail process";
        const auto start = Clock::now();
        dev::launch<K>(config, stream_, traffic);
        device_->synchronize_stream(stream_);
        const double seconds = seconds_since(start);
        engine_.check();
        uint64_t counts[2];
        device_->copy_now(counts, counts_, sizeof(counts));
        EP_CHECK(counts[0] == 0 && counts[1] == 0, counts[0], " words were wrong, ", counts[1], " waits were in vain");
        return seconds;
    }

    void run_streams(const Places& places, int num_messages) {
        uint64_t before = 0, after = 0;
        for (const int peer : peers_) before += engine_.sent_to(peer).num_bytes;
        run<StreamsKernel>(places, num_messages, 2 * (num_ranks_ - 1));
        for (const int peer : peers_) after += engine_.sent_to(peer).num_bytes;
        say(concat("{\"bytes\": ", after - before, "}"));
    }

    void run_rate(const Places& places, int num_messages) {
        say(concat("{\"seconds\": ", rank_ > 1 ? 0.0 : run<RateKernel>(places, num_messages, 1), "}"));
    }

    // Blocking calls on a connection of its own, over the same slots: the least that TCP costs.
    void run_plain(const Places& places, int num_messages) {
        if (rank_ > 1) return say("{\"seconds\": 0}");
        const Descriptor socket = rank_ == 0 ? call_peer() : answer_peer();
        auto* window = static_cast<char*>(engine_.window().host);
        const auto start = Clock::now();
        for (int i = 0; i < num_messages; ++i) {
            const int slot = i % places.num_slots;
            char* at = window + (rank_ == 0 ? places.staging(1, slot) : places.received(0, slot));
            for (uint32_t done = 0; done < places.slot_bytes;) {
                const ssize_t part = rank_ == 0
                                         ? ::send(socket.get(), at + done, places.slot_bytes - done, MSG_NOSIGNAL)
                                         : recv(socket.get(), at + done, places.slot_bytes - done, 0);
                EP_CHECK(part > 0, "the plain socket broke: ", std::strerror(errno));
                done += static_cast<uint32_t>(part);
            }
        }
        char word = 0;  // the receiver has everything
        if (rank_ == 1) EP_CHECK(::send(socket.get(), &word, 1, MSG_NOSIGNAL) == 1, "the plain socket broke");
        if (rank_ == 0) EP_CHECK(recv(socket.get(), &word, 1, 0) == 1, "the plain socket broke");
        say(concat("{\"seconds\": ", seconds_since(start), "}"));
    }

    Descriptor answer_peer() {
        const Descriptor listener = rail::host::listen_on(own_address());
        say("address " + to_hex(concat(rail::host::bound_address(listener).port())));
        pollfd polled{listener.get(), POLLIN, 0};
        EP_CHECK(poll(&polled, 1, 60'000) == 1, "nobody calls the plain socket");
        return Descriptor(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    }

    Descriptor call_peer() {
        auto line = hear();
        std::string word, text;
        line >> word >> text;
        sockaddr_in address{};
        std::memcpy(&address, own_address().get(), sizeof(address));
        address.sin_port = htons(static_cast<uint16_t>(std::stoi(from_hex(text))));
        Descriptor socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        EP_CHECK(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0,
                 "cannot call the plain socket: ", std::strerror(errno));
        return socket;
    }

    static SocketAddress own_address() { return SocketAddress::parse("127.0.0.1"); }

    // Posts now and then, so that a dead link has something to carry.
    void watch(double seconds) {
        const auto start = Clock::now();
        uint64_t flag = 0;
        while (seconds_since(start) < seconds) {
            try {
                engine_.check();
            } catch (const Error& error) {
                return say(concat("{\"failure\": \"", error.what(), "\", \"seconds\": ", seconds_since(start), "}"));
            }
            for (const int peer : peers_) engine_.set(peer, 0, ++flag);
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
        say("{\"failure\": \"\"}");
    }

    const int rank_, num_ranks_;
    const std::shared_ptr<dev::Device> device_;
    HostEngine engine_;
    dev::Stream stream_ = nullptr;
    uint64_t* counts_ = nullptr;
    uint64_t call_ = 0;
    std::vector<std::string> addresses_;
    std::vector<int> peers_;
};

std::map<std::string, std::string> read_arguments(int argc, char** argv) {
    std::map<std::string, std::string> arguments{{"--rank", "0"},       {"--num-ranks", "1"},
                                                 {"--interface", ""},   {"--reach", ""},
                                                 {"--timeout-s", "60"}, {"--window-bytes", "67108864"}};
    for (int i = 1; i + 1 < argc; i += 2) {
        EP_CHECK(arguments.count(argv[i]) == 1, "no such option: ", argv[i]);
        arguments[argv[i]] = argv[i + 1];
    }
    return arguments;
}

int run_process(int argc, char** argv) {
    try {
        const auto arguments = read_arguments(argc, argv);
        HostOptions options;
        options.rank = std::stoi(arguments.at("--rank"));
        options.window_bytes = std::stoul(arguments.at("--window-bytes"));
        options.interface = arguments.at("--interface");
        options.reach = arguments.at("--reach");
        options.timeout_s = std::stod(arguments.at("--timeout-s"));
        Process process(options, std::stoi(arguments.at("--num-ranks")));
        process.connect();
        process.serve();
    } catch (const std::exception& error) {
        say(concat("error ", error.what()));
        return 1;
    }
    return 0;
}

}  // namespace
}  // namespace deep_ep::testing

int main(int argc, char** argv) { return deep_ep::testing::run_process(argc, argv); }
