// Nothing is left behind by a Buffer: not by one whose constructor fails at any step, nor where the device fails to take
// something back. Destructors never throw.
#include <doctest/doctest.h>

#include <filesystem>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "comm/deferred_free.h"
#include "core/error.h"
#include "device/simt/device.h"
#include "device/simt/scheduler.h"
#include "runtime/buffer.h"

namespace deep_ep::runtime {
namespace {

// Counts what it has given away, and fails where a test says so.
class CountingDevice final : public simt::SimtDevice {
public:
    CountingDevice(simt::Scheduler& scheduler, int ordinal) : SimtDevice(scheduler, ordinal) {}

    int fails_at = -1;  // the creation with this number throws
    int stuck_at = -1;  // what this one has made is not taken back
    int num_created = 0;
    std::set<const void*> live;

    void* allocate(size_t bytes) override { return may_make(), note(SimtDevice::allocate(bytes)); }
    void free(void* ptr) override {
        forget(ptr);
        SimtDevice::free(ptr);
    }
    dev::HostMapped allocate_host_mapped(size_t bytes) override {
        may_make();
        const dev::HostMapped memory = SimtDevice::allocate_host_mapped(bytes);
        note(memory.host);
        return memory;
    }
    void free_host_mapped(const dev::HostMapped& memory) override { free(memory.host); }
    dev::ShareableMemory allocate_shareable(size_t bytes, dev::Placement placement) override {
        may_make();
        dev::ShareableMemory memory = SimtDevice::allocate_shareable(bytes, placement);
        note(memory.address);
        return memory;
    }
    void free_shareable(const dev::ShareableMemory& memory) override {
        forget(memory.address);
        SimtDevice::free_shareable(memory);
    }
    void* open_shared(const std::string& handle) override { return may_make(), note(SimtDevice::open_shared(handle)); }
    void close_shared(void* address) override {
        forget(address);
        SimtDevice::close_shared(address);
    }
    dev::Event create_event() override { return may_make(), note(SimtDevice::create_event()); }
    void destroy_event(dev::Event event) override {
        forget(event);
        SimtDevice::destroy_event(event);
    }

    // For real, so that the process leaks nothing.
    void destroy_stuck_event() {
        SimtDevice::destroy_event(static_cast<dev::Event>(const_cast<void*>(std::exchange(stuck_, nullptr))));
    }

private:
    void may_make() const {
        if (num_created == fails_at) throw Error("injected");
    }
    void* note(void* made) {
        live.insert(made);
        if (num_created++ == stuck_at) stuck_ = made;
        return made;
    }
    void forget(const void* address) {
        if (address == nullptr) return;
        if (address == stuck_) throw Error("injected: not taken back");
        CHECK_EQ(live.erase(address), 1);
    }

    const void* stuck_ = nullptr;
};

BufferOptions options_of(int rank, int num_ranks) {
    return {.rank = rank,
            .num_ranks = num_ranks,
            .num_data_bytes = 1 << 16,
            .num_low_latency_bytes = 1 << 16,
            .timeout_s = 1,
            .warn_s = 1,
            .is_shrinkable = false,
            .num_lend_bytes = 1 << 16};
}

size_t num_open_files() {
    const std::filesystem::directory_iterator files("/proc/self/fd");
    return static_cast<size_t>(std::distance(begin(files), end(files)));
}

struct Node {
    simt::Scheduler scheduler;
    std::vector<std::shared_ptr<CountingDevice>> devices;
    std::vector<std::unique_ptr<Buffer>> buffers;

    explicit Node(int num_ranks) {
        for (int rank = 0; rank < num_ranks; ++rank)
            devices.push_back(std::make_shared<CountingDevice>(scheduler, rank));
    }
    std::vector<std::string> build() {
        const auto num_ranks = static_cast<int>(devices.size());
        std::vector<std::string> handles;
        for (int rank = 0; rank < num_ranks; ++rank) {
            buffers.push_back(
                std::make_unique<Buffer>(devices[static_cast<size_t>(rank)], options_of(rank, num_ranks)));
            handles.push_back(buffers.back()->export_handle());
        }
        return handles;
    }
};

TEST_CASE("a constructor that fails leaves nothing behind, at whichever step") {
    const size_t num_files = num_open_files();
    bool is_built = false;
    int step = 0;
    for (; !is_built; ++step) {
        CAPTURE(step);
        Node node(1);
        node.devices[0]->fails_at = step;
        try {
            const Buffer buffer(node.devices[0], options_of(0, 2));
            is_built = true;
        } catch (const Error& error) {
            CHECK_EQ(std::string(error.what()), "injected");
        }
        CHECK_EQ(node.devices[0]->live.size(), 0);
        CHECK_EQ(num_open_files(), num_files);
    }
    CHECK_GE(step, 6);  // heap, status, counts, and what kernels keep
}

TEST_CASE("a connection that fails at a peer leaves nothing behind") {
    const size_t num_files = num_open_files();
    for (int num_opened = 0; num_opened < 2; ++num_opened) {
        CAPTURE(num_opened);
        Node node(3);
        const auto handles = node.build();
        node.devices[0]->fails_at = node.devices[0]->num_created + num_opened;
        CHECK_THROWS_AS(node.buffers[0]->connect(handles), Error);
        node.buffers.clear();
        CHECK_EQ(comm::free_deferred(), 0);
        CHECK_EQ(node.devices[0]->live.size(), 0);
    }
    CHECK_EQ(num_open_files(), num_files);
}

// Whatever one thing it is that cannot be given back.
TEST_CASE("what a device does not take back keeps nothing else from going back, and no destructor throws") {
    int num_steps = 1;
    for (int step = 0; step < num_steps; ++step) {
        CAPTURE(step);
        Node node(2);
        node.devices[0]->stuck_at = step;
        const auto handles = node.build();
        for (const auto& buffer : node.buffers) buffer->connect(handles);
        node.buffers.clear();
        CHECK_EQ(comm::free_deferred(), 0);
        CHECK_EQ(node.devices[0]->live.size(), 1);
        CHECK_EQ(node.devices[1]->live.size(), 0);
        num_steps = node.devices[0]->num_created;
    }
    CHECK_GE(num_steps, 6);
}

TEST_CASE("events of a lender that cannot be destroyed keep no other event") {
    simt::Scheduler scheduler;
    const auto device = std::make_shared<CountingDevice>(scheduler, 0);
    device->stuck_at = 0;
    const dev::Stream streams[] = {device->create_stream(), device->create_stream(), device->create_stream()};
    {
        Lender lender(device, 1 << 20);
        for (dev::Stream stream : streams) lender.note_stream(stream, false);
        const std::vector<uint64_t> sizes = {512};
        for (int i = 0; i < 2; ++i) {
            const auto piece = lender.take(sizes, streams[0]);
            lender.give_back(piece.front(), streams[0]);
        }
        CHECK_GE(device->num_created, 2);
    }
    CHECK_EQ(device->live.size(), 1);
    device->destroy_stuck_event();
    for (dev::Stream stream : streams) device->destroy_stream(stream);
}

TEST_CASE("a piece that was never taken does not end the process when it is given back") {
    simt::Scheduler scheduler;
    const auto device = std::make_shared<CountingDevice>(scheduler, 0);
    const auto lender = std::make_shared<Lender>(device, 1 << 20);
    { const LentMemory memory(lender, 4096, nullptr, nullptr); }
    const std::vector<uint64_t> sizes = {1 << 20};
    CHECK_EQ(lender->take(sizes, nullptr).size(), 1);
}

}  // namespace
}  // namespace deep_ep::runtime
