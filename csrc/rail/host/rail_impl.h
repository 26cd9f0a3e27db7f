// The device half of the engine `host`: commands into a ring that a thread of the host serves.
#pragma once

#include "rail/host/ring.h"

namespace deep_ep::rail {
inline namespace EP_BACKEND {

class Rail {
public:
    explicit EP_DEVICE Rail(const Params& params) : ring(*reinterpret_cast<const host::RingView*>(params.bytes)) {}

    const host::RingView& ring;
};

namespace detail {

EP_DEVICE bool has_room(const host::RingView& ring, uint64_t place) {
    using prim::Order;
    using prim::Scope;
    // Acquire, both times: the host has read the command that stood in this place.
    const uint64_t known = prim::load<Order::kAcquire, Scope::kGpu>(ring.known_taken);
    if (place < known + ring.capacity) return true;
    const uint64_t taken = prim::load_from_host(ring.taken);
    // Threads may store an older value over a newer one: then the next one looks at the original again.
    if (taken != known) prim::store<Order::kRelease, Scope::kGpu>(ring.known_taken, taken);
    return place < taken + ring.capacity;
}

// A place is claimed only when it is free, so that whoever gives up leaves no hole.
template <class Wait> EP_DEVICE bool claim(const host::RingView& ring, uint64_t& place, const Wait& wait) {
    using prim::Order;
    using prim::Scope;
    place = prim::load<Order::kRelaxed, Scope::kGpu>(ring.claimed);
    for (;;) {
        if (!has_room(ring, place)) {
            const auto look = [&](uint64_t& seen) {
                seen = prim::load_from_host(ring.taken);
                return place < seen + ring.capacity;
            };
            if (!wait(place + 1 - ring.capacity, look)) return false;
            place = prim::load<Order::kRelaxed, Scope::kGpu>(ring.claimed);
            continue;
        }
        const uint64_t found = prim::compare_swap<Order::kRelaxed, Scope::kGpu>(ring.claimed, place, place + 1);
        if (found == place) return true;
        place = found;
    }
}

// One thread.
template <class Wait> EP_DEVICE bool post(const host::RingView& ring, const host::Command& command, const Wait& wait) {
    uint64_t place = 0;
    if (!claim(ring, place, wait)) return false;
    host::CommandSlot& slot = ring.commands[place & (ring.capacity - 1)];
    slot.command = command;
    // Pairs with: CommandRing::take on the host.
    prim::store<prim::Order::kRelease, prim::Scope::kSys>(&slot.sequence, place + 1);
    prim::wake_host(ring.is_asleep, ring.event);
    return true;
}

EP_DEVICE host::Command make_command(host::Kind kind, int peer, uint64_t flag, uint64_t value) {
    host::Command command{};
    command.kind = kind;
    command.peer = peer;
    command.flag = flag;
    command.value = value;
    return command;
}

}  // namespace detail

template <class T> EP_DEVICE T* at(const Rail& rail, uint64_t offset) {
    return reinterpret_cast<T*>(rail.ring.window + offset);
}

template <class Wait> EP_DEVICE bool put(const Rail& rail, int peer, const Copy& copy, Flag flag, const Wait& wait) {
    __syncwarp();  // each lane's writes, one lane's release
    bool is_posted = false;
    if (prim::lane_idx() == 0) {
        host::Command command = detail::make_command(host::Kind::kPut, peer, flag.offset, flag.value);
        command.dst = copy.dst;
        command.src = copy.src;
        command.bytes = copy.bytes;
        is_posted = detail::post(rail.ring, command, wait);
    }
    return __any_sync(prim::kFullMask, is_posted);
}

template <class Wait> EP_DEVICE bool set(const Rail& rail, int peer, Flag flag, const Wait& wait) {
    return detail::post(rail.ring, detail::make_command(host::Kind::kSet, peer, flag.offset, flag.value), wait);
}

template <class Wait> EP_DEVICE bool add(const Rail& rail, int peer, uint64_t counter, uint64_t n, const Wait& wait) {
    return detail::post(rail.ring, detail::make_command(host::Kind::kAdd, peer, counter, n), wait);
}

// Windows are memory of different machines.
EP_DEVICE uint8_t* reach(const Rail&, int) { return nullptr; }

template <class Wait> EP_DEVICE bool tell(const Rail& rail, int peer, uint64_t, Flag flag, const Wait& wait) {
    return set(rail, peer, flag, wait);
}

EP_DEVICE void confirm(const Rail& rail, Flag flag) {
    // Pairs with: Connection::finish_message, the receiver's release of the flag.
    static_cast<void>(prim::load_from_host(at<const uint64_t>(rail, flag.offset)));
}

// Another process's receiver: the same memory.
EP_DEVICE void confirm_at(const Rail&, const uint64_t* word, uint64_t) {
    static_cast<void>(prim::load_from_host(word));
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::rail
