// The host half of the engine `nvshmem` against a library that is none: what it accepts and refuses, and when it asks for
// what. What needs NVSHMEM and GPUs: tests/test_rail_nvshmem.py.
#include "rail/nvshmem/nvshmem_engine.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "core/error.h"
#include "device/simt/device.h"
#include "rail/nvshmem/loader.h"
#include "rail/nvshmem/versions.h"
#include "support/testing.h"

namespace deep_ep::testing {
namespace {

using rail::nvshmem::Complaint;
using rail::nvshmem::Introduction;
using rail::nvshmem::Library;
using rail::nvshmem::NvshmemEngine;
using rail::nvshmem::SetParams;
using rail::nvshmem::Transport;
using rail::nvshmem::Version;
using rail::nvshmem::World;

constexpr Version kVersion{3, 4, 5};
constexpr size_t kWindowBytes = 4096;

// What NVSHMEM is in this process. The functions of a Library take no context, so there is one.
struct FakeNvshmem {
    bool is_initialized = false;
    int pe = 0, num_pes = 0;
    int num_joined = 0, num_allocated = 0, num_barriers = 0, num_sets = 0;
    bool has_room = true, is_reached = true, is_cut = false, orders_nic_for_all = false;
    int unreached = -1;   // PE
    std::string failure;  // of the next initialization
    std::vector<std::vector<char>> heap = {};
};
FakeNvshmem fake;

bool fail(Complaint* complaint, const std::string& text) {
    std::strncpy(complaint->text, text.c_str(), sizeof(complaint->text) - 1);
    return text.empty();
}

Library make_library() {
    return {
        .abi = rail::nvshmem::kLibraryAbi,
        .bytes = sizeof(Library),
        .built = kVersion,
        .kernels = nullptr,
        .is_initialized = [] { return fake.is_initialized; },
        .my_pe = [] { return fake.pe; },
        .num_pes = [] { return fake.num_pes; },
        .make_unique_id =
            [](char* id, Complaint*) {
                std::strcpy(id, "the id");
                return true;
            },
        .initialize =
            [](const void*, const char* id, int rank, int num_ranks, Complaint* complaint) {
                CHECK_EQ(std::string(id), "the id");
                fake.is_initialized = fake.failure.empty();
                fake.pe = rank;
                fake.num_pes = num_ranks;
                return fail(complaint, fake.failure);
            },
        .join =
            [](const void*, Complaint*) {
                CHECK(fake.is_initialized);
                ++fake.num_joined;
                return true;
            },
        .allocate =
            [](const void*, size_t bytes, void** memory, Complaint*) {
                ++fake.num_allocated;
                fake.heap.emplace_back(bytes, 'x');
                *memory = fake.has_room ? fake.heap.back().data() : nullptr;
                return true;
            },
        .barrier =
            [](const void*, Complaint*) {
                ++fake.num_barriers;
                return true;
            },
        .reach = [](const void* window,
                    int pe) { return fake.is_reached && pe != fake.unreached ? const_cast<void*>(window) : nullptr; },
        .orders_nic_for_all = [](const void*) { return fake.orders_nic_for_all; },
        .launch_set =
            [](const SetParams* params, void*, Complaint* complaint) {
                ++fake.num_sets;
                // The peer does the same, so its word arrives here.
                rail::nvshmem::RailView view;
                std::memcpy(&view, params->rail.bytes, sizeof(view));
                if (!fake.is_cut) std::memcpy(view.window + 8 * params->peer, &params->value, sizeof(params->value));
                return fail(complaint, fake.failure);
            },
    };
}

// Rank `rank`, with NVSHMEM as it is in a fresh process.
class Rank {
public:
    explicit Rank(int rank = 0, Transport transport = Transport::kProxy) : rank_(rank) {
        fake = {};
        world_ = std::make_unique<World>(library_, kVersion, transport);
    }

    std::unique_ptr<NvshmemEngine> make_engine(size_t window_bytes = kWindowBytes) {
        return std::make_unique<NvshmemEngine>(
            device_, *world_, rail::nvshmem::NvshmemOptions{.rank = rank_, .window_bytes = window_bytes});
    }
    // Of the other ranks, as if they had done the same; `change` is what is different there.
    static std::vector<std::string> addresses(
        const NvshmemEngine& engine, int num_ranks,
        const std::function<void(Introduction&)>& change = [](Introduction&) {}) {
        std::vector<std::string> all;
        for (int rank = 0; rank < num_ranks; ++rank) {
            Introduction other;
            std::memcpy(&other, engine.address().data(), sizeof(other));
            other.rank = rank;
            if (other.is_initialized) other.pe = rank;
            std::strcpy(other.unique_id, "the id");
            if (rank == num_ranks - 1) change(other);
            all.emplace_back(reinterpret_cast<const char*>(&other), sizeof(other));
        }
        return all;
    }
    std::unique_ptr<NvshmemEngine> connect(int num_ranks, size_t window_bytes = kWindowBytes) {
        auto engine = make_engine(window_bytes);
        engine->connect(addresses(*engine, num_ranks), {1 - rank_});
        return engine;
    }

private:
    const int rank_;
    const Library library_ = make_library();
    const std::shared_ptr<dev::Device> device_ = simt::make_cpu_device();
    std::unique_ptr<World> world_;
};

std::string failure_of(const std::function<void()>& step) {
    try {
        step();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// What a rank says of another that is different in one thing.
std::string refusal(const std::function<void(Introduction&)>& change) {
    Rank rank;
    const auto engine = rank.make_engine();
    return failure_of([&] { engine->connect(Rank::addresses(*engine, 2, change), {1}); });
}

TEST_CASE("nvshmem: which version goes with which") {
    using rail::nvshmem::why_unfit;
    CHECK_EQ(why_unfit({3, 4, 5}, {3, 4, 5}), "");
    CHECK_EQ(why_unfit({3, 3, 20}, {3, 4, 5}), "");
    CHECK_EQ(why_unfit({3, 5, 19}, {3, 8, 0}), "");
    CHECK_EQ(why_unfit({3, 4, 5}, {3, 4, 1}), "");  // a patch says nothing
    CHECK(contains(why_unfit({3, 4, 5}, {3, 3, 20}), "older"));
    CHECK(contains(why_unfit({3, 4, 5}, {3, 8, 0}), "3.5.19"));
    CHECK(contains(why_unfit({3, 5, 19}, {3, 5, 2}), "3.5.19"));
    CHECK(contains(why_unfit({2, 11, 0}, {3, 4, 5}), "major"));
}

TEST_CASE("nvshmem: a library of another version is refused") {
    Library library = make_library();
    CHECK(contains(failure_of([&] { World(library, {3, 8, 0}, Transport::kProxy); }), "build-nvshmem"));
    library.abi += 1;
    CHECK(contains(failure_of([&] { World(library, kVersion, Transport::kProxy); }), "another version of deep_ep"));
}

TEST_CASE("nvshmem: what is not there is said, with what to do") {
    using rail::nvshmem::load_world;
    CHECK(contains(failure_of([] { rail::nvshmem::loaded_world(); }), "not loaded"));
    const std::string text = failure_of([] { load_world("/nowhere/libnvshmem_host.so.3", {}, Transport::kProxy); });
    CHECK(contains(text, "/nowhere/libnvshmem_host.so.3"));
    CHECK(contains(text, "NVSHMEM_DIR"));
}

TEST_CASE("nvshmem: the first engine makes the world, the next ones use it") {
    Rank rank;
    const auto first = rank.connect(2);
    CHECK(fake.is_initialized);
    CHECK_EQ(fake.num_pes, 2);
    const auto second = rank.connect(2);
    CHECK_EQ(fake.num_joined, 1);
    CHECK_EQ(fake.num_allocated, 2);
    CHECK_NE(first->window().device, second->window().device);
    CHECK_EQ(static_cast<char*>(second->window().device)[kWindowBytes - 1], 0);  // the heap is not zeroed by NVSHMEM
}

TEST_CASE("nvshmem: a world that somebody else has made is joined when its members are the group's") {
    Rank rank(1);
    fake.is_initialized = true;
    fake.pe = 1;
    fake.num_pes = 2;
    const auto engine = rank.connect(2);
    CHECK_EQ(fake.num_joined, 1);
    fake.num_pes = 4;
    CHECK(contains(failure_of([&] { rank.connect(2); }), "must span all of it"));
}

TEST_CASE("nvshmem: ranks keep their own numbers, whatever the world's are") {
    Rank rank;
    fake.is_initialized = true;
    fake.num_pes = 3;
    const auto engine = rank.make_engine();
    std::vector<Introduction> all(3);
    for (int i = 0; i < 3; ++i) {
        std::memcpy(&all[static_cast<size_t>(i)], engine->address().data(), sizeof(Introduction));
        all[static_cast<size_t>(i)].pe = 2 - i;
    }
    const World world(make_library(), kVersion, Transport::kProxy);
    CHECK(world.pes_of(all) == std::vector<int32_t>{2, 1, 0});
    all[1].pe = 2;
    CHECK_THROWS_AS(world.pes_of(all), TransportError);
}

TEST_CASE("nvshmem: what must be the same on every rank is named") {
    CHECK(contains(refusal([](Introduction& other) {
                       other.loaded = {3, 8, 0};
                   }),
                   "3.8.0 (engine built with 3.4.5) on rank 1"));
    CHECK(contains(refusal([](Introduction& other) { other.window_bytes += 8; }), "4104 on rank 1"));
    CHECK(contains(refusal([](Introduction& other) { other.transport = Transport::kGpu; }), "IBGDA on rank 1"));
    const std::string text = refusal([](Introduction& other) { other.is_initialized = 1, other.num_pes = 5; });
    CHECK(contains(text, "rank 1 is in a world of 5 members already, rank 0 in none"));
    CHECK(contains(text, "start new processes for all ranks"));
    CHECK(contains(refusal([](Introduction& other) { other.num_windows = 3; }), "3 on rank 1"));
    CHECK(contains(refusal([](Introduction& other) { other.magic[0] = 'h'; }), "another engine"));
    CHECK_EQ(refusal([](Introduction&) {}), "");
}

TEST_CASE("nvshmem: a window goes to the next engine, once every rank has given it back") {
    Rank rank;
    auto engine = rank.connect(2);
    void* const window = engine->window().device;
    static_cast<char*>(window)[100] = 7;
    engine->release(1);
    engine->release(1);
    engine = rank.connect(2, kWindowBytes / 2);
    CHECK_EQ(engine->window().device, window);
    CHECK_EQ(static_cast<char*>(window)[100], 0);
    CHECK_EQ(fake.num_allocated, 1);
    engine.reset();
    const int num_barriers = fake.num_barriers;
    const auto larger = rank.connect(2, 2 * kWindowBytes);
    CHECK_EQ(fake.num_allocated, 2);
    CHECK_EQ(fake.num_barriers, num_barriers + 4);
    // A peer that still uses its part of the first.
    const auto next = rank.make_engine();
    next->connect(Rank::addresses(*next, 2, [](Introduction& other) { other.free_windows = 0; }), {1});
    CHECK_EQ(fake.num_allocated, 3);
}

TEST_CASE("nvshmem: an engine that was never connected goes without a word") {
    Rank rank;
    rank.make_engine()->release(1);
    CHECK_EQ(fake.num_barriers, 0);
    CHECK_FALSE(fake.is_initialized);
}

TEST_CASE("nvshmem: a peer whose words do not arrive is named before any kernel waits for one") {
    Rank rank;
    fake.is_cut = true;
    CHECK(contains(failure_of([&] { rank.connect(2); }), "a word from rank 1 to rank 0 has not arrived"));
}

TEST_CASE("nvshmem: what NVSHMEM refuses is told") {
    Rank rank;
    fake.failure = "status 7";
    CHECK(contains(failure_of([&] { rank.connect(2); }), "status 7"));
    fake.failure = "";
    fake.has_room = false;
    CHECK(contains(failure_of([&] { rank.connect(2); }), "NVSHMEM_SYMMETRIC_SIZE"));
}

TEST_CASE("nvshmem: a word that the host cannot send is reported by check()") {
    Rank rank;
    const auto engine = rank.connect(2);
    engine->check();
    fake.failure = "the context is broken";
    engine->set(1, 0, 1);
    CHECK(contains(failure_of([&] { engine->check(); }), "the context is broken"));
}

TEST_CASE("nvshmem: kernels learn whose windows stores reach") {
    for (const bool is_reached : {true, false}) {
        Rank rank;
        fake.is_reached = is_reached;
        const auto engine = rank.connect(2);
        rail::nvshmem::RailView view;
        std::memcpy(&view, engine->params().bytes, sizeof(view));
        CHECK_EQ(view.is_every_peer_reached, is_reached);
        CHECK(view.reached[0] == nullptr);
        CHECK_EQ(static_cast<void*>(view.reached[1]), is_reached ? engine->window().device : nullptr);
    }
}

TEST_CASE("nvshmem: chunks are as large as the transport needs") {
    using rail::nvshmem::transport_of;
    const auto chunk = [](bool is_reached, Transport transport) {
        Rank rank(0, transport);
        fake.is_reached = is_reached;
        return rank.connect(2)->chunk_bytes();
    };
    CHECK_EQ(chunk(false, transport_of("", true)), size_t{128} << 10);
    CHECK_EQ(chunk(false, transport_of("ibrc", false)), size_t{512} << 10);
    CHECK_EQ(chunk(false, transport_of("libfabric", false)), size_t{1} << 20);
    CHECK_EQ(chunk(true, transport_of("libfabric", false)), size_t{128} << 10);
}

TEST_CASE("nvshmem: windows are shared where neighbours reach them, and see what arrives there in its order") {
    // Rank 1 is in another node, rank 2 a neighbour.
    const auto num_shared = [](int unreached, bool orders_nic_for_all) {
        Rank rank;
        fake.unreached = unreached;
        fake.orders_nic_for_all = orders_nic_for_all;
        return rank.connect(3)->share_windows({0, 2}).size();
    };
    CHECK_EQ(num_shared(-1, false), 2);
    CHECK_EQ(num_shared(1, false), 0);
    CHECK_EQ(num_shared(1, true), 2);
    CHECK_EQ(num_shared(2, true), 0);
}

}  // namespace
}  // namespace deep_ep::testing
