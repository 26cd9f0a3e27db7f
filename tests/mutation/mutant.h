// What make_mutants.py puts in place of orderings and waits: the same operation, or a weakened one when its number is
// the active one. Included by generated copies of the kernels only.
#pragma once

#include "device/prim.h"

namespace deep_ep::mutant {

inline int active = 0;                // 0: none, the kernels are as written
inline constexpr int kNarrow = 1000;  // kNarrow + n: mutant n keeps its order but loses its scope (sys -> gpu)

template <int kId> bool is_active() { return active == kId; }

template <int kId, prim::Scope S, class T> void store(T* ptr, T value) {
    if (is_active<kId>())
        prim::store<prim::Order::kRelaxed, S>(ptr, value);
    else if (is_active<kNarrow + kId>())
        prim::store<prim::Order::kRelease, prim::Scope::kGpu>(ptr, value);
    else
        prim::store<prim::Order::kRelease, S>(ptr, value);
}

template <int kId, prim::Scope S, class T> T load(const T* ptr) {
    if (is_active<kId>()) return prim::load<prim::Order::kRelaxed, S>(ptr);
    if (is_active<kNarrow + kId>()) return prim::load<prim::Order::kAcquire, prim::Scope::kGpu>(ptr);
    return prim::load<prim::Order::kAcquire, S>(ptr);
}

template <int kId, prim::Scope S, class T> T fetch_add(T* ptr, T value) {
    return is_active<kId>() ? prim::fetch_add<prim::Order::kRelaxed, S>(ptr, value)
                            : prim::fetch_add<prim::Order::kAcqRel, S>(ptr, value);
}

template <int kId> void sync_warp() {
    if (!is_active<kId>()) __syncwarp();
}

template <int kId> void sync_threads() {
    if (!is_active<kId>()) __syncthreads();
}

template <int kId, prim::Scope S> void fence() {
    if (is_active<kNarrow + kId>())
        prim::fence<prim::Order::kAcqRel, prim::Scope::kGpu>();
    else if (!is_active<kId>())
        prim::fence<prim::Order::kAcqRel, S>();
}

}  // namespace deep_ep::mutant
