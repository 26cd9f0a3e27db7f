#include "comm/deferred_free.h"

#include <mutex>

namespace deep_ep::comm {

namespace {

struct DeferredRegions {
    std::mutex mutex;
    std::vector<DeferredRegion> regions;
};

// Never destroyed: at process exit the driver may be gone already, and the system takes the memory back anyway.
DeferredRegions& deferred_regions() {
    static auto* instance = new DeferredRegions;
    return *instance;
}

}  // namespace

bool have_peers_left(const Mailbox& mailbox, int num_ranks) {
    for (int rank = 0; rank < num_ranks; ++rank) {
        if (rank != mailbox.rank() && mailbox.presence(rank) == Presence::kHere) return false;
    }
    return true;
}

bool has_leases(const DeferredRegion& region) { return region.leases.use_count() > 1; }

void defer_free(DeferredRegion region) {
    const std::lock_guard lock(deferred_regions().mutex);
    deferred_regions().regions.push_back(std::move(region));
}

size_t free_deferred() {
    const std::lock_guard lock(deferred_regions().mutex);
    auto& regions = deferred_regions().regions;
    std::erase_if(regions, [](const DeferredRegion& region) {
        const bool is_mapped = region.mailbox != nullptr && !have_peers_left(*region.mailbox, region.num_ranks);
        return !has_leases(region) && !is_mapped;
    });
    return regions.size();
}

}  // namespace deep_ep::comm
