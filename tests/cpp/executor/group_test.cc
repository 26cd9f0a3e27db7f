// Groups of threads: what they are, and that the executor reports a group that is not whole, by the place where its
// threads meet next. Each fault is planted in a kernel that is clean without it.
#include "device/algo/group.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "device/launch.h"
#include "device/simt/device.h"
#include "support/complaints.h"

using namespace deep_ep;
using namespace deep_ep::testing;

namespace {

constexpr int kNumThreads = 128;

enum class Fault {
    kNone,
    kLaneAway,         // one lane stays away from a call of its warp
    kLaneTwice,        // one lane makes it twice
    kLaneElsewhere,    // one lane calls something else meanwhile
    kLaneReturned,     // one lane has returned
    kLaneAwayTillEnd,  // nothing follows in which the lanes meet
    kWarpAway,         // one warp stays away from a call of its block
    kWarpAwayTillEnd,
    kWarpReturned,
};

template <class Group> EP_DEVICE void do_something(const Group& group) { group.expect(); }
template <class Group> EP_DEVICE void do_something_else(const Group& group) { group.expect(); }

struct Params {
    int* words;
};

template <Fault kFault> struct FaultKernel {
    using Params = ::Params;
    struct Shared {};

    static EP_DEVICE bool is(Fault fault) { return kFault == fault; }

    static EP_DEVICE void run_warp(int lane) {
        const algo::Warp warp;
        if (is(Fault::kLaneReturned) && lane == 5) return;
        if (!((is(Fault::kLaneAway) || is(Fault::kLaneAwayTillEnd)) && lane == 5)) {
            if (is(Fault::kLaneElsewhere) && lane == 5)
                do_something_else(warp);
            else
                do_something(warp);
        }
        if (is(Fault::kLaneTwice) && lane == 5) do_something(warp);
        if (is(Fault::kLaneAwayTillEnd)) return;
        warp.sync();
    }

    static EP_DEVICE void run_block(int warp_idx) {
        const algo::Block block;
        if (is(Fault::kWarpReturned) && warp_idx == 2) return;
        if (!((is(Fault::kWarpAway) || is(Fault::kWarpAwayTillEnd)) && warp_idx == 2)) do_something(block);
        if (is(Fault::kWarpAwayTillEnd)) return;
        block.sync();
    }

    static EP_DEVICE void run(const Params&, Shared&) {
        const int warp_idx = prim::warp_idx();
        run_block(warp_idx);
        if (warp_idx == 1) run_warp(prim::lane_idx());
    }
};

template <Fault kFault> std::string complaint(uint64_t seed = 0) {
    simt::Scheduler scheduler({.seed = seed});
    simt::SimtDevice device(scheduler, 0);
    const auto stream = device.create_stream();
    dev::launch<FaultKernel<kFault>>({.num_threads = kNumThreads, .name = "groups"}, stream, {nullptr});
    return error_of([&] { device.synchronize_stream(stream); });
}

// Which thread finds out, and whether others have ended by then, depends on the schedule; that there is a report does not.
template <Fault kFault> void check_is_reported(const std::string& in_order) {
    CHECK(contains(complaint<kFault>(), in_order));
    for (uint64_t seed = 1; seed < 20; ++seed) {
        CAPTURE(seed);
        CHECK(complaint<kFault>(seed) != "");
    }
}

struct RanksKernel {
    using Params = ::Params;
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        int* words = p.words;
        algo::for_each(algo::Block{}, 300, [&](int i) { ++words[i]; });
        algo::for_each(algo::Grid{}, int64_t{300}, [&](int64_t i) { ++words[i + 300]; });
        if (prim::warp_idx() == 3) algo::for_each(algo::Warp{}, 300, [&](int i) { ++words[i + 600]; });
    }
};

}  // namespace

TEST_CASE("every group deals each number to one of its threads") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    const auto stream = device.create_stream();
    constexpr size_t kBytes = 900 * sizeof(int);
    auto* words = static_cast<int*>(device.allocate(kBytes));
    std::vector<int> counts(900, 0);
    device.copy_now(words, counts.data(), kBytes);
    dev::launch<RanksKernel>({.num_threads = kNumThreads, .name = "ranks"}, stream, {words});
    device.synchronize_stream(stream);
    device.copy_now(counts.data(), words, kBytes);
    CHECK(counts == std::vector<int>(900, 1));
}

TEST_CASE("whole groups are no reason to complain") {
    for (uint64_t seed = 0; seed < 10; ++seed) CHECK(complaint<Fault::kNone>(seed) == "");
}

TEST_CASE("a warp that is not whole is reported") {
    const std::string away = complaint<Fault::kLaneAway>();
    CHECK(contains(away, "kernel \"groups\" block 0 warp 1 lane 5: the threads of a warp do not make the same calls"));
    CHECK(contains(away, "this one has made none; warp 1 lane "));
    CHECK(contains(away, "has made 1, the last of them do_something"));
    check_is_reported<Fault::kLaneAway>("the threads of a warp do not make the same calls");
    check_is_reported<Fault::kLaneTwice>("the threads of a warp do not make the same calls");
    check_is_reported<Fault::kLaneElsewhere>("the last of them do_something_else");
    check_is_reported<Fault::kLaneAwayTillEnd>("the threads of a warp do not make the same calls");
    check_is_reported<Fault::kLaneReturned>("");
}

TEST_CASE("a block that is not whole is reported") {
    check_is_reported<Fault::kWarpAway>("the threads of a block do not make the same calls");
    check_is_reported<Fault::kWarpAwayTillEnd>("the threads of a block do not make the same calls");
    check_is_reported<Fault::kWarpReturned>("");
}
