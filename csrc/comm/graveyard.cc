#include "comm/graveyard.h"

#include <mutex>

namespace deep_ep::comm {

namespace {

struct Graveyard {
    std::mutex mutex;
    std::vector<BuriedRegion> regions;
};

// Never destroyed: at process exit the driver may be gone already, and the system takes the memory back anyway.
Graveyard& graveyard() {
    static auto* instance = new Graveyard;
    return *instance;
}

}  // namespace

bool have_peers_left(const BuriedRegion& region) {
    if (region.mailbox == nullptr) return true;
    for (int rank = 0; rank < region.num_ranks; ++rank) {
        if (rank != region.mailbox->rank() && region.mailbox->presence(rank) == Presence::kHere) return false;
    }
    return true;
}

bool has_leases(const BuriedRegion& region) { return region.leases.use_count() > 1; }

void bury(BuriedRegion region) {
    const std::lock_guard lock(graveyard().mutex);
    graveyard().regions.push_back(std::move(region));
}

size_t sweep_graveyard() {
    const std::lock_guard lock(graveyard().mutex);
    auto& regions = graveyard().regions;
    std::erase_if(regions, [](const BuriedRegion& region) { return !has_leases(region) && have_peers_left(region); });
    return regions.size();
}

}  // namespace deep_ep::comm
