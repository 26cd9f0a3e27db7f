// What must end before lent memory is used again: the rules of streams and captures, over a model of a device.
#include "runtime/lender.h"

#include <doctest/doctest.h>

#include <map>
#include <random>
#include <set>

#include "core/error.h"

namespace deep_ep::runtime {
namespace {

constexpr uint64_t kMiB = 1 << 20;
using Work = std::set<int>;

// Streams know all the work that comes before their next; events what their stream knew when they were recorded.
class ModelDevice final : public dev::Device {
public:
    std::map<dev::Stream, Work> known;
    std::map<dev::Event, Work> events;
    int num_records = 0;
    std::set<dev::Stream> captured;
    std::vector<std::shared_ptr<std::atomic<bool>>> graphs;
    Work ended;       // that the device has done
    Work waited_for;  // by the host
    int num_waits = 0;

    int work(dev::Stream stream) {
        known[stream].insert(++num_work_);
        return num_work_;
    }
    bool comes_before(int work, dev::Stream stream) { return known[stream].count(work) > 0 || ended.count(work) > 0; }

    dev::StreamKind stream_kind(dev::Stream stream) override {
        return captured.count(stream) > 0 ? dev::StreamKind::kCaptured : dev::StreamKind::kPlain;
    }
    std::shared_ptr<const std::atomic<bool>> watch_graph(dev::Stream stream) override {
        REQUIRE(captured.count(stream) == 1);
        graphs.push_back(std::make_shared<std::atomic<bool>>(false));
        return graphs.back();
    }
    dev::Event create_event() override { return reinterpret_cast<dev::Event>(++num_events_); }
    void destroy_event(dev::Event event) override { CHECK_EQ(events.erase(event), 1); }
    void record_event(dev::Event event, dev::Stream stream) override {
        ++num_records;
        CHECK_EQ(captured.count(stream), 0);
        events[event] = known[stream];
    }
    void stream_wait_event(dev::Stream stream, dev::Event event) override {
        CHECK_EQ(captured.count(stream), 0);
        ++num_waits;
        known[stream].insert(events.at(event).begin(), events.at(event).end());
    }
    void synchronize_event(dev::Event event) override {
        waited_for.insert(events.at(event).begin(), events.at(event).end());
        ended.insert(events.at(event).begin(), events.at(event).end());
    }
    bool query_event(dev::Event event) override {
        for (int work : events.at(event))
            if (ended.count(work) == 0) return false;
        return true;
    }

    dev::DeviceKind kind() const override { return dev::DeviceKind::kCpu; }
    int num_sms() const override { return 1; }
    int max_shared_bytes() const override { return 0; }
    bool has_bulk_copy() const override { return false; }
    int useful_block_threads() const override { return 32; }
    std::string unique_id() const override { return ""; }
    void* allocate(size_t) override { return nullptr; }
    void free(void*) override {}
    dev::HostMapped allocate_host_mapped(size_t) override { return {}; }
    void free_host_mapped(const dev::HostMapped&) override {}
    dev::ShareableMemory allocate_shareable(size_t, dev::Placement) override { return {}; }
    void free_shareable(const dev::ShareableMemory&) override {}
    void* open_shared(const std::string&) override { return nullptr; }
    void close_shared(void*) override {}
    bool holds(const std::string&) const override { return false; }
    bool enter() override { return false; }
    void leave() noexcept override {}
    dev::Stream create_stream() override { return nullptr; }
    void destroy_stream(dev::Stream) override {}
    void synchronize_stream(dev::Stream) override {}
    void memset_async(void*, int, size_t, dev::Stream) override {}
    void memcpy_async(void*, const void*, size_t, dev::Stream) override {}
    void copy_now(void*, const void*, size_t) override {}
    bool host_wait(const std::function<bool()>&, double) override { return true; }

private:
    int num_work_ = 0;
    intptr_t num_events_ = 0;
};

dev::Stream stream(intptr_t number) { return reinterpret_cast<dev::Stream>(number); }
const dev::Stream kMain = stream(1), kSide = stream(2), kComm = stream(3), kOther = stream(4);

std::optional<uint64_t> take_one(Lender& lender, uint64_t num_bytes, dev::Stream stream) {
    const auto found = lender.take(std::vector{num_bytes}, stream);
    return found.empty() ? std::nullopt : std::optional(found.front());
}

struct Fixture {
    std::shared_ptr<ModelDevice> device = std::make_shared<ModelDevice>();
    Lender lender{device, 8 * kMiB};

    uint64_t take(uint64_t num_bytes, dev::Stream stream) {
        const auto offset = take_one(lender, num_bytes, stream);
        REQUIRE(offset.has_value());
        return *offset;
    }
    std::optional<uint64_t> take_for_graph(uint64_t num_bytes, dev::Stream stream) {
        const auto found = lender.take_for_graph(std::vector{num_bytes}, stream);
        return found.empty() ? std::nullopt : std::optional(found.front());
    }
};

TEST_CASE_FIXTURE(Fixture, "several pieces: all of them or none") {
    const std::vector<uint64_t> pieces{3 * kMiB, 100, 2 * kMiB};
    CHECK(lender.take(std::vector{5 * kMiB, 2 * kMiB, 2 * kMiB}, kMain).empty());
    CHECK_EQ(lender.take(pieces, kMain).size(), 3);
    CHECK(lender.take(pieces, kMain).empty());
    CHECK(take_one(lender, 2 * kMiB, kMain).has_value());  // nothing was kept of what failed
}

TEST_CASE_FIXTURE(Fixture, "one stream: no event and no wait") {
    lender.note_stream(kMain, false);
    for (int i = 0; i < 5; ++i) {
        const uint64_t offset = take(8 * kMiB, kMain);
        device->work(kMain);
        lender.give_back(offset, kMain);
    }
    CHECK(device->events.empty());
}

TEST_CASE_FIXTURE(Fixture,
                  "calls on one stream: pieces leave no events behind, also where the comm stream has had calls") {
    lender.note_stream(kMain, false);
    lender.note_stream(kComm, true);
    for (int i = 0; i < 40; ++i) {
        const uint64_t offset = take(1 * kMiB, kMain);
        device->work(kMain);
        lender.give_back(offset, kMain);
    }
    CHECK_EQ(device->events.size(), 1);  // by which the comm stream is waited for, when no memory is left
    CHECK_EQ(device->num_records, 40 / 8 - 1);
}

TEST_CASE_FIXTURE(Fixture, "the stream that is current where a tensor is dropped, on whichever thread") {
    lender.note_stream(kMain, false);
    const uint64_t offset = take(8 * kMiB, kMain);
    const int used = device->work(kOther);
    lender.give_back(offset, kOther);
    const int later = device->work(kOther);
    take(8 * kMiB, kMain);
    CHECK(device->comes_before(used, kMain));
    CHECK_FALSE(device->comes_before(later, kMain));
}

TEST_CASE_FIXTURE(Fixture, "every stream of a call, whichever is current where the tensor is dropped") {
    lender.note_stream(kMain, false);
    lender.note_stream(kSide, false);
    lender.note_stream(kComm, true);
    for (dev::Stream dropped_on : {kMain, kSide, kOther}) {
        const uint64_t offset = take(8 * kMiB, kComm);
        const int on_main = device->work(kMain), on_side = device->work(kSide);
        lender.give_back(offset, dropped_on);
        const int later = device->work(kMain);
        const uint64_t again = take(8 * kMiB, kComm);
        CHECK(device->comes_before(on_main, kComm));
        CHECK(device->comes_before(on_side, kComm));
        CHECK_FALSE(device->comes_before(later, kComm));
        lender.give_back(again, kMain);
    }
}

TEST_CASE_FIXTURE(Fixture, "what nobody uses any more comes first") {
    lender.note_stream(kMain, false);
    lender.note_stream(kComm, true);
    const uint64_t offset = take(3 * kMiB, kComm);
    const int used = device->work(kMain);
    lender.give_back(offset, kMain);
    const uint64_t elsewhere = take(4 * kMiB, kComm);
    CHECK_NE(elsewhere, offset);
    CHECK_FALSE(device->comes_before(used, kComm));
    device->ended.insert(used);
    CHECK_EQ(take(3 * kMiB, kComm), offset);
    CHECK_EQ(device->num_waits, 0);
}

TEST_CASE_FIXTURE(Fixture, "what a captured stream had before is waited for when the capture is over") {
    lender.note_stream(kMain, false);
    const uint64_t offset = take(8 * kMiB, kMain);
    const int used = device->work(kMain);
    device->captured.insert(kMain);
    lender.give_back(offset, kMain);
    CHECK_FALSE(take_one(lender, 8 * kMiB, kSide).has_value());
    device->captured.clear();
    take(8 * kMiB, kSide);
    CHECK(device->comes_before(used, kSide));
}

TEST_CASE_FIXTURE(Fixture,
                  "a graph's memory: the host waits for earlier uses, and it is free when graph and tensor are") {
    lender.note_stream(kMain, false);
    const uint64_t before = take(8 * kMiB, kMain);
    const int used = device->work(kMain);
    lender.give_back(before, kMain);
    for (bool is_tensor_first : {false, true}) {
        CAPTURE(is_tensor_first);
        device->captured.insert(kComm);
        CHECK_FALSE(take_for_graph(5 * kMiB, kComm).has_value());  // more than half
        const auto held = take_for_graph(3 * kMiB, kComm);
        REQUIRE(held.has_value());
        CHECK_EQ(device->waited_for.count(used), 1);
        CHECK_FALSE(take_for_graph(2 * kMiB, kComm).has_value());  // of all graphs
        device->captured.clear();
        auto end_graph = [&] { device->graphs.back()->store(true); };
        if (is_tensor_first)
            lender.give_back(*held, kMain);
        else
            end_graph();
        CHECK_FALSE(take_one(lender, 8 * kMiB, kMain).has_value());
        if (is_tensor_first)
            end_graph();
        else
            lender.give_back(*held, kMain);
        lender.give_back(take(8 * kMiB, kMain), kMain);
    }
}

TEST_CASE_FIXTURE(Fixture, "the rest of a piece that shrinks is free at once") {
    const uint64_t offset = take(8 * kMiB, kMain);
    lender.shrink(offset, kMiB + 1);
    CHECK_EQ(take(6 * kMiB, kMain), kMiB + LendPool::kAlignment);
    CHECK_THROWS_AS(lender.shrink(offset, 2 * kMiB), InternalError);
}

TEST_CASE("random traffic: whatever used a piece comes before its next use, and nothing is lost") {
    for (unsigned seed = 0; seed < 30; ++seed) {
        CAPTURE(seed);
        std::mt19937 rng(seed);
        const auto device = std::make_shared<ModelDevice>();
        Lender lender(device, 16 * kMiB);
        const std::vector<dev::Stream> streams{kMain, kSide, kComm};
        std::map<uint64_t, uint64_t> held;
        std::vector<Work> used_by(16);  // each MiB
        dev::Stream last = kMain;
        auto pick = [&] { return streams[rng() % streams.size()]; };
        for (int step = 0; step < 300; ++step) {
            const dev::Stream call_stream = pick();
            if (rng() % 2 == 0) {
                lender.note_stream(call_stream, call_stream == kComm);
                // The chain of calls.
                device->known[call_stream].insert(device->known[last].begin(), device->known[last].end());
                const uint64_t num_bytes = (1 + rng() % 5) * kMiB;
                const auto offset = take_one(lender, num_bytes, call_stream);
                last = call_stream;
                if (!offset.has_value()) continue;
                for (uint64_t i = *offset / kMiB; i < (*offset + num_bytes) / kMiB; ++i)
                    for (int work : used_by[i]) REQUIRE(device->comes_before(work, call_stream));
                held[*offset] = num_bytes;
                const int work = device->work(call_stream);
                for (uint64_t i = *offset / kMiB; i < (*offset + num_bytes) / kMiB; ++i) used_by[i] = {work};
            } else if (!held.empty()) {
                const auto piece = std::next(held.begin(), static_cast<long>(rng() % held.size()));
                const dev::Stream user = pick();
                lender.note_stream(user, user == kComm);
                const int work = device->work(user);
                for (uint64_t i = piece->first / kMiB; i < (piece->first + piece->second) / kMiB; ++i)
                    used_by[i].insert(work);
                lender.give_back(piece->first, rng() % 2 == 0 ? pick() : kOther);
                held.erase(piece);
            } else {
                for (const auto& [name, works] : device->known) device->ended.insert(works.begin(), works.end());
            }
        }
        for (const auto& [offset, size] : held) lender.give_back(offset, kMain);
        CHECK(take_one(lender, 16 * kMiB, kMain).has_value());
    }
}

}  // namespace
}  // namespace deep_ep::runtime
