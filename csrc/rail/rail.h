// The device half of an engine: how kernels reach the windows of ranks in other nodes. One implementation for each engine
// (rail_impl.h, by include path), so kernels are compiled once for each device and engine and never name one.
//
//     const rail::Rail rail(params.rail);  // rail::Params, from Engine::params()
//
// Places are offsets into the window, flags and counters 8-byte words in it. Two calls are in no order to each other: a
// flag tells of its own put and of nothing else. Two rules for callers:
//   - The source of a put stays as it is until a flag of the protocol says that the peer has read the bytes.
//   - Nobody writes a flag again before the peer has confirmed the value before.
// A counter is changed by add() alone.
//
// Posting may have to wait for room. `wait(expected, look)` is the caller's wait, with its deadline: it calls
// `look(seen)` until that returns true, and returns false when it gives up; algo::wait_until does that. What a call that
// returns false should have sent is not sent.
#pragma once

#include <cstdint>

#include "device/prim.h"
#include "rail/engine.h"

namespace deep_ep::rail {
inline namespace EP_BACKEND {

class Rail;

struct Copy {
    uint64_t dst, src;  // multiples of 8
    uint32_t bytes;
};

struct Flag {
    uint64_t offset;
    uint64_t value;
};

// A place in this rank's own window.
template <class T> EP_DEVICE T* at(const Rail& rail, uint64_t offset);

// One warp, whose lanes may all have written the source; what others wrote must be ordered before. At the peer, later: the
// bytes, then the flag. (After bulk stores into the source: bulk_wait by the lane that stored, as before any release.)
template <class Wait> EP_DEVICE bool put(const Rail& rail, int peer, const Copy& copy, Flag flag, const Wait& wait);

// One thread. The same without bytes.
template <class Wait> EP_DEVICE bool set(const Rail& rail, int peer, Flag flag, const Wait& wait);

// One thread. At the peer, later: the counter grows by `n`, with what this thread has seen and done before.
template <class Wait> EP_DEVICE bool add(const Rail& rail, int peer, uint64_t counter, uint64_t n, const Wait& wait);

// The begin of the peer's window where loads and stores of this device reach it; null elsewhere. Who stores there has the
// peer's leave, as for a put to these places.
EP_DEVICE uint8_t* reach(const Rail& rail, int peer);

// One thread. The flag of `num_bytes` that have been stored into the peer's window through reach(), by this thread or ordered
// before it: what a put says of its own bytes.
template <class Wait> EP_DEVICE bool tell(const Rail& rail, int peer, uint64_t num_bytes, Flag flag, const Wait& wait);

// One thread, once it has seen `flag.value` in its own window, by whatever load. From here on it may read what the flag
// guards; other lanes of its warp after a __syncwarp(). Of a counter: what all adds guard that it has seen.
EP_DEVICE void confirm(const Rail& rail, Flag flag);

// The same of a word in any window of this node, as Engine::share_windows() has given it.
EP_DEVICE void confirm_at(const Rail& rail, const uint64_t* word, uint64_t value);

}  // namespace EP_BACKEND
}  // namespace deep_ep::rail

#include "rail_impl.h"  // rail/host/, or another engine's, by include path
