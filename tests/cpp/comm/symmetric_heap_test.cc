#include "comm/symmetric_heap.h"

#include <doctest/doctest.h>

#include <memory>
#include <vector>

#include "comm/deferred_free.h"
#include "device/simt/device.h"
#include "device/simt/scheduler.h"

namespace deep_ep::comm {
namespace {

// Notes, whenever a mapping of a peer is closed, whether this rank has already said that it has left.
class WatchfulDevice final : public simt::SimtDevice {
public:
    WatchfulDevice(simt::Scheduler& scheduler, int ordinal) : SimtDevice(scheduler, ordinal, {}) {}

    void close_shared(void* address) override {
        was_told_early |= mailbox->presence(mailbox->rank()) == Presence::kLeft;
        ++num_closed;
        SimtDevice::close_shared(address);
    }

    std::shared_ptr<Mailbox> mailbox;
    bool was_told_early = false;
    int num_closed = 0;
};

struct Node {
    explicit Node(int num_ranks) {
        std::vector<std::string> mailbox_handles, heap_handles;
        for (int rank = 0; rank < num_ranks; ++rank) {
            devices.push_back(std::make_shared<WatchfulDevice>(scheduler, rank));
            devices.back()->mailbox = std::make_shared<Mailbox>(rank, num_ranks);
            heaps.push_back(
                std::make_unique<SymmetricHeap>(devices.back(), devices.back()->mailbox, num_ranks, size_t{4096}));
            mailbox_handles.push_back(devices.back()->mailbox->handle());
            heap_handles.push_back(heaps.back()->handle());
        }
        for (int rank = 0; rank < num_ranks; ++rank) {
            devices[static_cast<size_t>(rank)]->mailbox->connect(mailbox_handles);
            heaps[static_cast<size_t>(rank)]->connect(heap_handles);
        }
    }

    simt::Scheduler scheduler{simt::SchedulerOptions{}};
    std::vector<std::shared_ptr<WatchfulDevice>> devices;
    std::vector<std::unique_ptr<SymmetricHeap>> heaps;
};

TEST_CASE("a rank says that it has left only when it has unmapped its peers' memory") {
    Node node(3);
    for (auto& heap : node.heaps) heap->release(0.0);
    for (auto& device : node.devices) {
        CHECK_EQ(device->num_closed, 2);
        CHECK_FALSE(device->was_told_early);
        CHECK_EQ(device->mailbox->presence(device->mailbox->rank()), Presence::kLeft);
    }
    CHECK_EQ(free_deferred(), 0);
}

TEST_CASE("memory that a peer may still map is kept until it lets go") {
    Node node(2);
    node.heaps[0]->release(0.0);
    CHECK_EQ(free_deferred(), 1);
    node.heaps[1]->release(0.0);
    CHECK_EQ(free_deferred(), 0);
}

}  // namespace
}  // namespace deep_ep::comm
