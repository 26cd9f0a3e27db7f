// Shared regions whose owner is gone while a peer still maps them, or while a tensor of this process lies in them. They
// are looked at again whenever a heap is made or released, and freed as soon as the last one has let go: freeing earlier
// is undefined, waiting would block.
#pragma once

#include <memory>
#include <vector>

#include "comm/mailbox.h"
#include "device/owned.h"

namespace deep_ep::comm {

struct DeferredRegion {
    dev::OwnedShareable memory;
    std::shared_ptr<const Mailbox> mailbox;  // null: no peer maps the region
    int num_ranks;
    std::shared_ptr<const void> leases;  // see SymmetricHeap::lease
    std::shared_ptr<const void> also;    // freed with it
};

// True when every other rank has said that it maps the region no more, or has ended: the system has unmapped it then.
bool have_peers_left(const Mailbox& mailbox, int num_ranks);
// True while somebody holds a copy of `leases`.
bool has_leases(const DeferredRegion& region);

void defer_free(DeferredRegion region);

// Frees what nobody maps any more; returns how many regions remain.
size_t free_deferred();

}  // namespace deep_ep::comm
