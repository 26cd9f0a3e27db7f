// The device half of the engine `sim`.
#pragma once

#include "rail_sim/sim_engine.h"

namespace deep_ep::rail {
inline namespace EP_BACKEND {

class Rail {
public:
    explicit Rail(const Params& params) : view(*reinterpret_cast<const sim::View*>(params.bytes)) {}

    const sim::View& view;
};

namespace detail {

template <class Wait> bool post(const Rail& rail, const sim::Request& request, const Wait& wait) {
    sim::SimEngine& engine = *rail.view.engine;
    const auto look = [&](uint64_t& seen) {
        seen = 0;
        return engine.network().has_room(engine.rank());
    };
    if (!engine.network().has_room(engine.rank()) && !wait(0, look)) return false;
    engine.network().post(engine.rank(), request);
    return true;
}

}  // namespace detail

template <class T> T* at(const Rail& rail, uint64_t offset) { return reinterpret_cast<T*>(rail.view.window + offset); }

template <class Wait> bool put(const Rail& rail, int peer, const Copy& copy, Flag flag, const Wait& wait) {
    __syncwarp();
    const bool is_posted =
        prim::lane_idx() == 0 &&
        detail::post(rail, {sim::Kind::kPut, peer, copy.dst, copy.src, copy.bytes, flag.offset, flag.value}, wait);
    return __any_sync(prim::kFullMask, is_posted);
}

template <class Wait> bool set(const Rail& rail, int peer, Flag flag, const Wait& wait) {
    return detail::post(rail, {sim::Kind::kSet, peer, 0, 0, 0, flag.offset, flag.value}, wait);
}

template <class Wait> bool add(const Rail& rail, int peer, uint64_t counter, uint64_t n, const Wait& wait) {
    return detail::post(rail, {sim::Kind::kAdd, peer, 0, 0, 0, counter, n}, wait);
}

inline uint8_t* reach(const Rail& rail, int peer) {
    return reinterpret_cast<uint8_t*>(rail.view.engine->network().reach(peer));
}

template <class Wait> bool tell(const Rail& rail, int peer, uint64_t num_bytes, Flag flag, const Wait& wait) {
    return detail::post(rail, {sim::Kind::kSet, peer, 0, 0, 0, flag.offset, flag.value, num_bytes}, wait);
}

inline void confirm(const Rail& rail, Flag flag) {
    static_cast<void>(prim::load<prim::Order::kAcquire, prim::Scope::kSys>(at<const uint64_t>(rail, flag.offset)));
    rail.view.engine->network().confirm(rail.view.engine->rank(), flag.offset, flag.value);
}

inline void confirm_at(const Rail& rail, const uint64_t* word, uint64_t value) {
    static_cast<void>(prim::load<prim::Order::kAcquire, prim::Scope::kSys>(word));
    rail.view.engine->network().confirm_at(rail.view.engine->rank(), word, value);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::rail
