// Bulk copies of one block: the hidden engine that carries them out, at once, as late as possible, or at random times.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/simt/happens_before.h"

namespace deep_ep::simt {

class Block;
struct Fiber;

// A store has two moments, the read of its shared source and the write to global memory; a load has one.
struct BulkCopy {
    enum class Stage : uint8_t { kIssued, kRead };
    Fiber* issuer;
    int group = 0;  // of the issuer; loads have none
    Stage stage = Stage::kIssued;
    void* dst;
    const void* src;
    uint32_t bytes;
    uint64_t* mbarrier = nullptr;            // null: a store
    std::vector<unsigned char> staged = {};  // of a store, between its two moments
    hb::BulkEdges edges = {};
};

class BulkEngine {
public:
    explicit BulkEngine(Block& block) : block_(block) {}

    void add(BulkCopy copy);
    bool is_empty() const { return copies_.empty(); }
    const std::vector<BulkCopy>& copies() const { return copies_; }

    // The next step of copy `index`; a finished copy is removed.
    void advance(size_t index);
    void drain();
    // The step that can wait least: reads before writes, old before new. False when there is none.
    bool advance_one_late();
    void advance_some_at_random();

    // Whether a copy of this fiber's groups below `group` still has to do `stage`.
    bool is_pending(const Fiber& fiber, int group, bool reads_only) const;
    void clear() { copies_.clear(); }

private:
    Block& block_;
    std::vector<BulkCopy> copies_;
};

// What the engine does to an mbarrier when a load of `issuer` is done.
void mbarrier_complete_bytes(const Fiber& issuer, uint64_t* state, uint32_t bytes);

}  // namespace deep_ep::simt
