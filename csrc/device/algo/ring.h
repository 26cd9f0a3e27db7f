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

// One pair of ranks, seen from one of them: addresses are worked out once, for all rows of the call.
class Port {
public:
    EP_DEVICE Port(uint8_t* slots, uint64_t* full, uint64_t* empty, const layout::WindowLayout& window, uint64_t call)
        : slots_(slots), full_(full), empty_(empty), window_(&window), call_(call) {}

    // Where the row at `position` is on its way: at the receiver.
    EP_DEVICE uint8_t* slot(int position) const {
        return slots_ + static_cast<uint64_t>(position % window_->window) * window_->slot_bytes;
    }

    // Sender: may the row go into its slot?
    EP_DEVICE FlagTest slot_is_free(int position) const {
        if (position < window_->window) return {nullptr, 0};
        return {empty_ + position % window_->window, tag(position - window_->window)};
    }
    // Sender, after the whole warp has written the slot and met in a sync().
    EP_DEVICE void publish(int position) const {
        // Pairs with: row_is_here at the receiver.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(full_ + position % window_->window, tag(position));
    }

    // Receiver: has the row come?
    EP_DEVICE FlagTest row_is_here(int position) const { return {full_ + position % window_->window, tag(position)}; }
    // Receiver, after the whole warp has read the slot and met in a sync(). `num_rows`: of this sender, in all.
    EP_DEVICE void give_back(int position, int num_rows) const {
        if (position + window_->window >= num_rows) return;  // nobody needs the slot again in this call
        // Pairs with: slot_is_free at the sender.
        prim::store<prim::Order::kRelease, prim::Scope::kSys>(empty_ + position % window_->window, tag(position));
    }

private:
    EP_DEVICE uint64_t tag(int position) const { return layout::make_tag(call_, static_cast<uint64_t>(position)); }

    uint8_t* slots_;
    uint64_t* full_;   // at the receiver
    uint64_t* empty_;  // at the sender
    const layout::WindowLayout* window_;
    uint64_t call_;
};

class Ring {
public:
    EP_DEVICE Ring(const Watch& watch, const layout::WindowLayout& window)
        : watch_(watch), window_(window), bank_(bank_of(watch.call)) {}

    EP_DEVICE Port to(int receiver) const { return port(watch_.heap.rank(), receiver, bank_, 0); }
    EP_DEVICE Port from(int sender) const { return port(sender, watch_.heap.rank(), bank_, 0); }
    // Across nodes: the stream of these two that belongs to a source (dispatch) or owner (combine) in `node`.
    EP_DEVICE Port to(int receiver, int node) const { return port(watch_.heap.rank(), receiver, group(node), node); }
    EP_DEVICE Port from(int sender, int node) const { return port(sender, watch_.heap.rank(), group(node), node); }

    // One look, no waiting; acquire. For what has mostly come already: one trip to memory.
    EP_DEVICE bool is_set(FlagTest test) const {
        return test.flag == nullptr || prim::load<prim::Order::kAcquire, prim::Scope::kSys>(test.flag) >= test.expected;
    }

    // Acquire. Other lanes may touch what the flag guards after a sync().
    EP_DEVICE bool wait(layout::Stage stage, int peer, FlagTest test) const {
        return test.flag == nullptr || wait_at_least(watch_, {stage, peer}, test.flag, test.expected);
    }

private:
    EP_DEVICE int group(int node) const { return bank_ * watch_.heap.num_nodes() + node; }
    EP_DEVICE Port port(int sender, int receiver, int group, int node) const {
        return {watch_.heap.slot(receiver, window_, bank_, sender, 0, node),
                watch_.heap.full(receiver, group, sender, 0), watch_.heap.empty(sender, group, receiver, 0), window_,
                watch_.call};
    }

    const Watch& watch_;
    const layout::WindowLayout& window_;
    int bank_;
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
