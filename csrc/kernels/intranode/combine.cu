// combine: every rank sends the rows it has worked on back to their owners, and each owner sums what comes back.
//
//   send warps     one stream per owner: wait for a free slot, copy the row (and its weights) into it, set its flag
//   reduce warps   token t: wait for the rows of all ranks that had it, sum in FP32 in rank order straight from the
//                  slots (our own row: from x), add the bias, write once, give the slots back
//
// Messages, buffer map and orderings: docs/protocols/intranode.md.
#include "device/algo/bf16.h"
#include "device/algo/ring.h"
#include "device/algo/streams.h"
#include "device/algo/warp.h"
#include "device/launch.h"
#include "kernels/context.h"
#include "kernels/intranode/frame.h"
#include "kernels/intranode/launchers.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Vec16;

constexpr int kSendUnroll = 8;
constexpr int kReduceUnroll = 2;
constexpr int kPairs = 4;  // of bfloat16 in 16 bytes

struct Kernel {
    using Params = CombineParams;
    static constexpr int kMaxThreads = 512;
    struct Shared {
        int is_ready;
    };

    struct Context {
        const Params& p;
        const algo::Watch& watch;
        const algo::Ring& ring;
        RowMap rows;
    };

    // FP32 sums of kReduceUnroll x 8 elements of one lane.
    struct Sums {
        float low[kReduceUnroll][kPairs];
        float high[kReduceUnroll][kPairs];
    };

    static EP_DEVICE void send_row(const Context& c, int owner, int position) {
        const Params& p = c.p;
        const int64_t row = c.rows.first_row(owner, c.watch.heap.rank()) + position;
        uint8_t* slot = c.ring.slot_at(owner, position);
        algo::warp_copy<algo::SourceKind::kInput, kSendUnroll>(reinterpret_cast<Vec16*>(slot),
                                                               reinterpret_cast<const Vec16*>(p.x + row * p.row_bytes),
                                                               static_cast<int>(p.row_bytes / sizeof(Vec16)));
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize)
            *reinterpret_cast<float*>(slot + p.slot.topk_weights.at(k)) = p.topk_weights[row * p.num_topk + k];
        __syncwarp();  // every lane's stores, one lane's release
        if (prim::lane_idx() == 0) c.ring.publish(owner, position);
    }

    static EP_DEVICE void send(const Context& c, int warp, int num_warps) {
        const int self = c.watch.heap.rank();
        const algo::RowStream stream = algo::deal_stream(warp, num_warps, self, c.watch.heap.num_ranks(),
                                                         [&](int owner) { return c.rows.num_rows(owner, self); });
        algo::serve_streams(
            c.watch, Stage::kSlot, stream,
            [&](int owner, int position) { return c.ring.slot_is_free(owner, position); },
            [&](int owner, int position, int) { send_row(c, owner, position); });
    }

    // This lane's rank among 32 from `first_rank`: the position of its row of the token, or -1.
    static EP_DEVICE int position_at(const Context& c, int token, int first_rank) {
        const int num_ranks = c.watch.heap.num_ranks();
        const int rank = first_rank + prim::lane_idx();
        return rank < num_ranks ? c.p.send_head[static_cast<int64_t>(token) * num_ranks + rank] : -1;
    }

    static EP_DEVICE bool wait_for_rows(const Context& c, int token) {
        bool is_here = true;
        for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize) {
            const int position = position_at(c, token, first);
            const int rank = first + prim::lane_idx();
            if (position >= 0 && rank != c.watch.heap.rank())
                is_here &= c.ring.wait(Stage::kRow, rank, c.ring.row_is_here(rank, position));
        }
        is_here = __all_sync(kFullMask, is_here);
        __syncwarp();  // each lane's acquire, every lane's reads
        return is_here;
    }

    // Where this lane's rank has its row of the token: our own output of the experts, or a slot.
    static EP_DEVICE const uint8_t* row_pointer(const Context& c, int first_rank, int position) {
        const int rank = first_rank + prim::lane_idx();
        const int self = c.watch.heap.rank();
        if (position < 0) return nullptr;
        if (rank != self) return c.ring.row_at(rank, position);
        return c.p.x + (static_cast<int64_t>(c.rows.first_row(self, self)) + position) * c.p.row_bytes;
    }

    static EP_DEVICE void add(Sums& sums, int i, const Vec16& value) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            sums.low[i][pair] += algo::bf16_low(value.word[pair]);
            sums.high[i][pair] += algo::bf16_high(value.word[pair]);
        }
    }

    static EP_DEVICE void add_vectors(Sums& sums, const Vec16* source, int base, int num_vecs) {
        Vec16 held[kReduceUnroll];
#pragma unroll
        for (int i = 0; i < kReduceUnroll; ++i) {
            const int idx = base + i * kWarpSize + prim::lane_idx();
            if (idx < num_vecs) held[i] = prim::load_shared_with_peers(source + idx);
        }
#pragma unroll
        for (int i = 0; i < kReduceUnroll; ++i)
            if (base + i * kWarpSize + prim::lane_idx() < num_vecs) add(sums, i, held[i]);
    }

    static EP_DEVICE void write_sums(const Sums& sums, Vec16* target, int base, int num_vecs) {
#pragma unroll
        for (int i = 0; i < kReduceUnroll; ++i) {
            const int idx = base + i * kWarpSize + prim::lane_idx();
            Vec16 value;
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair)
                value.word[pair] = algo::bf16_pair(sums.low[i][pair], sums.high[i][pair]);
            if (idx < num_vecs) prim::store_streaming(target + idx, value);
        }
    }

    // Ranks in ascending order, then the biases: the order is part of the contract, it fixes the rounding.
    static EP_DEVICE void reduce_token(const Context& c, int token) {
        const Params& p = c.p;
        const int num_vecs = static_cast<int>(p.row_bytes / sizeof(Vec16));
        const int64_t token_offset = static_cast<int64_t>(token) * p.row_bytes;
        int held_group = -1;  // of 32 ranks: the one whose pointers the lanes hold
        const uint8_t* pointer = nullptr;
        uint32_t lanes = 0;
        for (int base = 0; base < num_vecs; base += kReduceUnroll * kWarpSize) {
            Sums sums = {};
            for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize) {
                if (first != held_group) {
                    pointer = row_pointer(c, first, position_at(c, token, first));
                    lanes = __ballot_sync(kFullMask, pointer != nullptr);
                    held_group = first;
                }
                for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
                    const uint8_t* row = algo::broadcast_pointer(pointer, __ffs(static_cast<int>(rest)) - 1);
                    add_vectors(sums, reinterpret_cast<const Vec16*>(row), base, num_vecs);
                }
            }
            for (const uint8_t* bias : p.bias)
                if (bias != nullptr)
                    add_vectors(sums, reinterpret_cast<const Vec16*>(bias + token_offset), base, num_vecs);
            write_sums(sums, reinterpret_cast<Vec16*>(p.combined_x + token_offset), base, num_vecs);
        }
    }

    static EP_DEVICE float weight_from(const Context& c, int token, int rank, int k) {
        const Params& p = c.p;
        const int self = c.watch.heap.rank();
        const int position = p.send_head[static_cast<int64_t>(token) * c.watch.heap.num_ranks() + rank];
        if (position < 0) return 0.0f;
        if (rank == self)
            return p.topk_weights[(static_cast<int64_t>(c.rows.first_row(self, self)) + position) * p.num_topk + k];
        return *reinterpret_cast<const float*>(c.ring.row_at(rank, position) + p.slot.topk_weights.at(k));
    }

    static EP_DEVICE void reduce_weights(const Context& c, int token) {
        const Params& p = c.p;
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize) {
            float sum = 0.0f;
            for (int rank = 0; rank < c.watch.heap.num_ranks(); ++rank) sum += weight_from(c, token, rank, k);
            p.combined_topk_weights[static_cast<int64_t>(token) * p.num_topk + k] = sum;
        }
    }

    static EP_DEVICE void give_slots_back(const Context& c, int token) {
        const int self = c.watch.heap.rank();
        for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize) {
            const int position = position_at(c, token, first);
            const int rank = first + prim::lane_idx();
            if (position >= 0 && rank != self) c.ring.give_back(rank, position, c.rows.num_rows(self, rank));
        }
    }

    static EP_DEVICE void reduce(const Context& c, int warp, int num_warps) {
        for (int token = warp; token < c.p.num_tokens; token += num_warps) {
            if (!wait_for_rows(c, token)) return;
            reduce_token(c, token);
            reduce_weights(c, token);
            __syncwarp();  // every lane's reads, each lane's release
            give_slots_back(c, token);
        }
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Watch watch{make_watch_words(p.watch), make_heap(p.heap), layout::Operation::kCombine,
                                algo::current_call(p.watch.local)};
        const algo::Ring ring(watch, p.window);
        const Context context{p, watch, ring, RowMap{p.rank_prefix_matrix, p.heap.num_ranks}};
        if (begin_call(watch, context.rows, true, p.num_rows, &shared.is_ready)) {
            const int block = static_cast<int>(blockIdx.x);
            const int warp = prim::warp_idx();
            if (warp < p.geometry.num_send_warps)
                send(context, warp * p.geometry.num_blocks + block, p.geometry.num_send_warps * p.geometry.num_blocks);
            else
                reduce(context, (warp - p.geometry.num_send_warps) * p.geometry.num_blocks + block,
                       p.geometry.num_recv_warps * p.geometry.num_blocks);
        }
        algo::finish_call(watch);
    }
};

void launch(const CombineParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.geometry.num_blocks;
    config.num_threads = kWarpSize * (params.geometry.num_send_warps + params.geometry.num_recv_warps);
    config.is_cooperative = true;
    config.name = "deep_ep::combine";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
