#include "comm/graveyard.h"

#include <algorithm>
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
    std::vector<uint64_t> left(static_cast<size_t>(region.num_ranks));
    const auto* words = static_cast<const uint8_t*>(region.memory.address) + region.left_offset;
    region.device->copy_now(left.data(), words, left.size() * sizeof(uint64_t));
    left[static_cast<size_t>(region.rank)] = 1;
    return std::all_of(left.begin(), left.end(), [](uint64_t word) { return word != 0; });
}

bool has_leases(const BuriedRegion& region) { return region.leases.use_count() > 1; }

void bury(BuriedRegion region) {
    const std::lock_guard lock(graveyard().mutex);
    graveyard().regions.push_back(std::move(region));
}

size_t sweep_graveyard() {
    const std::lock_guard lock(graveyard().mutex);
    auto& regions = graveyard().regions;
    std::erase_if(regions, [](const BuriedRegion& region) {
        if (has_leases(region) || !have_peers_left(region)) return false;
        region.device->free_shareable(region.memory);
        return true;
    });
    return regions.size();
}

}  // namespace deep_ep::comm
