#include "device/simt/bulk.h"

#include <cstring>
#include <utility>

#include "device/simt/block.h"
#include "device/simt/core.h"

namespace deep_ep::simt {

void BulkEngine::add(BulkCopy copy) {
    hb::Quiet quiet;
    copy.edges = hb::on_bulk_issue(copy.issuer->agent, copy.group, copy.mbarrier);
    copies_.push_back(std::move(copy));
    if (block_.core().options().bulk == BulkMode::kEager) drain();
}

void BulkEngine::advance(size_t index) {
    BulkCopy& copy = copies_[index];
    block_.drive().note_progress();
    block_.drive().note(0x8000000000000000ull + index);
    hb::Agent* const agent = copy.issuer->agent;
    const auto* source = static_cast<const unsigned char*>(copy.src);
    if (copy.stage == BulkCopy::Stage::kIssued) hb::on_bulk_read(agent, copy.edges, copy.src, copy.bytes);
    if (copy.mbarrier == nullptr && copy.stage == BulkCopy::Stage::kIssued) {
        copy.staged.assign(source, source + copy.bytes);
        copy.stage = BulkCopy::Stage::kRead;
        return;
    }
    hb::on_bulk_write(agent, copy.edges, copy.dst, copy.bytes);
    if (copy.mbarrier != nullptr) {
        std::memcpy(copy.dst, source, copy.bytes);
        mbarrier_complete_bytes(*copy.issuer, copy.mbarrier, copy.bytes);
    } else {
        std::memcpy(copy.dst, copy.staged.data(), copy.bytes);
    }
    copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(index));
}

void BulkEngine::drain() {
    while (!copies_.empty()) advance(0);
}

bool BulkEngine::advance_one_late() {
    for (size_t i = 0; i < copies_.size(); ++i) {
        if (copies_[i].stage == BulkCopy::Stage::kIssued) return advance(i), true;
    }
    if (copies_.empty()) return false;
    return advance(0), true;
}

void BulkEngine::advance_some_at_random() {
    Random& rng = block_.drive().rng;
    for (size_t rounds = copies_.size(); rounds > 0 && !copies_.empty(); --rounds) {
        if (rng.below(4) == 0) advance(rng.below(copies_.size()));
    }
}

bool BulkEngine::is_pending(const Fiber& fiber, int group, bool reads_only) const {
    for (const BulkCopy& copy : copies_) {
        if (copy.issuer != &fiber || copy.mbarrier != nullptr || copy.group >= group) continue;
        if (!reads_only || copy.stage == BulkCopy::Stage::kIssued) return true;
    }
    return false;
}

// The kernel's end completes its stores; a load that nobody waited for would write into the next block's memory.
void Block::finish_copies() {
    for (const BulkCopy& copy : bulk_.copies()) {
        if (copy.mbarrier != nullptr)
            fail(*copy.issuer, "the block has ended before a bulk load did: wait for its mbarrier");
    }
    bulk_.drain();
    if (!hb::kIsEnabled) return;
    for (const Fiber& fiber : fibers_) hb::on_bulk_end(fiber.agent, launch_->end);
}

namespace {

void check_operands(const Fiber& self, const void* shared, const void* global, uint32_t bytes) {
    const Block& block = *self.block;
    if (!block.launch().device->has_bulk_copy) block.fail(self, "bulk copy on a device without bulk copies");
    const auto address_bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
    if (((address_bits | bytes) & 15u) != 0 || bytes == 0) {
        block.fail(self, concat("bulk copy: addresses and size must be multiples of 16: shared ", shared, ", global ",
                                global, ", ", bytes, " bytes"));
    }
    if (!self.block->shared().contains(shared, bytes)) {
        block.fail(self, concat("bulk copy: ", bytes, " bytes at ", shared, " are not this block's shared memory"));
    }
}

}  // namespace

void bulk_load(void* shared_dst, const void* global_src, uint32_t bytes, uint64_t* mbarrier_state) {
    Fiber& self = running_fiber("prim::bulk_load");
    if (running.is_seeded) perturb();
    check_operands(self, shared_dst, global_src, bytes);
    note_change();
    self.block->bulk().add(
        BulkCopy{.issuer = &self, .dst = shared_dst, .src = global_src, .bytes = bytes, .mbarrier = mbarrier_state});
}

void bulk_store(void* global_dst, const void* shared_src, uint32_t bytes) {
    Fiber& self = running_fiber("prim::bulk_store");
    if (running.is_seeded) perturb();
    check_operands(self, shared_src, global_dst, bytes);
    note_change();
    ++self.num_open_copies;
    self.block->bulk().add(
        BulkCopy{.issuer = &self, .group = self.num_groups, .dst = global_dst, .src = shared_src, .bytes = bytes});
}

void bulk_commit() {
    Fiber& self = running_fiber("prim::bulk_commit");
    self.num_open_copies = 0;
    ++self.num_groups;
    note_change();
}

void bulk_wait(int max_unfinished, BulkPart part) {
    Fiber& self = running_fiber("prim::bulk_wait");
    if (running.is_seeded) perturb();
    const int group = self.num_groups - max_unfinished;
    const bool reads_only = part == BulkPart::kRead;
    while (self.block->bulk().is_pending(self, group, reads_only)) {
        describe_wait(reads_only ? "bulk_wait_read" : "bulk_wait", group);
        self.block->poll(self);
    }
    if (group > self.num_groups_awaited) self.num_groups_awaited = group;
    hb::on_bulk_wait(self.agent, group, reads_only);
}

}  // namespace deep_ep::simt
