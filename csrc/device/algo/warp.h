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

// One chunk of a row for multicast_row: kVecs vectors of each lane, all inside the row.
template <int kVecs, SourceKind kKind>
EP_DEVICE void multicast_chunk(Warp warp, const prim::Vec16* source, int base, uint32_t lanes, prim::Vec16* pointer) {
    const int first = base + warp.thread_rank();
    source += first;
    prim::Vec16 held[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) held[i] = load_vec<kKind>(source + i * prim::kWarpSize);
#pragma unroll 1
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        prim::Vec16* destination = broadcast_pointer(warp, pointer, __ffs(static_cast<int>(rest)) - 1) + first;
#pragma unroll
        for (int i = 0; i < kVecs; ++i) prim::store_streaming(destination + i * prim::kWarpSize, held[i]);
    }
}

// What is left of a row behind its last whole chunk: a vector of each lane at a time.
template <SourceKind kKind>
EP_DEVICE void multicast_rest(Warp warp, const prim::Vec16* source, int base, int num_vecs, uint32_t lanes,
                              prim::Vec16* pointer) {
    for (; base < num_vecs; base += prim::kWarpSize) {
        const int idx = base + warp.thread_rank();
        prim::Vec16 held = {};
        if (idx < num_vecs) held = load_vec<kKind>(source + idx);
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
            prim::Vec16* destination = broadcast_pointer(warp, pointer, __ffs(static_cast<int>(rest)) - 1);
            if (idx < num_vecs) prim::store_streaming(destination + idx, held);
        }
    }
}

// One read, one write for each destination: `pointers` of the lanes in `lanes` (uniform) receive `num_vecs` x 16 bytes.
template <int kUnroll, SourceKind kKind = SourceKind::kInput>
EP_DEVICE void multicast_row(Warp warp, const prim::Vec16* source, int num_vecs, uint32_t lanes, prim::Vec16* pointer) {
    warp.expect();
    int base = 0;
#pragma unroll 1
    for (; base + kChunkVecs<kUnroll> <= num_vecs; base += kChunkVecs<kUnroll>)
        multicast_chunk<kUnroll, kKind>(warp, source, base, lanes, pointer);
    multicast_rest<kKind>(warp, source, base, num_vecs, lanes, pointer);
}

// What has been loaded before is all under way before anything behind this begins: the compiler would keep loads back, to use
// their registers twice. Orders nothing.
EP_DEVICE void issue_loads(Warp warp) { warp.sync(); }

// One read, one write.
template <SourceKind kKind, int kUnroll>
EP_DEVICE void copy_row(Warp warp, prim::Vec16* destination, const prim::Vec16* source, int num_vecs) {
    warp.expect();
    const int lane = warp.thread_rank();
    int base = 0;
#pragma unroll 1
    for (; base + kChunkVecs<kUnroll> <= num_vecs; base += kChunkVecs<kUnroll>) {
        prim::Vec16 held[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) held[i] = load_vec<kKind>(source + (base + lane) + i * prim::kWarpSize);
        issue_loads(warp);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            prim::store_streaming(destination + (base + lane) + i * prim::kWarpSize, held[i]);
    }
    for (int idx = base + lane; idx < num_vecs; idx += prim::kWarpSize)
        prim::store_streaming(destination + idx, load_vec<kKind>(source + idx));
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
