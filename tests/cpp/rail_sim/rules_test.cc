// What the engine `sim` finds: each rule broken on purpose, and orders that no kernel may rely on.
#include <doctest/doctest.h>

#include <string>

#include "device/launch.h"
#include "rail/rail.h"
#include "rail_sim/sim_world.h"
#include "support/complaints.h"
#include "support/races.h"

namespace deep_ep::testing {
namespace {

using prim::Order;
using prim::Scope;

constexpr uint64_t kFlagA = 0, kFlagB = 8, kDataA = 128, kDataB = 128 + 256, kSource = 1024, kWindowBytes = 2048;

struct Forever {
    template <class Look> bool operator()(uint64_t, const Look& look) const {
        uint64_t seen = 0;
        while (!look(seen)) prim::pause();
        return true;
    }
};

enum class Fault {
    kNone,
    kTail,       // the second flag is taken to tell of the first put too
    kNoConfirm,  // the flag is seen, and not confirmed
    kTouch,      // the source is changed at once
    kTwice,      // the flag is written again at once
    kOutside,    // more bytes than the window has
    kNobody,     // to a rank that is not there
    kNeverSent,
};

// Rank 0 puts A, then B; rank 1 reads both. (A kernel for each fault: ThreadSanitizer reports a place in the code once.)
template <Fault kFault> struct FaultKernel {
    struct Params {
        rail::Params rail;
        int rank;
        uint32_t* num_wrong;
    };
    struct Shared {};

    static void run(const Params& p, Shared&) {
        const rail::Rail rail(p.rail);
        p.rank == 0 ? send(rail) : receive(p, rail);
    }

    static void send(const rail::Rail& rail) {
        auto* source = rail::at<uint32_t>(rail, kSource);
        source[threadIdx.x] = 1 + threadIdx.x;
        const uint32_t bytes = kFault == Fault::kOutside ? 2048 : 128;
        const int peer = kFault == Fault::kNobody ? 2 : 1;
        rail::put(rail, peer, {kDataA, kSource, bytes}, {kFlagA, 1}, Forever{});
        if (kFault == Fault::kTouch) source[threadIdx.x] = 0;
        if (kFault == Fault::kTwice) rail::put(rail, 1, {kDataA, kSource, 128}, {kFlagA, 2}, Forever{});
        if (kFault != Fault::kNeverSent) rail::put(rail, 1, {kDataB, kSource, 128}, {kFlagB, 1}, Forever{});
    }

    static void receive(const Params& p, const rail::Rail& rail) {
        if (kFault != Fault::kTail) wait(rail, kFlagA);
        wait(rail, kFlagB);
        const bool is_right = rail::at<uint32_t>(rail, kDataA)[threadIdx.x] == 1 + threadIdx.x &&
                              rail::at<uint32_t>(rail, kDataB)[threadIdx.x] == 1 + threadIdx.x;
        if (!is_right) prim::fetch_add<Order::kRelaxed, Scope::kGpu>(p.num_wrong, 1u);
    }

    static void wait(const rail::Rail& rail, uint64_t flag) {
        if (prim::lane_idx() == 0) {
            Forever{}(1, [&](uint64_t& seen) {
                seen = prim::load<Order::kRelaxed, Scope::kSys>(rail::at<uint64_t>(rail, flag));
                return seen == 1;
            });
            if (kFault != Fault::kNoConfirm) rail::confirm(rail, {flag, 1});
        }
        __syncwarp();
    }
};

struct Outcome {
    bool is_wrong = false;
    std::string error;
    uint64_t trace = 0;
};

template <Fault kFault> Outcome run(uint64_t seed) {
    SimWorld world({.num_ranks = 2, .window_bytes = kWindowBytes, .seed = seed});
    auto* num_wrong = static_cast<uint32_t*>(world.device(1).allocate(sizeof(uint32_t)));
    Outcome outcome;
    outcome.error = error_of([&] {
        world.run(
            [&](int rank, dev::Stream stream) {
                dev::launch<FaultKernel<kFault>>({.num_threads = 32, .name = "fault"}, stream,
                                                 {world.engine(rank).params(), rank, num_wrong});
            },
            [] {});
    });
    uint32_t count = 0;
    world.device(1).copy_now(&count, num_wrong, sizeof(count));
    outcome.is_wrong = count != 0;
    outcome.trace = world.trace_hash();
    world.device(1).free(num_wrong);
    return outcome;
}

template <Fault kFault> void check_found(const std::string& words) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        const Outcome outcome = run<kFault>(seed);
        INFO("seed ", seed, ": ", outcome.error);
        CHECK_NE(outcome.error.find(words), std::string::npos);
    }
}

#if defined(EP_SIMT_TSAN)
template <Fault kFault> void check_race() {
    const int num_before = num_races();
    run<kFault>(0);
    CHECK_GT(num_races(), num_before);
    expect_races(num_races() - num_before);
}

TEST_CASE("sim: ThreadSanitizer finds relied-on order and a missing confirm in one schedule") {
    check_race<Fault::kTail>();
    check_race<Fault::kNoConfirm>();
}
#endif

TEST_CASE("sim: a program that keeps the rules is right with every seed") {
    for (uint64_t seed = 0; seed < 40; ++seed) {
        const Outcome outcome = run<Fault::kNone>(seed);
        CHECK_FALSE(outcome.is_wrong);
        CHECK_EQ(outcome.error, "");
    }
}

TEST_CASE("sim: a source that is touched too early") {
    check_found<Fault::kTouch>("has changed what it put from 1024");
}

TEST_CASE("sim: a flag that is written again too early") {
    check_found<Fault::kTwice>("writes the flag at 0 of rank 1 again");
}

TEST_CASE("sim: places outside the window, and peers that are none") {
    check_found<Fault::kOutside>("posts 2048 bytes from 1024 to 128");
    check_found<Fault::kNobody>("rank 0 posts to rank 2, which is no peer");
}

TEST_CASE("sim: a wait for what nobody sends is a deadlock, with a report") {
    check_found<Fault::kNeverSent>("deadlock");
}

TEST_CASE("sim: a flag that is taken to tell of an earlier put gives wrong bytes") {
    const int num_before = num_races();
    int num_wrong = 0;
    for (uint64_t seed = 0; seed < 60; ++seed) num_wrong += run<Fault::kTail>(seed).is_wrong;
    CHECK_GT(num_wrong, 10);
    CHECK_LT(num_wrong, 60);
    expect_races(num_races() - num_before);
}

TEST_CASE("sim: a seed replays a run") {
    CHECK_EQ(run<Fault::kNone>(5).trace, run<Fault::kNone>(5).trace);
    CHECK_NE(run<Fault::kNone>(5).trace, run<Fault::kNone>(6).trace);
}

}  // namespace
}  // namespace deep_ep::testing
