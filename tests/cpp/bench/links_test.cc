#include "bench/links.h"

#include <doctest/doctest.h>

#include <memory>
#include <vector>

#include "core/error.h"
#include "device/simt/device.h"
#include "device/simt/scheduler.h"

namespace deep_ep::bench {
namespace {

struct Ends {
    simt::Scheduler scheduler;
    std::vector<std::unique_ptr<Links>> links;

    Ends(int num_ranks, int64_t bytes_per_peer) {
        std::vector<std::string> handles;
        for (int rank = 0; rank < num_ranks; ++rank) {
            links.push_back(std::make_unique<Links>(std::make_shared<simt::SimtDevice>(scheduler, rank), rank,
                                                    num_ranks, bytes_per_peer));
            handles.push_back(links.back()->export_handle());
        }
        for (const auto& end : links) end->connect(handles);
    }
};

// Whole chunks, a short one, and less than a block has threads.
TEST_CASE("what every rank pushes is at every peer, in the part of its own") {
    for (int64_t bytes : {int64_t{16}, int64_t{1} << 16, (int64_t{1} << 16) + 4080}) {
        for (int num_sms : {1, 3}) {
            CAPTURE(bytes);
            CAPTURE(num_sms);
            constexpr int kRanks = 3;
            Ends ends(kRanks, bytes);
            std::vector<std::vector<uint8_t>> sent;
            for (int rank = 0; rank < kRanks; ++rank) {
                sent.emplace_back(static_cast<size_t>(bytes));
                for (size_t i = 0; i < sent.back().size(); ++i) sent.back()[i] = static_cast<uint8_t>(i * 7 + rank);
                ends.links[static_cast<size_t>(rank)]->load(sent.back().data());
            }
            for (const auto& end : ends.links) end->push(num_sms, nullptr);
            for (const auto& end : ends.links) end->synchronize();
            for (const auto& end : ends.links)
                for (int peer = 0; peer < kRanks; ++peer) {
                    const std::vector<uint8_t> part(end->part_from(peer), end->part_from(peer) + bytes);
                    CHECK(part == sent[static_cast<size_t>(peer)]);
                }
        }
    }
}

TEST_CASE("sizes and ranks that cannot be are refused") {
    simt::Scheduler scheduler;
    const auto device = std::make_shared<simt::SimtDevice>(scheduler, 0);
    CHECK_THROWS_WITH_AS(Links(device, 0, 2, 24), doctest::Contains("multiple of 16, got 24"), InvalidArgument);
    CHECK_THROWS_WITH_AS(Links(device, 2, 2, 32), doctest::Contains("rank must be"), InvalidArgument);
    CHECK_THROWS_WITH_AS(Links(device, 0, 1, 32), doctest::Contains("num_ranks must be"), InvalidArgument);
}

}  // namespace
}  // namespace deep_ep::bench
