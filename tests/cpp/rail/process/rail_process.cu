// One rank of a group of processes that are joined by an engine alone; tests/rail_group.py starts them and passes their
// words on. It says, a line each:
//     address HEX                 and is told those of all ranks, in order, each "address HEX"
//     connected                   and is told what to do:
//     streams MESSAGES SLOTS BYTES        every rank sends to every other -> {"errors": ..., "lost": ..., "bytes": ...}
//     rate CHUNKS SLOTS BYTES [WARPS [BLOCKS]]     rank 0 sends to rank 1, a stream from each warp -> {"seconds": ...}
//     plain CHUNKS SLOTS BYTES [WARPS [BLOCKS]]    the same without the engine: over a bare socket, with bare puts of warps
//     plain_blocks CHUNKS SLOTS BYTES WARPS BLOCKS    with bare puts of whole blocks
//     watch SECONDS                       posts to every peer until the engine reports a failure -> {"failure": ..., "seconds": ...}
//     quit
// An error ends it with a line "error ..." and status 1.
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
#include "core/non_copyable.h"
#include "device/algo/group.h"
#include "rail/process/engine.h"
#include "rail/streams.h"
#include "rail/test_device.h"

namespace deep_ep::testing {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kTimeoutNs = 100'000'000'000;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// A stream of chunks from rank 0 to rank 1, whose bytes nobody looks at: what the engine costs. Each warp sends, or
// receives, every so many-th of them.
struct RateKernel : TrafficKernel<RateKernel> {
    static EP_DEVICE void take_part(const Traffic& p, const rail::Rail& rail, const Patience& patience) {
        bool is_whole = true;
        for (int i = worker_idx(); i < p.num_messages && is_whole; i += num_workers())
            is_whole = p.rank == 0 ? send(p, rail, patience, i) : receive(p, rail, patience, i);
        if (!is_whole && prim::lane_idx() == 0) count(p.num_lost, 1);
    }

    static EP_DEVICE bool send(const Traffic& p, const rail::Rail& rail, const Patience& patience, int i) {
        const int slot = i % p.places.num_slots, previous = i - p.places.num_slots;
        if (previous >= 0 && !wait_for_flag(rail, patience, p.places.taken(1, slot), p.tag(previous))) return false;
        const rail::Copy copy{p.places.received(0, slot), p.places.staging(1, slot), p.places.slot_bytes};
        const rail::Flag flag{p.places.arrived(0, slot), p.tag(i)};
        uint8_t* const there = rail::reach(rail, 1);
        return there == nullptr ? rail::put(rail, 1, copy, flag, patience)
                                : store(rail, there + copy.dst, copy, flag, patience);
    }

    // As the kernels across nodes do where stores reach the peer.
    static EP_DEVICE bool store(const rail::Rail& rail, uint8_t* to, const rail::Copy& copy, const rail::Flag& flag,
                                const Patience& patience) {
        const algo::Warp warp;
        algo::copy_row<algo::SourceKind::kInput, 8>(warp, reinterpret_cast<prim::Vec16*>(to),
                                                    rail::at<const prim::Vec16>(rail, copy.src),
                                                    static_cast<int>(copy.bytes / sizeof(prim::Vec16)));
        warp.sync();  // every lane's stores, one lane's release
        return prim::lane_idx() != 0 || rail::tell(rail, 1, copy.bytes, flag, patience);
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

std::string hear_line() {
    std::string line;
    if (!std::getline(std::cin, line)) throw Error("nobody tells this process anything any more");
    return line;
}

std::istringstream hear() { return std::istringstream(hear_line()); }

class Process : NonCopyable {
public:
    explicit Process(const ProcessOptions& options)
        : rank_(options.rank),
          num_ranks_(options.num_ranks),
          device_(make_test_device(options.rank)),
          engine_(make_process_engine(device_, options)) {
        counts_ = static_cast<uint64_t*>(device_->allocate(2 * sizeof(uint64_t)));
        stream_ = device_->create_stream();
    }
    ~Process() {
        engine_->release(10);
        device_->destroy_stream(stream_);
        device_->free(counts_);
    }

    void connect() {
        say("address " + to_hex(engine_->address()));
        for (int rank = 0; rank < num_ranks_; ++rank) {
            auto line = hear();
            std::string word, text;
            line >> word >> text;
            addresses_.push_back(from_hex(text));
            if (rank != rank_) peers_.push_back(rank);
        }
        engine_->connect(addresses_, peers_);
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
            Workers workers;
            uint32_t slot_bytes = 0;
            line >> num_messages >> num_slots >> slot_bytes;
            if (int given = 0; line >> given) workers.num_warps = given;
            if (int given = 0; line >> given) workers.num_blocks = given;
            workers.are_blocks = word == "plain_blocks";
            const Places places{num_ranks_, num_slots, slot_bytes};
            EP_CHECK(num_slots <= Places::kMaxSlots, "there are words for ", Places::kMaxSlots, " slots");
            EP_CHECK(places.bytes() <= engine_->window().bytes, "the window has ", engine_->window().bytes,
                     " bytes, and this needs ", places.bytes());
            ++call_;
            if (word == "streams") run_streams(places, num_messages);
            if (word == "rate") run_rate(places, num_messages, workers);
            if (word == "plain" || word == "plain_blocks") run_plain_way(places, num_messages, workers);
        }
    }

private:
    Traffic traffic(const Places& places, int num_messages) const {
        return {engine_->params(), places, rank_, num_messages, 1, call_, kTimeoutNs, counts_, counts_ + 1};
    }

    template <class K> double run(const Places& places, int num_messages, const Workers& workers) {
        dev::LaunchConfig config;
        config.num_threads = workers.num_warps * prim::kWarpSize;
        config.num_blocks = workers.num_blocks;
        config.name = "rail process";
        const auto start = Clock::now();
        const dev::CurrentDevice current(*device_);
        dev::launch<K>(config, stream_, traffic(places, num_messages));
        device_->synchronize_stream(stream_);
        const double seconds = seconds_since(start);
        engine_->check();
        uint64_t counts[2];
        device_->copy_now(counts, counts_, sizeof(counts));
        EP_CHECK(counts[0] == 0 && counts[1] == 0, counts[0], " words were wrong, ", counts[1], " waits were in vain");
        return seconds;
    }

    void run_streams(const Places& places, int num_messages) {
        uint64_t before = 0, after = 0;
        for (const int peer : peers_) before += engine_->sent_to(peer).num_bytes;
        run<StreamsKernel>(places, num_messages, {.num_warps = 2 * (num_ranks_ - 1)});
        for (const int peer : peers_) after += engine_->sent_to(peer).num_bytes;
        say(concat("{\"bytes\": ", after - before, "}"));
    }

    void run_rate(const Places& places, int num_messages, const Workers& workers) {
        say(concat("{\"seconds\": ", rank_ > 1 ? 0.0 : run<RateKernel>(places, num_messages, workers), "}"));
    }

    void run_plain_way(const Places& places, int num_messages, const Workers& workers) {
        const Talk talk{say, hear_line};
        const double seconds =
            rank_ > 1 ? 0.0 : run_plain(*engine_, *device_, stream_, traffic(places, num_messages), workers, talk);
        say(concat("{\"seconds\": ", seconds, "}"));
    }

    // Posts now and then, so that a dead link has something to carry.
    void watch(double seconds) {
        const auto start = Clock::now();
        uint64_t flag = 0;
        while (seconds_since(start) < seconds) {
            try {
                engine_->check();
            } catch (const Error& error) {
                return say(concat("{\"failure\": \"", error.what(), "\", \"seconds\": ", seconds_since(start), "}"));
            }
            for (const int peer : peers_) engine_->set(peer, 0, ++flag);
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
        say("{\"failure\": \"\"}");
    }

    const int rank_, num_ranks_;
    const std::shared_ptr<dev::Device> device_;
    const std::unique_ptr<rail::Engine> engine_;
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
        ProcessOptions options;
        options.rank = std::stoi(arguments.at("--rank"));
        options.num_ranks = std::stoi(arguments.at("--num-ranks"));
        options.window_bytes = std::stoul(arguments.at("--window-bytes"));
        options.interface = arguments.at("--interface");
        options.reach = arguments.at("--reach");
        options.timeout_s = std::stod(arguments.at("--timeout-s"));
        Process process(options);
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
