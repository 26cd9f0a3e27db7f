// Tensors that were changed after they were checked, or that do not belong together: the kernels refuse them by name.
#include <doctest/doctest.h>

#include <string>

#include "core/error.h"
#include "support/world.h"

namespace deep_ep::test {
namespace {

struct Way {
    uint32_t lending_ranks;
    bool has_bulk_copy;
};

World make_world(const Problem& problem, const Way& way) {
    simt::SchedulerOptions options;
    options.idle = simt::IdlePolicy::kAdvanceClock;
    const simt::DeviceOptions device{.has_bulk_copy = way.has_bulk_copy};
    return World(problem.num_ranks(), 1 << 18, options, 100, 0, false, {device}, 1 << 20);
}

template <class Check> void check_every_way(const Check& check) {
    for (uint32_t lending_ranks : {0, 1, 2, 3}) {
        for (bool has_bulk_copy : {false, true}) {
            CAPTURE(lending_ranks);
            CAPTURE(has_bulk_copy);
            check(Way{lending_ranks, has_bulk_copy});
        }
    }
}

void check_refusal(World& world, const std::string& told) {
    CHECK_THROWS_WITH_AS(world.buffer(0).check(), doctest::Contains(told.c_str()), InvalidArgument);
}

// A number of the prefix matrix of rank 0 that cannot be there, and what is said of it.
struct Lie {
    size_t source, destination;
    int end;
    std::string told;
};

std::vector<Lie> make_lies(const std::vector<int>& matrix) {
    const int num_here = matrix[2], num_there = matrix[3];
    return {{0, 0, -5, "rows from rank 0 to rank 0 begin at 0 and end at -5."},
            {0, 0, num_here + 1, "to rank 0 begin at"},
            {0, 1, -1'000'000, "rows from rank 0 to rank 1 begin at 0 and end at -1000000."},
            {0, 1, num_there + 4, "to rank 1 begin at"},
            {1, 0, -2'000'000'000, "to rank 0 begin at"}};
}

template <class Launch> void check_lies(const Way& way, const Launch& launch) {
    for (size_t lie = 0; lie < 5; ++lie) {
        CAPTURE(lie);
        const Problem problem{
            .num_tokens = {9, 9}, .num_experts = 2, .drop_probability = 0.0, .lending_ranks = way.lending_ranks};
        World world = make_world(problem, way);
        auto ranks = world.dispatched(problem);
        const Lie told = make_lies(ranks[0].rank_prefix_matrix)[lie];
        ranks[0].rank_prefix_matrix[told.source * 2 + told.destination] = told.end;
        launch(world, problem, ranks);
        world.run();
        check_refusal(world, told.told);
    }
}

TEST_CASE("a prefix matrix that goes down, or beyond the rows of a rank, is refused by combine") {
    check_every_way([](const Way& way) {
        check_lies(way, [](World& world, const Problem& problem, std::vector<RankTensors>& ranks) {
            world.combine_on(problem, ranks, {0, 1});
        });
    });
}

TEST_CASE("a prefix matrix that goes down is refused by a dispatch with a handle") {
    check_every_way([](const Way& way) {
        check_lies(way, [](World& world, const Problem& problem, std::vector<RankTensors>& ranks) {
            for (RankTensors& tensors : ranks) prepare_recv(problem, tensors, tensors.num_recv_tokens);
            for (int rank = 0; rank < 2; ++rank)
                world.launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kKnown);
        });
    });
}

// A peer lends as many rows as it has; a handle that puts ours behind them belongs to another call.
TEST_CASE("a prefix matrix that goes beyond what a peer lends is refused by combine") {
    for (bool has_bulk_copy : {false, true}) {
        const Problem problem{.num_tokens = {9, 9}, .num_experts = 2, .drop_probability = 0.0, .lending_ranks = 3};
        World world = make_world(problem, {3, has_bulk_copy});
        auto ranks = world.dispatched(problem);
        for (size_t source : {0, 1}) ranks[0].rank_prefix_matrix[source * 2 + 1] += 100;
        world.combine_on(problem, ranks, {0, 1});
        check_refusal(world, "rows from rank 0 to rank 1 begin at 0");
    }
}

// A token that is sent somewhere.
int some_token(const RankTensors& tensors) {
    int token = 0;
    while (tensors.topk_idx[static_cast<size_t>(token) * 2] < 0) ++token;
    return token;
}

TEST_CASE("an expert that is out of range when dispatch reads it is no -1") {
    for (Counts counts : {Counts::kUnknown, Counts::kExchanged}) {
        for (int64_t expert : {int64_t{-2}, int64_t{2}, int64_t{1} << 32, -(int64_t{1} << 40)}) {
            check_every_way([&](const Way& way) {
                CAPTURE(static_cast<int>(counts));
                CAPTURE(expert);
                const Problem problem{.num_tokens = {10, 12}, .num_experts = 2, .lending_ranks = way.lending_ranks};
                World world = make_world(problem, way);
                auto ranks = world.dispatched(problem);
                const int token = some_token(ranks[0]);
                ranks[0].topk_idx[static_cast<size_t>(token) * 2] = expert;
                for (int rank = 0; rank < 2 && counts == Counts::kExchanged; ++rank)
                    world.launch_notify(problem, ranks[static_cast<size_t>(rank)], rank);
                for (int rank = 0; rank < 2; ++rank) {
                    RankTensors& tensors = ranks[static_cast<size_t>(rank)];
                    if (counts == Counts::kExchanged) world.wait_counts(rank);
                    prepare_recv(problem, tensors, tensors.num_recv_tokens);
                    world.launch_dispatch(problem, tensors, rank, counts);
                }
                world.run();
                World::collect(ranks);
                CHECK_EQ(check_void_dispatch(ranks[0], false), "");
                check_refusal(world, "topk_idx of token " + std::to_string(token) +
                                         " must be -1 or an expert below 2, got " + std::to_string(expert));
            });
        }
    }
}

}  // namespace
}  // namespace deep_ep::test
