// What the device half of the engine `nvshmem` needs. Pointers are the device's.
#pragma once

#include <cstdint>
#include <cstring>

#include "rail/engine.h"

namespace deep_ep::rail::nvshmem {

// What was posted to a rank.
struct Posted {
    uint64_t num_messages;
    uint64_t num_bytes;
};

struct RailView {
    char* window;
    const int32_t* pes;    // by rank: its number in NVSHMEM's world
    Posted* posted;        // by rank
    char* const* reached;  // by rank: its window where loads and stores reach it, null elsewhere
    bool is_every_peer_reached;
};
static_assert(sizeof(RailView) <= Params::kMaxBytes);

inline Params pack(const RailView& view) {
    Params params;
    std::memcpy(params.bytes, &view, sizeof(view));
    return params;
}

}  // namespace deep_ep::rail::nvshmem
