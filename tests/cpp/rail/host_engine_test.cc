// The engine `host` around its messages: finding each other, strangers, posting in vain, release, leaks, fork.
#include "rail/host/host_engine.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <thread>

#include "core/error.h"
#include "core/non_copyable.h"
#include "device/launch.h"
#include "device/simt/device.h"
#include "rail/host_world.h"
#include "rail/rail.h"
#include "support/complaints.h"

namespace deep_ep::testing {
namespace {

using rail::host::HostEngine;
using rail::host::HostOptions;
using rail::host::SocketAddress;

bool wait_until(const std::function<bool()>& done) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!done()) {
        if (std::chrono::steady_clock::now() > deadline) return false;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
}

HostOptions options_for(int rank) {
    HostOptions options;
    options.rank = rank;
    options.window_bytes = 1 << 16;
    options.interface = "127.0.0.1";
    options.timeout_s = 30;
    return options;
}

std::unique_ptr<HostEngine> make_engine(const HostOptions& options) {
    return std::make_unique<HostEngine>(simt::make_cpu_device(), options);
}

uint64_t word_of(const HostEngine& engine, uint64_t offset) {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(static_cast<char*>(engine.window().host) + offset))
        .load(std::memory_order_acquire);
}

// One thread posts, as long as there is room or a moment has passed.
struct PostKernel {
    struct Params {
        rail::Params rail;
        int peer;
        int num_adds;
        uint64_t counter;
        uint64_t patience_ns;
        uint32_t* num_posted;
    };
    struct Shared {};

    static void run(const Params& p, Shared&) {
        if (threadIdx.x != 0) return;
        const rail::Rail rail(p.rail);
        const auto wait = [&](uint64_t, const auto& look) {
            uint64_t seen = 0;
            const uint64_t start_ns = prim::clock_ns();
            while (!look(seen)) {
                if (prim::clock_ns() - start_ns > p.patience_ns) return false;
                prim::pause();
            }
            return true;
        };
        for (int i = 0; i < p.num_adds; ++i)
            if (rail::add(rail, p.peer, p.counter, 1, wait)) ++*p.num_posted;
    }
};

// One warp puts its window's first megabytes to the peer's, chunk by chunk, each with a flag.
struct PutKernel {
    struct Params {
        rail::Params rail;
        int peer;
        int num_chunks;
        uint32_t chunk_bytes;
    };
    struct Shared {};

    static EP_DEVICE uint64_t flag_at(int chunk) { return 8 * static_cast<uint64_t>(chunk); }

    static void run(const Params& p, Shared&) {
        const rail::Rail rail(p.rail);
        const auto wait = [](uint64_t, const auto& look) {
            uint64_t seen = 0;
            while (!look(seen)) prim::pause();
            return true;
        };
        for (int chunk = 0; chunk < p.num_chunks; ++chunk)
            rail::put(rail, p.peer, {4096, 4096, p.chunk_bytes}, {flag_at(chunk), 1}, wait);
    }
};

// A device of its own, for kernels that post through any engine of this process.
class Poster : NonCopyable {
public:
    Poster() : device_(simt::make_cpu_device()), stream_(device_->create_stream()) {
        count_ = static_cast<uint32_t*>(device_->allocate(sizeof(uint32_t)));
    }
    ~Poster() {
        device_->free(count_);
        device_->destroy_stream(stream_);
    }

    // How many of `num_adds` could be posted.
    uint32_t post(const HostEngine& engine, int peer, int num_adds, double patience_s = 60) {
        const uint32_t before = *count_;
        dev::launch<PostKernel>({.num_threads = 32, .name = "post"}, stream_,
                                {engine.params(), peer, num_adds, 8, static_cast<uint64_t>(patience_s * 1e9), count_});
        device_->synchronize_stream(stream_);
        return *count_ - before;
    }

    void put(const HostEngine& engine, int peer, int num_chunks, uint32_t chunk_bytes) {
        dev::launch<PutKernel>({.num_threads = 32, .name = "put"}, stream_,
                               {engine.params(), peer, num_chunks, chunk_bytes});
        device_->synchronize_stream(stream_);
    }

private:
    std::shared_ptr<dev::Device> device_;
    dev::Stream stream_;
    uint32_t* count_;
};

std::vector<std::unique_ptr<HostEngine>> make_pair(const HostOptions& options = options_for(0)) {
    return make_engines({simt::make_cpu_device(), simt::make_cpu_device()}, options);
}

size_t count_entries(const char* folder) {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}

TEST_CASE("host: whoever gives up posting leaves no hole in the ring") {
    HostOptions options = options_for(0);
    options.ring_capacity = 4;
    std::vector<std::unique_ptr<HostEngine>> engines;
    engines.push_back(make_engine(options));
    options.rank = 1;
    engines.push_back(make_engine(options));
    Poster poster;
    // Nobody takes commands out yet.
    CHECK_EQ(poster.post(*engines[0], 1, 6, 0.02), 4);
    for (const std::string& failure : connect_all(engines)) CHECK_EQ(failure, "");
    CHECK_EQ(poster.post(*engines[0], 1, 10), 10);
    CHECK(wait_until([&] { return word_of(*engines[1], 8) == 14; }));
}

TEST_CASE("host: what was posted before a release arrives, and the peer sees no failure") {
    auto engines = make_pair();
    Poster poster;
    CHECK_EQ(poster.post(*engines[0], 1, 5000), 5000);
    engines[0]->release(30);
    CHECK(wait_until([&] { return word_of(*engines[1], 8) == 5000; }));
    CHECK_EQ(poster.post(*engines[1], 0, 10), 10);  // to somebody who has left: it goes nowhere
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK_NOTHROW(engines[1]->check());
    engines[0]->release(30);
}

TEST_CASE("host: a release sends what no socket has room for at once, and gives up when its time is over") {
    HostOptions options = options_for(0);
    options.window_bytes = 2 << 20;
    constexpr int kChunks = 100;
    for (const double timeout_s : {60.0, 0.0}) {
        auto engines = make_pair(options);
        Poster poster;
        poster.put(*engines[0], 1, kChunks, 1 << 20);
        engines[0]->release(timeout_s);
        if (timeout_s > 0)
            for (int chunk = 0; chunk < kChunks; ++chunk)
                CHECK(wait_until([&] { return word_of(*engines[1], PutKernel::flag_at(chunk)) == 1; }));
    }
}

TEST_CASE("host: a message for nobody and one from outside the window are failures") {
    {
        auto engines = make_pair();
        Poster poster;
        poster.post(*engines[0], 5, 1);
        CHECK(wait_until([&] { return !error_of([&] { engines[0]->check(); }).empty(); }));
        CHECK_EQ(error_of([&] { engines[0]->check(); }),
                 "rail: a kernel posts to rank 5, which is no peer of this rank");
        CHECK_FALSE(error_of([&] { engines[0]->check_itself(); }).empty());
        CHECK_EQ(engines[0]->loss_of(1), "");
    }
    auto engines = make_pair();
    engines[1]->set(0, 1 << 16, 1);
    CHECK(wait_until([&] { return !error_of([&] { engines[0]->check(); }).empty(); }));
    CHECK(contains(error_of([&] { engines[0]->check(); }), "rank 1 at 127.0.0.1:"));
    CHECK_EQ(engines[0]->loss_of(1), error_of([&] { engines[0]->check(); }));
    CHECK_EQ(error_of([&] { engines[0]->check_itself(); }), "");
    CHECK(contains(error_of([&] { engines[0]->check(); }), "breaks the protocol"));
    // The other side is told by the end of the connection.
    CHECK(contains(error_of([&] { engines[0]->check(); }), "of a window of 65536"));
}

TEST_CASE("host: threads and descriptors go with the engine") {
    { make_pair(); }  // whatever is made once
    const size_t num_fds = count_entries("/proc/self/fd"), num_threads = count_entries("/proc/self/task");
    for (int i = 0; i < 10; ++i) {
        auto engines = make_pair();
        if (i % 2 == 0)
            for (auto& engine : engines) engine->release(10);
    }
    CHECK_EQ(count_entries("/proc/self/fd"), num_fds);
    CHECK_EQ(count_entries("/proc/self/task"), num_threads);
}

TEST_CASE("host: a rank that does not come is named, and so are bad addresses") {
    HostOptions options = options_for(0);
    options.timeout_s = 0.2;
    auto engine = make_engine(options);
    options.rank = 1;
    auto absent = make_engine(options);
    CHECK(contains(error_of([&] {
                       engine->connect({engine->address(), absent->address()}, {1});
                   }),
                   "no connection after 0.2 s to rank 1 (it calls this rank at 127.0.0.1:"));
    auto other = make_engine(options);  // rank 1 too
    const std::string address = engine->address();
    engine.reset();
    CHECK(contains(error_of([&] {
                       other->connect({address, other->address()}, {0});
                   }),
                   "cannot connect to rank 0 at 127.0.0.1:"));
    CHECK(contains(error_of([&] {
                       absent->connect({"abc", absent->address()}, {0});
                   }),
                   "the address of rank 0 has 3 bytes"));
    CHECK(contains(error_of([&] {
                       absent->connect({absent->address(), absent->address()}, {0});
                   }),
                   "what rank 0 gave as its address is none"));
    CHECK(contains(error_of([&] { absent->connect({address, address}, {0}); }), "do not hold that of this rank (1)"));
    CHECK(contains(error_of([&] {
                       absent->connect({address, absent->address()}, {7});
                   }),
                   "cannot have rank 7 as a peer"));
    options.window_bytes = 1 << 10;
    options.rank = 0;
    CHECK(contains(error_of([&] {
                       absent->connect({make_engine(options)->address(), absent->address()}, {0});
                   }),
                   "windows must have the same size on every rank, got 65536 bytes on rank 1 and 1024 on rank 0"));
}

// The port in an address that an engine has given.
SocketAddress address_in(const HostEngine& engine) {
    const std::string name = engine.name();
    const size_t colon = name.rfind(':');
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(std::stoi(name.substr(colon + 1))));
    return {reinterpret_cast<const sockaddr*>(&address), sizeof(address)};
}

TEST_CASE("host: strangers who talk, who are silent and who are gone keep nobody out") {
    std::vector<std::unique_ptr<HostEngine>> engines;
    for (const int rank : {0, 1}) engines.push_back(make_engine(options_for(rank)));
    const auto lo = SocketAddress::parse("127.0.0.1");
    std::vector<rail::host::Descriptor> strangers;
    for (int i = 0; i < 20; ++i) strangers.push_back(rail::host::begin_connect(lo, address_in(*engines[0])));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const std::string noise(4096, 'x');
    for (size_t i = 0; i < 10; ++i) CHECK_GT(::send(strangers[i].get(), noise.data(), noise.size(), MSG_NOSIGNAL), 0);
    for (size_t i = 5; i < 15; ++i) strangers[i].close();
    for (const std::string& failure : connect_all(engines)) CHECK_EQ(failure, "");
    engines[1]->set(0, 8, 9);
    CHECK(wait_until([&] { return word_of(*engines[0], 8) == 9; }));
    // Nobody listens any more.
    const auto late = rail::host::begin_connect(lo, address_in(*engines[0]));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK_EQ(rail::host::take_error(late), ECONNREFUSED);
}

TEST_CASE("host: a rank that knows another token is turned away") {
    HostOptions options = options_for(0);
    options.timeout_s = 1;
    auto zero = make_engine(options);
    options.rank = 1;
    auto one = make_engine(options), impostor = make_engine(options);
    std::string failures[2];
    const std::vector<std::string> told{zero->address(), one->address()}, untold{zero->address(), impostor->address()};
    std::thread thread([&] { failures[0] = error_of([&] { zero->connect(told, {1}); }); });
    failures[1] = error_of([&] { impostor->connect(untold, {0}); });
    thread.join();
    CHECK(contains(failures[0], "no connection after 1 s to rank 1"));
    CHECK(contains(failures[0], "1 connections of strangers were turned away"));
    CHECK(contains(failures[1], "turned this rank away, or has given up"));
}

TEST_CASE("host: interfaces by name, by address, by what they reach") {
    HostOptions options = options_for(0);
    const auto name_with = [&](const std::string& interface, const std::string& reach) {
        options.interface = interface;
        options.reach = reach;
        return make_engine(options)->name();
    };
    CHECK(contains(name_with("lo", ""), "host (TCP, 127.0.0.1:"));
    CHECK(contains(name_with("", "127.0.0.1"), "host (TCP, 127.0.0.1:"));
    CHECK(contains(name_with("", "localhost"), "host (TCP, "));
    CHECK(contains(name_with("", ""), "host (TCP, "));
    CHECK(contains(
        error_of([&] { name_with("ib9", ""); }),
        "DEEP_EP_RAIL_INTERFACE: expected the name or the address of an interface that is up, got 'ib9'; there "
        "are: lo (127.0.0.1)"));
    CHECK(contains(error_of([&] { name_with("", "nobody.invalid"); }), "cannot find the address of 'nobody.invalid'"));
}

TEST_CASE("host: IPv6") {
    HostOptions options = options_for(0);
    options.interface = "::1";
    if (!error_of([&] { make_engine(options); }).empty()) {
        MESSAGE("left out: this host has no ::1");
        return;
    }
    auto engines = make_pair(options);
    CHECK(contains(engines[0]->name(), "host (TCP, [::1]:"));
    engines[1]->set(0, 8, 9);
    CHECK(wait_until([&] { return word_of(*engines[0], 8) == 9; }));
}

TEST_CASE("host: a forked child holds no connection open, and leaves the engine to its parent") {
    auto engines = make_pair();
    rail::host::RingView view;
    const rail::Params params = engines[0]->params();
    std::memcpy(&view, params.bytes, sizeof(view));
    const pid_t child = fork();
    if (child == 0) {
        const bool is_closed = fcntl(view.event, F_GETFD) < 0 && errno == EBADF;
        engines.clear();  // joins nobody
        _exit(is_closed ? 0 : 1);
    }
    int status = 0;
    REQUIRE_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    engines[1]->set(0, 8, 9);
    CHECK(wait_until([&] { return word_of(*engines[0], 8) == 9; }));
    CHECK_NOTHROW(engines[0]->check());
}

}  // namespace
}  // namespace deep_ep::testing
