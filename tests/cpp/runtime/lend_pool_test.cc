#include "runtime/lend_pool.h"

#include <doctest/doctest.h>

#include <map>
#include <random>

#include "core/error.h"
#include "layout/heap.h"

namespace deep_ep::runtime {
namespace {

constexpr uint64_t kMiB = 1 << 20;

TEST_CASE("large pieces come from the bottom, small ones from the top") {
    LendPool pool(16 * kMiB);
    CHECK_EQ(pool.take(4 * kMiB), 0);
    CHECK_EQ(pool.take(100), 16 * kMiB - 512);
    CHECK_EQ(pool.take(2 * kMiB), 4 * kMiB);
    CHECK_EQ(pool.take(128), 16 * kMiB - 1024);
}

TEST_CASE("what does not fit is refused, and fits again once room has been given back") {
    LendPool pool(8 * kMiB);
    CHECK_EQ(pool.take(5 * kMiB), 0);
    CHECK_FALSE(pool.take(4 * kMiB).has_value());
    pool.give_back(0);
    CHECK_EQ(pool.take(8 * kMiB), 0);
}

TEST_CASE("neighbours that are given back become one gap, in any order") {
    for (const std::vector<uint64_t>& order :
         {std::vector<uint64_t>{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}) {
        LendPool pool(6 * kMiB);
        for (int i = 0; i < 3; ++i) REQUIRE(pool.take(2 * kMiB).has_value());
        for (uint64_t i : order) pool.give_back(i * 2 * kMiB);
        CHECK_EQ(pool.take(6 * kMiB), 0);
    }
}

TEST_CASE("a piece is given back once") {
    LendPool pool(kMiB);
    const auto offset = pool.take(10);
    REQUIRE(offset.has_value());
    pool.give_back(*offset);
    CHECK_THROWS_AS(pool.give_back(*offset), InternalError);
    CHECK_THROWS_AS(LendPool(kMiB).take(0), InternalError);
}

TEST_CASE("a piece that shrinks keeps its start") {
    LendPool pool(4 * kMiB);
    CHECK_EQ(pool.take(3 * kMiB), 0);
    pool.shrink(0, kMiB);
    CHECK_EQ(pool.size_of(0), kMiB);
    CHECK_EQ(pool.take(3 * kMiB), kMiB);
    pool.shrink(0, kMiB);
    CHECK_THROWS_AS(pool.shrink(0, 0), InternalError);
    CHECK_THROWS_AS(pool.shrink(0, 2 * kMiB), InternalError);
    CHECK_THROWS_AS(pool.shrink(128, 1), InternalError);
    pool.give_back(0);
    pool.give_back(kMiB);
    CHECK_EQ(pool.take(4 * kMiB), 0);
}

TEST_CASE("an empty pool lends nothing") { CHECK_FALSE(LendPool(0).take(1).has_value()); }

TEST_CASE("random traffic never overlaps, and nothing is lost") {
    std::mt19937_64 rng(7);
    LendPool pool(64 * kMiB);
    std::map<uint64_t, uint64_t> held;
    for (int step = 0; step < 3000; ++step) {
        if (rng() % 2 == 0 && !held.empty()) {
            const auto piece = std::next(held.begin(), static_cast<long>(rng() % held.size()));
            pool.give_back(piece->first);
            held.erase(piece);
            continue;
        }
        const uint64_t size = 1 + rng() % (rng() % 3 == 0 ? 8 * kMiB : 4096);
        const auto offset = pool.take(size);
        if (!offset.has_value()) continue;
        CHECK_EQ(*offset % LendPool::kAlignment, 0);
        CHECK_LE(*offset + size, pool.num_bytes());
        const auto next = held.lower_bound(*offset);
        if (next != held.end()) CHECK_LE(*offset + size, next->first);
        if (next != held.begin()) CHECK_LE(std::prev(next)->first + std::prev(next)->second, *offset);
        held[*offset] = size;
    }
    for (const auto& [offset, size] : held) {
        CHECK_EQ(pool.size_of(offset), layout::align_up(size, LendPool::kAlignment));
        pool.give_back(offset);
    }
    CHECK_EQ(pool.take(64 * kMiB), 0);
}

}  // namespace
}  // namespace deep_ep::runtime
