// push_all: see push_all.h.
//
//   item i = chunk i / (R - 1) for the peer i % (R - 1); block b takes items b, b + gridDim, ...
//
// so all links carry the same load at any time, whatever the number of blocks.
#include "bench/push_all.h"

#include "device/launch.h"
#include "device/prim.h"

namespace deep_ep::bench {
inline namespace EP_BACKEND {

constexpr int kNumThreads = 1024;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread: 64 KiB per SM hide the latency of device memory
constexpr int64_t kChunkVecs = kNumThreads * kUnroll;

struct PushAll {
    using Params = PushAllParams;
    struct Shared {};
    static constexpr int kMaxThreads = kNumThreads;

    // All threads of the block.
    static EP_DEVICE void copy_chunk(prim::Vec16* destination, const prim::Vec16* source) {
        prim::Vec16 held[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            held[i] = prim::load_input(source + i * kNumThreads + static_cast<int>(threadIdx.x));
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            prim::store_streaming(destination + i * kNumThreads + static_cast<int>(threadIdx.x), held[i]);
    }

    // The last chunk of a part, which may be a short one.
    static EP_DEVICE void copy_rest(prim::Vec16* destination, const prim::Vec16* source, int64_t num_vecs) {
        for (int64_t i = threadIdx.x; i < num_vecs; i += kNumThreads)
            prim::store_streaming(destination + i, prim::load_input(source + i));
    }

    static EP_DEVICE prim::Vec16* part_of(const Params& p, int owner) {
        return reinterpret_cast<prim::Vec16*>(p.bases[owner] + static_cast<uint64_t>(p.rank) * p.bytes_per_peer);
    }

    static EP_DEVICE void run(const Params& p, Shared&) {
        const int num_peers = p.num_ranks - 1;
        const auto num_vecs = static_cast<int64_t>(p.bytes_per_peer / sizeof(prim::Vec16));
        const int64_t num_items = (num_vecs + kChunkVecs - 1) / kChunkVecs * num_peers;
        const prim::Vec16* source = part_of(p, p.rank);
        for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
            const int peer_idx = static_cast<int>(item % num_peers);
            const int peer = (p.rank + 1 + peer_idx) % p.num_ranks;
            const int64_t first = item / num_peers * kChunkVecs;
            prim::Vec16* destination = part_of(p, peer) + first;
            if (num_vecs - first >= kChunkVecs) {
                copy_chunk(destination, source + first);
            } else {
                copy_rest(destination, source + first, num_vecs - first);
            }
        }
    }
};

}  // namespace EP_BACKEND

#if defined(EP_IS_CUDA_BACKEND)
void push_all_on_cuda(const PushAllParams& params, int num_blocks, dev::Stream stream) {
#else
void push_all_on_cpu(const PushAllParams& params, int num_blocks, dev::Stream stream) {
#endif
    dev::LaunchConfig config;
    config.num_blocks = num_blocks;
    config.num_threads = kNumThreads;
    config.name = "deep_ep::push_all";
    dev::launch<PushAll>(config, stream, params);
}

}  // namespace deep_ep::bench
