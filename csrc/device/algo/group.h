// Who calls: a type for each kind of group of threads, taken by every function that more than one thread has to call. A
// function that takes none is called by any thread for itself. And what groups do with rows.
//
// All of them have thread_rank(), size() and sync(), as groups of cooperative groups and NCCL's Coop have, and expect(), by which a
// function says that the whole group calls it. On a GPU that is nothing; the executor reports a thread that stays away,
// or that does something else meanwhile (docs/executor.md). The types are empty, or hold what only the caller knows.
#pragma once

#include <type_traits>

#include "device/prim.h"

namespace deep_ep::algo {
inline namespace EP_BACKEND {

// The running warp.
struct Warp {
    EP_DEVICE static int thread_rank() { return prim::lane_idx(); }
    EP_DEVICE static constexpr int size() { return prim::kWarpSize; }
    EP_DEVICE static void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        prim::sync_warp(file, line);
    }
    EP_DEVICE static void expect(const char* what = __builtin_FUNCTION()) { prim::expect_warp(what); }
};

// The running block.
struct Block {
    EP_DEVICE static int thread_rank() { return static_cast<int>(threadIdx.x); }
    EP_DEVICE static int size() { return static_cast<int>(blockDim.x); }
    EP_DEVICE static int num_warps() { return size() / prim::kWarpSize; }
    EP_DEVICE static void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        prim::sync_block(file, line);
    }
    EP_DEVICE static void expect(const char* what = __builtin_FUNCTION()) { prim::expect_block(what); }
};

// All blocks of the launch. Nothing here waits for other blocks, so there is no sync(); see is_last_block().
struct Grid {
    EP_DEVICE static int64_t thread_rank() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
    EP_DEVICE static int64_t size() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
    EP_DEVICE static void expect(const char* what = __builtin_FUNCTION()) { prim::expect_block(what); }
};

// The group shares the numbers from 0 to `count`: `work(i)` for each, by the thread whose turn it is.
template <class Group, class Count, class Work>
EP_DEVICE void for_each(const Group& group, Count count, const Work& work) {
    group.expect();
    for (auto i = static_cast<Count>(group.thread_rank()); i < count; i += static_cast<Count>(group.size())) work(i);
}

// One lane's answer on every lane. What it has acquired may be touched by all of them.
EP_DEVICE bool broadcast(Warp warp, bool answer, int lane = 0) {
    const int known = __shfl_sync(prim::kFullMask, answer ? 1 : 0, lane);
    warp.sync();  // one lane's acquire, every lane's accesses
    return known != 0;
}

// Has every lane succeeded? What each has acquired may be touched by all of them.
EP_DEVICE bool all(Warp warp, bool answer) {
    const bool is_agreed = __all_sync(prim::kFullMask, answer) != 0;
    warp.sync();  // each lane's acquire, every lane's accesses
    return is_agreed;
}

// A barrier of the block. Has one of its threads said yes?
EP_DEVICE bool any(Block, bool answer, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return prim::sync_block_any(answer, file, line);
}

// -- The block of a launch that comes last to some point, and goes on there for all of them --------------------------
// A counter in device memory says how many have come. It is zero between launches: the last block leaves it so.

struct Arrival {
    bool is_last;
    bool is_marked;  // some block has come with a mark; known to the last one
};

// One thread of each block. kAcqRel: its block's work, after a barrier, is released to the last block, which acquires that of
// all. kRelaxed: where the last block reads nothing that the others have written, or only what they wrote with atomics.
template <prim::Order O, prim::Scope S> EP_DEVICE Arrival arrive(uint32_t* counter, bool is_marked = false) {
    constexpr uint32_t kMark = 1u << 16;
    const uint32_t mine = is_marked ? kMark + 1 : 1;
    const uint32_t count = prim::fetch_add<O, S>(counter, mine) + mine;
    const bool is_last = count % kMark == gridDim.x;
    if (is_last) prim::store<prim::Order::kRelaxed, S>(counter, 0u);
    return {is_last, count >= kMark};
}

// One warp of each block, where all of its warps have met in a barrier.
template <prim::Order O, prim::Scope S> EP_DEVICE bool is_last_block(Warp warp, uint32_t* counter) {
    warp.expect();
    bool is_last = false;
    if (warp.thread_rank() == 0) is_last = arrive<O, S>(counter).is_last;
    return broadcast(warp, is_last);
}

// All blocks. `shared`: a word of shared memory.
template <prim::Order O, prim::Scope S> EP_DEVICE bool is_last_block(Block block, uint32_t* counter, int& shared) {
    block.expect();
    block.sync();  // what all threads of the block have done, one thread's release
    if (block.thread_rank() == 0) shared = arrive<O, S>(counter).is_last ? 1 : 0;
    block.sync();  // one thread's acquire, all threads' accesses
    return shared != 0;
}

// -- Rows of 16-byte vectors, as a warp works on them: a chunk at a time, of which each lane has a piece -------------

// Which vectors of a chunk a lane has.
enum class Pieces {
    kInterleaved,  // every 32nd: what a warp reads or writes at once stands together
    kNeighbours,   // vectors that stand together, for formats that pack them
};

// One lane's part of a chunk.
template <int kVecs> struct Piece { prim::Vec16 vec[kVecs]; };

template <int kVecs> constexpr int kChunkVecs = kVecs* prim::kWarpSize;  // that a warp works on at once

// Where vector `i` of this lane's piece stands in its chunk.
template <int kVecs> EP_DEVICE int piece_vec(Warp warp, Pieces pieces, int i) {
    return pieces == Pieces::kNeighbours ? warp.thread_rank() * kVecs + i : i * prim::kWarpSize + warp.thread_rank();
}

// Calls `work(i, vec)` for each vector of this lane's piece that lies before `end`, both counted from the chunk's begin.
template <int kVecs, class Work> EP_DEVICE void for_piece(Warp warp, Pieces pieces, int end, const Work& work) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
        if (const int vec = piece_vec<kVecs>(warp, pieces, i); vec < end) work(i, vec);
}

// By `load(vec)`. Behind `end` the piece is what it was.
template <int kVecs, class Load>
EP_DEVICE void load_piece(Warp warp, Pieces pieces, Piece<kVecs>& piece, int end, const Load& load) {
    for_piece<kVecs>(warp, pieces, end, [&](int i, int vec) { piece.vec[i] = load(vec); });
}

// To a chunk at `target`.
template <int kVecs>
EP_DEVICE void store_piece(Warp warp, Pieces pieces, const Piece<kVecs>& piece, int end, prim::Vec16* target) {
    for_piece<kVecs>(warp, pieces, end, [&](int i, int vec) { prim::store_streaming(target + vec, piece.vec[i]); });
}

// Tables of expert ids come with 4 or 8 bytes for each.
EP_DEVICE int64_t load_expert_id(const void* ids, int idx_bytes, int64_t index) {
    return idx_bytes == 8 ? static_cast<const int64_t*>(ids)[index]
                          : static_cast<int64_t>(static_cast<const int32_t*>(ids)[index]);
}

EP_DEVICE void store_expert_id(void* ids, int idx_bytes, int64_t index, int value) {
    if (idx_bytes == 8)
        static_cast<int64_t*>(ids)[index] = value;
    else
        static_cast<int32_t*>(ids)[index] = value;
}

// -- Copies of rows --------------------------------------------------------------------------------------------------

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

struct Nothing {
    EP_DEVICE void operator()() const {}
};

// One read, one write. `meanwhile` is called once, by all lanes, while the first loads are on their way and nothing is stored.
template <SourceKind kKind, int kUnroll, class Meanwhile = Nothing>
EP_DEVICE void copy_row(Warp warp, prim::Vec16* destination, const prim::Vec16* source, int num_vecs,
                        const Meanwhile& meanwhile = {}) {
    warp.expect();
    const int lane = warp.thread_rank();
    int base = 0;
#pragma unroll 1
    for (; base + kChunkVecs<kUnroll> <= num_vecs; base += kChunkVecs<kUnroll>) {
        prim::Vec16 held[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) held[i] = load_vec<kKind>(source + (base + lane) + i * prim::kWarpSize);
        issue_loads(warp);
        if (base == 0) meanwhile();
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            prim::store_streaming(destination + (base + lane) + i * prim::kWarpSize, held[i]);
    }
    if (base == 0) meanwhile();
    for (int idx = base + lane; idx < num_vecs; idx += prim::kWarpSize)
        prim::store_streaming(destination + idx, load_vec<kKind>(source + idx));
}

// -- What a call that fails leaves in its outputs: nothing that passes for a result ----------------------------------

// NaN in bfloat16, float32, E4M3 and, as exponents, UE8M0; -1 as an index.
constexpr uint32_t kVoidWord = 0xffffffffu;

EP_DEVICE prim::Vec16 void_vec() { return {{kVoidWord, kVoidWord, kVoidWord, kVoidWord}}; }

// Null: there is no such output.
template <class Group> EP_DEVICE void void_output(const Group& group, void* output, int64_t num_bytes) {
    if (output == nullptr) return;
    auto* words = static_cast<uint32_t*>(output);
    for_each(group, num_bytes / 4, [&](int64_t i) { words[i] = kVoidWord; });
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::algo
