// What the device half of the engine `nvshmem` needs. Pointers are the device's.
#pragma once

#include <cstdint>

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

}  // namespace deep_ep::rail::nvshmem
