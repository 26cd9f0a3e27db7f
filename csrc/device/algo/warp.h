// Small things that a warp does together.
#pragma once

#include "device/algo/group.h"
#include "device/algo/row.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// Lane `source`'s pointer, to every lane.
template <class T> EP_DEVICE T* broadcast_pointer(Warp, T* pointer, int source) {
    const auto bits = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(pointer));
    return reinterpret_cast<T*>(static_cast<uintptr_t>(__shfl_sync(prim::kFullMask, bits, source)));
}

enum class SourceKind { kInput, kFromPeer };

// kFromPeer: an acquire has ordered the peer's writes before this.
template <SourceKind kKind> EP_DEVICE prim::Vec16 load_vec(const prim::Vec16* source) {
    return kKind == SourceKind::kInput ? prim::load_input(source) : prim::load_shared_with_peers(source);
}

// One read, one write for each destination: `pointers` of the lanes in `lanes` (uniform) receive `num_vecs` x 16 bytes.
template <int kUnroll, SourceKind kKind = SourceKind::kInput>
EP_DEVICE void multicast_row(Warp warp, const prim::Vec16* source, int num_vecs, uint32_t lanes, prim::Vec16* pointer) {
    warp.expect();
    for (int base = 0; base < num_vecs; base += kChunkVecs<kUnroll>) {
        prim::Vec16 held[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int idx = base + i * prim::kWarpSize + warp.thread_rank();
            if (idx < num_vecs) held[i] = load_vec<kKind>(source + idx);
        }
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
            prim::Vec16* destination = broadcast_pointer(warp, pointer, __ffs(static_cast<int>(rest)) - 1);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                const int idx = base + i * prim::kWarpSize + warp.thread_rank();
                if (idx < num_vecs) prim::store_streaming(destination + idx, held[i]);
            }
        }
    }
}

// One read, one write.
template <SourceKind kKind, int kUnroll>
EP_DEVICE void copy_row(Warp warp, prim::Vec16* destination, const prim::Vec16* source, int num_vecs) {
    warp.expect();
    for (int base = warp.thread_rank(); base < num_vecs; base += kChunkVecs<kUnroll>) {
        prim::Vec16 held[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int idx = base + i * prim::kWarpSize;
            if (idx < num_vecs) held[i] = load_vec<kKind>(source + idx);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int idx = base + i * prim::kWarpSize;
            if (idx < num_vecs) prim::store_streaming(destination + idx, held[i]);
        }
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
