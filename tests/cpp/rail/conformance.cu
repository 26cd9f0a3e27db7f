// What every engine must do, in kernels that know none: run over `host` on the CPU and on GPUs, over `nvshmem` between
// processes, and over `sim`.
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "core/non_copyable.h"
#include "rail/rail_world.h"
#include "rail/streams.h"
#include "support/testing.h"

namespace deep_ep::testing {
namespace {

// Every thread of every rank adds to the counter of every peer, then waits for the sum of all.
struct AddsKernel : TrafficKernel<AddsKernel> {
    static EP_DEVICE void take_part(const Traffic& p, const rail::Rail& rail, const Patience& patience) {
        bool is_whole = true;
        for (int i = 0; i < p.num_messages; ++i)
            for (int peer = 0; peer < p.places.num_ranks && is_whole; ++peer)
                if (peer != p.rank) is_whole = rail::add(rail, peer, p.places.counter(), threadIdx.x + 1, patience);
        __syncwarp();
        const uint64_t of_one = static_cast<uint64_t>(blockDim.x) * (blockDim.x + 1) / 2;
        const uint64_t of_all = of_one * static_cast<uint64_t>((p.places.num_ranks - 1) * p.num_messages);
        if (threadIdx.x == 0) is_whole = is_whole && wait_for_word(rail, patience, p.places.counter(), p.call * of_all);
        if (!is_whole) count(p.num_lost, 1);
    }
};

// A put of which the peer's kernel reads nothing: waits until it is told to stop.
struct WaitKernel : TrafficKernel<WaitKernel> {
    static EP_DEVICE void take_part(const Traffic& p, const rail::Rail& rail, const Patience& patience) {
        if (threadIdx.x != 0) return;
        const bool is_here = wait_for_word(rail, patience, p.places.arrived(p.rank, 0), ~uint64_t{0});
        const uint64_t told = prim::load<Order::kRelaxed, Scope::kSys>(rail::at<uint64_t>(rail, p.places.abort()));
        if (told != 0) rail::confirm(rail, {p.places.abort(), told});
        count(p.num_lost, is_here ? 0 : 1);
        count(p.num_errors, told);
    }
};

// A world, and what its kernels count.
class Case : NonCopyable {
public:
    Case(const RailOptions& options, const Places& places, int num_messages)
        : places_(places), num_messages_(num_messages), seed_(options.seed) {
        RailOptions sized = options;
        sized.num_ranks = places.num_ranks;
        sized.window_bytes = places.bytes();
        world_ = make_rail_world(sized);
        for (const int rank : world_->own_ranks())
            counts_[rank] = static_cast<uint64_t*>(world_->device(rank).allocate(2 * sizeof(uint64_t)));
    }
    ~Case() {
        for (const auto& [rank, counts] : counts_) world_->device(rank).free(counts);
    }

    Traffic traffic(int rank, uint64_t call) const {
        uint64_t* counts = counts_.at(rank);
        return {world_->engine(rank).params(), places_, rank,      num_messages_, seed_, call,
                RailWorld::timeout_ns(),       counts,  counts + 1};
    }
    template <class K>
    void run(
        int num_warps, uint64_t call, const std::function<void()>& beside = [] {}) {
        world_->run(
            [&](int rank, dev::Stream stream) {
                dev::LaunchConfig config;
                config.num_threads = num_warps * prim::kWarpSize;
                config.name = "rail";
                const dev::CurrentDevice current(world_->device(rank));
                dev::launch<K>(config, stream, traffic(rank, call));
            },
            beside);
    }
    // [0] errors, [1] lost
    std::vector<uint64_t> counts(int rank) {
        std::vector<uint64_t> values(2);
        world_->device(rank).copy_now(values.data(), counts_.at(rank), 2 * sizeof(uint64_t));
        return values;
    }
    void check_clean() {
        for (const int rank : world_->own_ranks()) {
            CHECK_EQ(counts(rank)[0], uint64_t{0});
            CHECK_EQ(counts(rank)[1], uint64_t{0});
        }
    }
    RailWorld& world() { return *world_; }

private:
    const Places places_;
    const int num_messages_;
    const uint64_t seed_;
    std::unique_ptr<RailWorld> world_;
    std::map<int, uint64_t*> counts_;  // by rank
};

void check_streams(const RailOptions& options, Places places, int num_messages, uint64_t num_calls) {
    places.num_ranks = RailWorld::num_ranks(places.num_ranks);
    Case test(options, places, num_messages);
    const int rank = test.world().own_ranks().front(), peer = (rank + 1) % places.num_ranks;
    rail::Traffic expected{};
    for (uint64_t call = 1; call <= num_calls; ++call) {
        test.run<StreamsKernel>(2 * (places.num_ranks - 1), call);
        test.check_clean();
        const int num_taken = num_messages > places.num_slots ? num_messages - places.num_slots : 0;
        expected.num_messages += static_cast<uint64_t>(num_messages + num_taken);
        for (int i = 0; i < num_messages; ++i)
            expected.num_bytes += 4 * test.traffic(rank, call).num_words(rank, peer, i);
    }
    CHECK_EQ(test.world().engine(rank).sent_to(peer).num_messages, expected.num_messages);
    CHECK_EQ(test.world().engine(rank).sent_to(peer).num_bytes, expected.num_bytes);
}

// A round of a test for each seed.
void for_each_seed(const std::function<void(RailOptions&)>& round) {
    for (const uint64_t seed : RailWorld::seeds()) {
        CAPTURE(seed);
        RailOptions options;
        options.seed = seed;
        options.is_near = seed % 2 == 1;
        round(options);
    }
}

TEST_CASE("rail: puts come with their flags, through slots that are used again") {
    for_each_seed([](const RailOptions& options) { check_streams(options, {2, 3, 512}, 20, 2); });
}

TEST_CASE("rail: one slot, and more than are ever used") {
    for_each_seed([](const RailOptions& options) {
        check_streams(options, {2, 1, 64}, 9, 1);
        check_streams(options, {2, 16, 64}, 5, 1);
    });
}

TEST_CASE("rail: many peers, and messages larger than anything on the way") {
    for_each_seed([](const RailOptions& options) {
        check_streams(options, {5, 2, 1024}, 8, 1);
        check_streams(options, {2, 2, 1 << 16}, 6, 1);
    });
}

TEST_CASE("rail: a ring that is full makes posters wait") {
    for_each_seed([](RailOptions& options) {
        for (const uint32_t capacity : {1u, 8u}) {
            options.ring_capacity = capacity;
            check_streams(options, {3, 4, 128}, 12, 2);
        }
    });
}

TEST_CASE("rail: adds of all threads add up") {
    for_each_seed([](RailOptions& options) {
        options.ring_capacity = 16;
        Case test(options, {RailWorld::num_ranks(3), 1, 64}, 3);
        for (uint64_t call = 1; call <= 2; ++call) test.run<AddsKernel>(2, call);
        test.check_clean();
        const int rank = test.world().own_ranks().front(), peer = rank == 0 ? 1 : 0;
        CHECK_EQ(test.world().engine(rank).sent_to(peer).num_messages, uint64_t{2 * 3 * 64});
    });
}

TEST_CASE("rail: a host that gives up ends the waits of its peers' kernels") {
    for_each_seed([](const RailOptions& options) {
        const Places places{RailWorld::num_ranks(3), 1, 64};
        const int last = places.num_ranks - 1;
        Case test(options, places, 1);
        const std::vector<int> own_ranks = test.world().own_ranks();
        test.run<WaitKernel>(1, 1, [&] {
            for (const int rank : own_ranks) {
                if (rank == 0) test.world().engine(rank).set(last, places.abort(), 78);
                for (int peer = 0; rank == last && peer < last; ++peer)
                    test.world().engine(rank).set(peer, places.abort(), 77);
            }
        });
        for (const int rank : own_ranks) {
            CHECK_EQ(test.counts(rank)[0], uint64_t(rank == last ? 78 : 77));
            CHECK_EQ(test.counts(rank)[1], uint64_t{1});
        }
    });
}

}  // namespace
}  // namespace deep_ep::testing
