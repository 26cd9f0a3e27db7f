// What the driver of a scheduler and its fibers touch at every switch. Internal to the executor.
#pragma once

#include <cstdint>

#include "device/simt/context.h"

namespace deep_ep::simt {

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    uint64_t below(uint64_t bound) { return (next() >> 32) * bound >> 32; }

private:
    uint64_t state_;
};

// How a seeded schedule behaves, itself drawn from the seed: some seeds are hectic, some let blocks fall far behind.
struct Temper {
    explicit Temper(Random& rng) {
        yield_odds = 2u << rng.below(3);
        stall_odds = 4u << (2 * rng.below(3));
        stall_passes = 8u << (2 * rng.below(3));
        short_turn = 2u << rng.below(5);
    }
    uint32_t yield_odds;    // 1 : n, before a synchronising access
    uint32_t stall_odds;    // 1 : n, after a turn of a block
    uint32_t stall_passes;  // at most
    uint32_t short_turn;    // resumptions
};

struct Drive {
    explicit Drive(uint64_t seed) : is_seeded(seed != 0), rng(seed), temper(rng) {}

    void note_progress() { ++progress; }
    void note(uint64_t event) { trace = (trace ^ event) * 0x100000001b3ull; }
    bool draw_yield() { return rng.below(temper.yield_odds) == 0; }

    Context context;  // of the driver: where fibers return to
    uint64_t trace = 0xcbf29ce484222325ull;
    uint64_t progress = 0;     // grows whenever anything has changed that somebody may wait for
    bool has_sleeper = false;  // a fiber of this pass waits for the clock alone
    const bool is_seeded;
    bool check_call_sites = true;
    Random rng;
    const Temper temper;
};

}  // namespace deep_ep::simt
