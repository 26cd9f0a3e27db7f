// Where kernels leave commands for the threads of the engine `host`: a ring in host-mapped memory.
#pragma once

#include <cstdint>

#include "rail/engine.h"

namespace deep_ep::rail::host {

enum class Kind : uint32_t { kPut = 1, kSet = 2, kAdd = 3 };

struct Command {
    uint64_t dst;
    uint64_t src;
    uint64_t flag;
    uint64_t value;
    uint32_t bytes;
    int32_t peer;
    Kind kind;
    uint32_t unused;
};

struct alignas(64) CommandSlot {
    Command command;
    uint64_t unused;
    uint64_t sequence;  // its place, counted from 1; written last
};
static_assert(sizeof(CommandSlot) == 64);

// What the device half needs. Pointers are the device's.
struct RingView {
    char* window;
    CommandSlot* commands;
    const uint64_t* taken;  // commands that the host has taken out; the host writes it
    uint32_t* is_asleep;    // the sender is
    uint64_t* claimed;      // places that are given away; in device memory
    uint64_t* known_taken;  // a copy of `taken`, perhaps old; in device memory
    uint32_t capacity;      // a power of two
    int32_t event;          // that wakes the sender
};

}  // namespace deep_ep::rail::host
