// Calls across nodes that cannot end well: ranks that do not come, and input that contradicts. Every rank ends in time, says what it
// knows of all ranks, and leaves nothing that passes for a result.
#include <doctest/doctest.h>

#include <initializer_list>

#include "internode/internode_world.h"
#include "kernels/wait_counters.h"

namespace deep_ep::test {
namespace {

using layout::FailureKind;
using layout::Stage;

// Virtual time passes while everybody waits.
InternodeOptions impatient_options(int num_nodes, int ranks_per_node) {
    InternodeOptions options{.num_nodes = num_nodes, .ranks_per_node = ranks_per_node};
    options.scheduler = impatient();
    options.timeout_s = 2;
    return options;
}

Problem small_problem(const InternodeOptions& options) {
    return {.num_tokens = std::vector<int>(static_cast<size_t>(options.num_ranks()), 8),
            .num_experts = options.num_ranks(),
            .num_topk = 3,
            .hidden = 16,
            .drop_probability = 0.0};
}

// The rank that a record blames: itself or others.
int blamed_by(const InternodeWorld& world, int rank) {
    const layout::WaitRecord& record = world.status(rank).failure;
    return record.kind == FailureKind::kAborted ? layout::abort_missing(record.seen) : record.peer;
}

// A world with one call.
struct Case {
    InternodeOptions options;
    Problem problem;
    InternodeWorld world;
    InternodeCall call;

    explicit Case(const InternodeOptions& given)
        : options(given), problem(small_problem(given)), world(given, problem), call(problem, given) {}

    // A fresh dispatch of all ranks that may fail, its outputs as large as they must be.
    template <class Change> void dispatch(const Change& change) {
        for (int rank = 0; rank < world.num_ranks(); ++rank) world.prepare_dispatch(call, rank, false);
        change();
        world.run([&] {
            for (int rank = 0; rank < world.num_ranks(); ++rank) {
                world.launch_notify(call, rank);
                world.launch_dispatch(call, rank, Counts::kExchanged);
            }
        });
    }
    // The same of a combine; `absent`: a rank that does not call it.
    template <class Change> void combine(const Change& change, int absent = -1) {
        prepare_combine(problem, call.ranks);
        change();
        world.run([&] {
            for (int rank = 0; rank < world.num_ranks(); ++rank)
                if (rank != absent) world.launch_combine(call, rank);
        });
    }
    void check_all_failed_but(int absent) {
        for (int rank = 0; rank < world.num_ranks(); ++rank) {
            CAPTURE(rank);
            if (rank != absent) CHECK_NE(failure_of(world, rank), FailureKind::kNone);
        }
    }
    void check_all_failed() { check_all_failed_but(-1); }
    const layout::WaitRecord& failure(int rank) const { return world.status(rank).failure; }
    RankTensors& tensors(int rank) { return call.ranks[static_cast<size_t>(rank)]; }
    RailTensors& rail(int rank) { return call.rails[static_cast<size_t>(rank)]; }
};

TEST_CASE("a rank that never enters is named by every rank of every node") {
    for (const int absent : {0, 3, 5}) {
        CAPTURE(absent);
        Case test(impatient_options(3, 2));
        test.world.run([&] {
            for (int rank = 0; rank < 6; ++rank)
                if (rank != absent) test.world.launch_notify(test.call, rank);
        });
        test.check_all_failed_but(absent);
        for (int rank = 0; rank < 6; ++rank)
            if (rank != absent) CHECK_EQ(blamed_by(test.world, rank), absent);
    }
}

TEST_CASE("a rank that enters late is named by all, at the stage at which each waits for it") {
    constexpr int kLate = 3;  // rank 1 of node 1: 2 is its neighbour, 1 on its rail, 0 hears of it through 1
    Case test(impatient_options(2, 2));
    test.world.run([&] {
        for (int rank = 0; rank < kLate; ++rank) test.world.launch_notify(test.call, rank);
        simt::SimtDevice onlooker(test.world.scheduler(), 4, {});
        int looks = 0;
        onlooker.host_wait([&] { return ++looks > 100; }, 1e3);
        test.world.launch_notify(test.call, kLate);
    });
    for (int rank = 0; rank < kLate; ++rank) {
        CAPTURE(rank);
        const WaitTable waits(test.world.wait_cells(rank), 4);
        const Stage stage = rank == 2 ? Stage::kLoan : Stage::kRailCounts;  // it has counts of rank 1 to pass on to 2
        CHECK_EQ(waits.longest(layout::Operation::kNotifyDispatch), std::pair(stage, kLate));
        CHECK_EQ(waits.at(layout::Operation::kNotifyDispatch, stage, kLate).times_late, 1);
    }
}

TEST_CASE("a rank that stops between exchange and dispatch ends everybody, and nothing passes for a result") {
    Case test(impatient_options(2, 2));
    for (int rank = 0; rank < 4; ++rank) test.world.prepare_dispatch(test.call, rank, false);
    test.world.run([&] {
        for (int rank = 0; rank < 4; ++rank) {
            test.world.launch_notify(test.call, rank);
            if (rank != 2) test.world.launch_dispatch(test.call, rank, Counts::kExchanged);
        }
    });
    for (const int rank : {0, 1, 3}) {
        CAPTURE(rank);
        CHECK_NE(failure_of(test.world, rank), FailureKind::kNone);
        CHECK_EQ(check_void_dispatch(test.tensors(rank), false), "");
    }
}

TEST_CASE("a rank that skips combine ends everybody in time") {
    for (const int absent : {0, 3}) {
        Case test(impatient_options(2, 2));
        REQUIRE_EQ(test.world.dispatch(test.call), "");
        test.combine([] {}, absent);
        test.check_all_failed_but(absent);
        for (int rank = 0; rank < 4; ++rank)
            if (rank != absent) CHECK_EQ(check_void_combine(test.tensors(rank)), "");
    }
}

TEST_CASE("a host that gives up is heard by kernels of other nodes that wait for its rank") {
    Case test(impatient_options(2, 1));
    const auto control = layout::RailControl::make(2, 1);
    const uint64_t code = layout::make_abort_code(0, 0);
    test.world.run([&] {
        test.world.engine(0).set(1, control.abort.at(2 + 0), code);  // by the host of rank 0, of node 0
        test.world.launch_notify(test.call, 1);
    });
    CHECK_EQ(test.failure(1).kind, FailureKind::kAborted);
    CHECK_EQ(test.failure(1).seen, code);
}

// A rank sees it, the others hear of it: over their own node, or over the rail.
void check_refused(Case& test, int rank, Stage stage) {
    test.check_all_failed();
    CHECK_EQ(test.failure(rank).kind, FailureKind::kBadInput);
    CHECK_EQ(test.failure(rank).stage, stage);
    for (int other = 0; other < test.world.num_ranks(); ++other) {
        CAPTURE(other);
        if (other != rank && test.failure(other).kind == FailureKind::kAborted)
            CHECK_EQ(layout::abort_origin(test.failure(other).seen), rank);
    }
}

TEST_CASE("outputs that are too small are refused; nothing is written to them") {
    Case test(impatient_options(2, 2));
    test.dispatch([&] { prepare_recv(test.problem, test.tensors(1), test.tensors(1).num_recv_tokens - 1); });
    check_refused(test, 1, Stage::kCapacity);
    CHECK_EQ(check_void_dispatch(test.tensors(1), false), "");
}

TEST_CASE("a table of forwarded tokens that is too small is refused") {
    Case test(impatient_options(2, 2));
    test.dispatch([&] { test.rail(2).rail_head.resize(test.rail(2).rail_head.size() - 2); });
    check_refused(test, 2, Stage::kRailCapacity);
    CHECK_EQ(test.failure(2).seen, static_cast<uint64_t>(test.rail(2).num_rail_tokens));
}

TEST_CASE("counts that contradict are refused by the rank that gave them") {
    for (const int change : {-9, 9}) {
        Case test(impatient_options(2, 2));
        test.dispatch([&] { test.rail(3).num_tokens_per_node[0] += change; });
        check_refused(test, 3, Stage::kRailRows);
        CHECK_EQ(test.failure(3).peer, 1);
    }
}

TEST_CASE("ranks of different nodes that disagree about shapes say so") {
    Case test(impatient_options(2, 1));
    Problem other = test.problem;
    other.hidden = 8;
    InternodeCall different(other, test.options);
    test.world.run([&] {
        test.world.launch_notify(test.call, 0);
        test.world.launch_notify(different, 1);
    });
    bool is_seen = false;
    for (const int rank : {0, 1}) {
        CHECK_NE(failure_of(test.world, rank), FailureKind::kNone);
        is_seen |= test.failure(rank).stage == Stage::kRailShapes && test.failure(rank).peer == 1 - rank;
    }
    CHECK(is_seen);
}

TEST_CASE("tensors of a handle that do not belong together are refused before they are addresses") {
    struct Mistake {
        const char* name;
        int num_nodes, ranks_per_node;
        std::function<void(Case&)> make;
        int refused_by;
        Stage stage;
    };
    const Mistake mistakes[] = {
        {"rows that run backwards", 2, 2, [](Case& test) { test.tensors(0).rank_prefix_matrix[4] = -1; }, 0,
         Stage::kRows},
        {"a row that nobody has stated", 2, 2, [](Case& test) { test.tensors(0).send_head[0] = 100; }, 0,
         Stage::kPosition},
        {"a forwarded token's row that nobody has stated", 2, 2, [](Case& test) { test.rail(3).rail_head[0] = 100; }, 3,
         Stage::kPosition},
        {"tokens on the rail that run backwards", 3, 1, [](Case& test) { test.rail(1).rail_prefix[0] = 1 << 20; }, 1,
         Stage::kRailRows},
        {"a place on the rail beyond the last token's", 2, 1, [](Case& test) { test.rail(0).send_rail_head[1] = 100; },
         0, Stage::kRailRows},
    };
    for (const Mistake& mistake : mistakes) {
        CAPTURE(mistake.name);
        Case test(impatient_options(mistake.num_nodes, mistake.ranks_per_node));
        REQUIRE_EQ(test.world.dispatch(test.call), "");
        test.combine([&] { mistake.make(test); });
        check_refused(test, mistake.refused_by, mistake.stage);
    }
}

TEST_CASE("an expert id that has changed since the routing was made is reported with its token") {
    Case test(impatient_options(2, 2));
    test.dispatch([&] { test.tensors(2).topk_idx[3 * 3] = 77; });
    CHECK_EQ(test.failure(2).kind, FailureKind::kBadInput);
    CHECK_EQ(test.failure(2).stage, Stage::kInput);
    CHECK_EQ(test.failure(2).peer, 3);
}

TEST_CASE("after a failure, calls that were queued end at once and say so") {
    Case test(impatient_options(2, 2));
    test.dispatch([&] { test.rail(2).rail_head.clear(); });
    test.check_all_failed();
    test.combine([] {});
    for (int rank = 0; rank < 4; ++rank) CHECK_EQ(check_void_combine(test.tensors(rank)), "");
}

TEST_CASE("warps that are too few for their streams are an error of the caller") {
    InternodeOptions options = impatient_options(2, 34);
    options.num_blocks = 1;
    options.num_warps = 1;
    Problem problem{.num_tokens = std::vector<int>(68, 0), .num_experts = 68, .hidden = 8};
    InternodeWorld world(options, problem);
    InternodeCall call(problem, options);
    world.prepare_dispatch(call, 0, false);
    CHECK_THROWS_WITH(world.launch_dispatch(call, 0, Counts::kExchanged), doctest::Contains("too few warps"));
}

}  // namespace
}  // namespace deep_ep::test
