// One word at each rank: a group tells all of them something, or waits until all of them have told this rank.
#pragma once

#include "device/algo/group.h"
#include "device/algo/watch.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// Which ranks are meant.
struct AllRanks {
    EP_DEVICE bool operator()(int) const { return true; }
};
struct OtherRanks {
    int self;
    EP_DEVICE bool operator()(int rank) const { return rank != self; }
};

// Writes `value` to `*flag_of(rank)` for each rank that is meant. kRelease: the rank may then read what the group, met in a
// sync(), has written before, or write over what it has read. One release each: lanes that release together wait together.
template <prim::Order O, prim::Scope S, class Group, class IsMeant, class FlagOf>
EP_DEVICE void publish(const Group& group, int num_ranks, const IsMeant& is_meant, const FlagOf& flag_of,
                       uint64_t value) {
    group.expect();
    // Mostly once, so not worth instructions.
#pragma unroll 1
    for (int rank = static_cast<int>(group.thread_rank()); rank < num_ranks; rank += static_cast<int>(group.size()))
        if (is_meant(rank)) prim::store<O, S>(flag_of(rank), value);
}

// True on all lanes once `*flag_of(rank) >= expected` for each rank that is meant: what those have released may be touched by
// all lanes. False: a wait failed.
template <class IsMeant, class FlagOf>
EP_DEVICE bool wait_for_ranks(Warp warp, const Watch& watch, layout::Stage stage, const IsMeant& is_meant,
                              const FlagOf& flag_of, uint64_t expected) {
    bool is_here = true;
    for_each(warp, watch.heap.num_ranks(), [&](int rank) {
        if (is_meant(rank)) is_here &= wait_at_least(watch, {stage, rank}, flag_of(rank), expected);
    });
    return all(warp, is_here);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
