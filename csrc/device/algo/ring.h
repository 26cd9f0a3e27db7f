// Rows on their way from rank to rank: windows of slots with a flag for each slot, nothing to clear.
//
// The row at `position` (counted per pair of ranks and call) lives in slot position % window of the receiver's region
// for that source. Two flags guard it, each holding a tag that grows from use to use:
//     full  (receiver's memory, written by the sender):   the row is there
//     empty (sender's memory, written by the receiver):   the row has been taken out; only where a later row needs the slot
#pragma once

#include "device/algo/call.h"
#include "device/algo/watch.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

struct FlagTest {
    const uint64_t* flag;  // null: nothing to wait for
    uint64_t expected;
};

class Ring {
public:
    EP_DEVICE Ring(const Watch& watch, const layout::WindowLayout& window)
        : watch_(watch), window_(window), bank_(bank_of(watch.call)) {}

    // Sender: may the row go into its slot at `receiver`?
    EP_DEVICE FlagTest slot_is_free(int receiver, int position) const {
        if (position < window_.window) return {nullptr, 0};
        const int self = watch_.heap.rank();
        return {watch_.heap.empty(self, bank_, receiver, slot_idx(position)),
                layout::make_tag(watch_.call, static_cast<uint64_t>(position - window_.window))};
    }
    EP_DEVICE uint8_t* slot_at(int receiver, int position) const {
        return watch_.heap.slot(receiver, window_, bank_, watch_.heap.rank(), slot_idx(position));
    }
    // One thread, after the whole warp has written the slot and met in a __syncwarp.
    EP_DEVICE void publish(int receiver, int position) const {
        // Pairs with: row_is_here at the receiver.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(
            watch_.heap.full(receiver, bank_, watch_.heap.rank(), slot_idx(position)),
            layout::make_tag(watch_.call, static_cast<uint64_t>(position)));
    }

    // Receiver: has the row come?
    EP_DEVICE FlagTest row_is_here(int sender, int position) const {
        return {watch_.heap.full(watch_.heap.rank(), bank_, sender, slot_idx(position)),
                layout::make_tag(watch_.call, static_cast<uint64_t>(position))};
    }
    EP_DEVICE const uint8_t* row_at(int sender, int position) const {
        return watch_.heap.slot(watch_.heap.rank(), window_, bank_, sender, slot_idx(position));
    }
    // One thread, after the whole warp has read the slot and met in a __syncwarp. `num_rows`: of this sender, in all.
    EP_DEVICE void give_back(int sender, int position, int num_rows) const {
        if (position + window_.window >= num_rows) return;  // nobody needs the slot again in this call
        // Pairs with: slot_is_free at the sender.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(
            watch_.heap.empty(sender, bank_, watch_.heap.rank(), slot_idx(position)),
            layout::make_tag(watch_.call, static_cast<uint64_t>(position)));
    }

    // One look, no waiting; acquire where the answer is yes.
    EP_DEVICE bool is_set(FlagTest test) const {
        if (test.flag == nullptr) return true;
        // Polling with acquire would empty the L1 of the SM each time.
        if (prim::load<prim::Order::kRelaxed, prim::Scope::kSys>(test.flag) < test.expected) return false;
        return prim::load<prim::Order::kAcquire, prim::Scope::kSys>(test.flag) >= test.expected;
    }

    // One thread; acquire. Other lanes may touch what the flag guards after a __syncwarp.
    EP_DEVICE bool wait(layout::Stage stage, int peer, FlagTest test) const {
        return test.flag == nullptr || wait_at_least(watch_, {stage, peer}, test.flag, test.expected);
    }

private:
    EP_DEVICE int slot_idx(int position) const { return position % window_.window; }

    const Watch& watch_;
    const layout::WindowLayout& window_;
    int bank_;
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
