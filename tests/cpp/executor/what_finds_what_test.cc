// The table "what finds what": every planted fault, and the tool that finds it. The same tests run without a sanitizer
// (do wrong results show, for how many of 60 seeds?) and under ThreadSanitizer (is there a report?).
#include <doctest/doctest.h>

#include <functional>
#include <string>

#include "device/simt/device.h"
#include "device/simt/happens_before.h"
#include "executor/faults.h"
#include "support/races.h"

using namespace deep_ep;
using namespace deep_ep::faults;
using testing::num_races;

namespace {

constexpr int kNumSeeds = 60;

struct Outcome {
    bool is_wrong = false;
    int num_races = 0;
};

// Two ranks in one process, one stream each.
struct TwoRanks {
    explicit TwoRanks(const simt::SchedulerOptions& options) : scheduler(options) {}

    simt::Scheduler scheduler;
    simt::SimtDevice first{scheduler, 0}, second{scheduler, 1};
    dev::Stream first_stream = first.create_stream(), second_stream = second.create_stream();
    uint32_t* words = static_cast<uint32_t*>(first.allocate(4 * 4096));
    uint32_t* num_wrong() { return words + 2048; }
};

Outcome outcome_of(const simt::SchedulerOptions& options, const std::function<void(TwoRanks&)>& launch,
                   const std::function<bool(TwoRanks&)>& is_wrong) {
    const int races_before = num_races();
    TwoRanks ranks(options);
    launch(ranks);
    ranks.scheduler.run_until_idle();
    return {is_wrong(ranks), num_races() - races_before};
}

struct Found {
    int by_seeds = 0;  // of kNumSeeds, by wrong results
    int by_tsan = 0;   // of the round-robin run, reports
    bool is_wrong_in_order = false;
};

bool has_wrong_words(TwoRanks& ranks) { return *ranks.num_wrong() != 0; }

Found hunt(simt::SchedulerOptions options, const std::function<void(TwoRanks&)>& launch,
           const std::function<bool(TwoRanks&)>& is_wrong = has_wrong_words) {
    Found found;
    const Outcome in_order = outcome_of(options, launch, is_wrong);
    found.is_wrong_in_order = in_order.is_wrong;
    found.by_tsan = in_order.num_races;
    for (int seed = 1; seed <= kNumSeeds && !simt::hb::kIsEnabled; ++seed) {
        options.seed = static_cast<uint64_t>(seed);
        found.by_seeds += outcome_of(options, launch, is_wrong).is_wrong;
    }
    return found;
}

void check_is_clean(const Found& found) {
    CHECK(found.by_seeds == 0);
    CHECK(found.by_tsan == 0);
    CHECK_FALSE(found.is_wrong_in_order);
}

// Memory order is invisible to schedules: the CPU executes accesses in program order.
void check_only_tsan_finds(const Found& found) {
    CHECK(found.by_seeds == 0);
    if (simt::hb::kIsEnabled) CHECK(found.by_tsan > 0);
    testing::expect_races(found.by_tsan);
}

void check_seeds_and_tsan_find(const std::string& name, const Found& found, int min_seeds = kNumSeeds / 2) {
    if (simt::hb::kIsEnabled) {
        CHECK(found.by_tsan > 0);
        testing::expect_races(found.by_tsan);
        return;
    }
    MESSAGE(name << ": wrong results for " << found.by_seeds << " of " << kNumSeeds << " seeds");
    CHECK(found.by_seeds >= min_seeds);
}

// Both kernels at once: one of the first rank, and one of the second that looks at what comes.
template <class First, class Second> Found hunt_pair(simt::BulkMode bulk = simt::SchedulerOptions{}.bulk) {
    return hunt({.bulk = bulk}, [](TwoRanks& ranks) {
        const MessageParams params{ranks.words, ranks.words + 1024, ranks.num_wrong()};
        dev::launch<First>({.name = "first"}, ranks.first_stream, params);
        dev::launch<Second>({.name = "second"}, ranks.second_stream, params);
    });
}

template <Send kSend, Receive kReceive> Found hunt_message() {
    return hunt_pair<SendKernel<kSend>, ReceiveKernel<kReceive>>();
}

template <Packets kHow> Found hunt_packets() {
    return hunt({}, [](TwoRanks& ranks) {
        const PacketParams params{reinterpret_cast<prim::Packet*>(ranks.words), ranks.words + 512, ranks.words + 1024,
                                  ranks.num_wrong()};
        dev::launch<PacketReceiveKernel<kHow>>({.name = "receive"}, ranks.second_stream, params);
        dev::launch<PacketSendKernel<kHow>>({.name = "send"}, ranks.first_stream, params);
    });
}

template <bool kHasBarrier> Found hunt_group() {
    return hunt({}, [](TwoRanks& ranks) {
        dev::launch<GroupKernel<kHasBarrier>>({.num_threads = 128, .name = "group"}, ranks.first_stream,
                                              {ranks.num_wrong(), 8});
    });
}

template <Stage kHow> Found hunt_store(simt::BulkMode bulk) {
    constexpr int kRows = 16;
    return hunt(
        {.bulk = bulk},
        [](TwoRanks& ranks) {
            dev::launch<StoreKernel<kHow>>({.name = "store"}, ranks.first_stream, {ranks.words, kRows});
        },
        [](TwoRanks& ranks) {
            for (uint32_t i = 0; i < kRows * 32; ++i) {
                if (ranks.words[i] != i) return true;
            }
            return false;
        });
}

template <bool kTellsTooEarly> Found hunt_ring() {
    return hunt({}, [](TwoRanks& ranks) {
        const RingParams params{ranks.words, ranks.words + 1024, ranks.words + 1056, ranks.num_wrong(), 40};
        dev::launch<RingSendKernel>({.name = "ring send"}, ranks.first_stream, params);
        dev::launch<RingReceiveKernel<kTellsTooEarly>>({.name = "ring receive"}, ranks.second_stream, params);
    });
}

template <Publish kHow> Found hunt_bulk_send(simt::BulkMode bulk) {
    return hunt_pair<BulkSendKernel<kHow>, ReceiveKernel<Receive::kAcquire>>(bulk);
}

template <bool kHasProxyFence> Found hunt_overwrite() {
    return hunt_pair<ReadAndGiveBackKernel, OverwriteKernel<kHasProxyFence>>();
}

template <bool kHasProxyFence> Found hunt_reload() {
    return hunt({}, [](TwoRanks& ranks) {
        dev::launch<ReloadKernel<kHasProxyFence>>({.name = "reload"}, ranks.first_stream,
                                                  {ranks.words, 3, ranks.num_wrong()});
    });
}

template <Load kHow> Found hunt_load() { return hunt_pair<SendKernel<Send::kRelease>, LoadKernel<kHow>>(); }

}  // namespace

TEST_CASE("right message passing is clean: release and acquire, fences and relaxed accesses, and both mixed") {
    check_is_clean(hunt_message<Send::kRelease, Receive::kAcquire>());
    check_is_clean(hunt_message<Send::kSysFence, Receive::kSysFence>());
    check_is_clean(hunt_message<Send::kRelease, Receive::kSysFence>());
    check_is_clean(hunt_message<Send::kSysFence, Receive::kAcquire>());
}

TEST_CASE("a release or an acquire that is relaxed, of gpu scope across ranks, or of one lane alone: only TSan") {
    check_only_tsan_finds(hunt_message<Send::kRelaxed, Receive::kAcquire>());
    check_only_tsan_finds(hunt_message<Send::kGpuRelease, Receive::kAcquire>());
    check_only_tsan_finds(hunt_message<Send::kGpuFence, Receive::kAcquire>());
    check_only_tsan_finds(hunt_message<Send::kRelease, Receive::kRelaxed>());
    check_only_tsan_finds(hunt_message<Send::kRelease, Receive::kGpuAcquire>());
    check_only_tsan_finds(hunt_message<Send::kRelease, Receive::kShuffleOnly>());  // in place of __syncwarp
}

TEST_CASE("no __syncwarp before one lane's release: TSan, and a few seeds for each message") {
    check_seeds_and_tsan_find("no __syncwarp before release", hunt_message<Send::kNoSyncwarp, Receive::kAcquire>(), 1);
}

TEST_CASE("packets need no flag, no release and no acquire") { check_is_clean(hunt_packets<Packets::kRight>()); }

TEST_CASE("a packet that is read without a look at its epoch: wrong results, TSan sees nothing") {
    const Found found = hunt_packets<Packets::kUnchecked>();
    CHECK(found.is_wrong_in_order);
    if (!simt::hb::kIsEnabled) CHECK_EQ(found.by_seeds, kNumSeeds);
    CHECK_EQ(found.by_tsan, 0);
}

TEST_CASE("a packet written over one that may still be read: only TSan") {
    check_only_tsan_finds(hunt_packets<Packets::kNotGivenBack>());
}

TEST_CASE("a packet of gpu scope across ranks: only TSan") {
    check_only_tsan_finds(hunt_packets<Packets::kGpuStore>());
    check_only_tsan_finds(hunt_packets<Packets::kGpuLoad>());
}

TEST_CASE("a packet taken for a flag of other data: only TSan") {
    check_only_tsan_finds(hunt_packets<Packets::kAsFlag>());
}

TEST_CASE("a missing group barrier: seeds and TSan") {
    check_is_clean(hunt_group<true>());
    check_seeds_and_tsan_find("missing group barrier", hunt_group<false>());
}

TEST_CASE("shared memory reused without wait_group.read: random and late bulk copies, and TSan") {
    check_is_clean(hunt_store<Stage::kRight>(simt::BulkMode::kRandom));
    check_is_clean(hunt_store<Stage::kRight>(simt::BulkMode::kLate));
    check_seeds_and_tsan_find("reuse, random copies", hunt_store<Stage::kNoWaitRead>(simt::BulkMode::kRandom));
    const Found late = hunt_store<Stage::kNoWaitRead>(simt::BulkMode::kLate);
    const Found eager = hunt_store<Stage::kNoWaitRead>(simt::BulkMode::kEager);
    CHECK(late.is_wrong_in_order);
    CHECK_FALSE(eager.is_wrong_in_order);
    CHECK_EQ(eager.by_seeds, 0);
    if (simt::hb::kIsEnabled) CHECK_GT(eager.by_tsan, 0);
    testing::expect_races(late.by_tsan + eager.by_tsan);
}

TEST_CASE("ring tails that disagree: seeds and TSan") {
    check_is_clean(hunt_ring<false>());
    check_seeds_and_tsan_find("ring tails", hunt_ring<true>());
}

TEST_CASE("a bulk store published when its source has been read, not when it is done: late copies, seeds and TSan") {
    check_is_clean(hunt_bulk_send<Publish::kRight>(simt::BulkMode::kLate));
    check_is_clean(hunt_bulk_send<Publish::kRight>(simt::BulkMode::kRandom));
    check_seeds_and_tsan_find("published too early, random copies",
                              hunt_bulk_send<Publish::kAfterReadOnly>(simt::BulkMode::kRandom), 1);
    const Found late = hunt_bulk_send<Publish::kAfterReadOnly>(simt::BulkMode::kLate);
    CHECK(late.is_wrong_in_order);
    testing::expect_races(late.by_tsan);
}

TEST_CASE("no proxy fence between an acquire and a bulk store over what it gave back: only TSan") {
    check_is_clean(hunt_overwrite<true>());
    check_only_tsan_finds(hunt_overwrite<false>());
}

TEST_CASE("no proxy fence between a generic write and a bulk store of it: only TSan") {
    check_only_tsan_finds(hunt_store<Stage::kNoProxyFence>(simt::BulkMode::kEager));
}

TEST_CASE("no proxy fence between an acquire and a bulk load of what it guards: only TSan") {
    check_is_clean(hunt_load<Load::kRight>());
    check_only_tsan_finds(hunt_load<Load::kNoProxyFence>());
}

TEST_CASE("no proxy fence between ordinary reads of a stage and the next bulk load into it: only TSan") {
    check_is_clean(hunt_reload<true>());
    check_only_tsan_finds(hunt_reload<false>());
}

TEST_CASE("no fence between the initialisation of an mbarrier and the bulk load that completes on it: only TSan") {
    check_only_tsan_finds(hunt_load<Load::kNoInitFence>());
}
