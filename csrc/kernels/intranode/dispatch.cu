// dispatch: every token to the final row of each rank that needs it, once per rank.
//
//   send warps      token t: read once; our own copy goes straight to its final row, the others into the next slot of
//                   each destination's window; then one flag per destination
//   receive warps   one stream per source: wait for the flag of the next row, move the slot to its final row, give the
//                   slot back where a later row needs it
//
// Messages, buffer map and orderings: docs/protocols/intranode.md.
#include "device/algo/ring.h"
#include "device/algo/streams.h"
#include "device/algo/warp.h"
#include "device/launch.h"
#include "kernels/context.h"
#include "kernels/intranode/frame.h"
#include "kernels/intranode/launchers.h"

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Vec16;

constexpr int kUnroll = 8;

struct Kernel {
    using Params = DispatchParams;
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

    // The token's expert as `rank` counts its own, or -1.
    static EP_DEVICE int local_expert(const Params& p, int token, int k, int rank) {
        const int64_t id = load_expert_id(p.topk_idx, p.idx_bytes, static_cast<int64_t>(token) * p.num_topk + k);
        const int64_t first = static_cast<int64_t>(rank) * p.num_local_experts;
        return id >= first && id < first + p.num_local_experts ? static_cast<int>(id - first) : -1;
    }

    static EP_DEVICE uint32_t input_scale(const Params& p, int token, int i) {
        return p.scales[token * p.scale_stride_token + i * p.scale_stride_scale];
    }

    // The warp fills everything of an output row but the row itself.
    template <class Expert, class Weight, class Scale>
    static EP_DEVICE void deliver_metadata(const Params& p, int64_t row, int src_idx, const Expert& expert,
                                           const Weight& weight, const Scale& scale) {
        if (prim::lane_idx() == 0 && p.recv_src_idx != nullptr) p.recv_src_idx[row] = src_idx;
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize) {
            const int id = expert(k);
            store_expert_id(p.recv_topk_idx, p.idx_bytes, row * p.num_topk + k, id);
            p.recv_topk_weights[row * p.num_topk + k] = id >= 0 ? weight(k) : 0.0f;
        }
        for (int i = prim::lane_idx(); i < p.num_scales; i += kWarpSize)
            p.recv_scales[row * p.num_scales + i] = scale(i);
    }

    static EP_DEVICE void deliver_own_metadata(const Context& c, int token, int64_t row) {
        const Params& p = c.p;
        deliver_metadata(
            p, row, token, [&](int k) { return local_expert(p, token, k, c.watch.heap.rank()); },
            [&](int k) { return p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k]; },
            [&](int i) { return input_scale(p, token, i); });
    }

    static EP_DEVICE void send_metadata(const Context& c, int token, int destination, uint8_t* slot) {
        const Params& p = c.p;
        if (prim::lane_idx() == 0) *reinterpret_cast<int*>(slot + p.slot.src_idx.offset) = token;
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize) {
            *reinterpret_cast<int*>(slot + p.slot.topk_idx.at(k)) = local_expert(p, token, k, destination);
            *reinterpret_cast<float*>(slot + p.slot.topk_weights.at(k)) =
                p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k];
        }
        for (int i = prim::lane_idx(); i < p.num_scales; i += kWarpSize)
            *reinterpret_cast<uint32_t*>(slot + p.slot.scales.at(i)) = input_scale(p, token, i);
    }

    // One token to those of 32 ranks, from `first_rank`, that need it. Lane i speaks for rank first_rank + i.
    static EP_DEVICE bool send_token(const Context& c, int token, int first_rank) {
        const Params& p = c.p;
        const int num_ranks = c.watch.heap.num_ranks();
        const int self = c.watch.heap.rank();
        const int destination = first_rank + prim::lane_idx();
        const int position =
            destination < num_ranks ? p.send_head[static_cast<int64_t>(token) * num_ranks + destination] : -1;
        const bool is_sent = position >= 0;
        const bool is_remote = is_sent && destination != self;

        const bool is_free =
            !is_remote || c.ring.wait(Stage::kSlot, destination, c.ring.slot_is_free(destination, position));
        if (!__all_sync(kFullMask, is_free)) return false;
        __syncwarp();  // one lane's acquire of a slot, every lane's stores into it

        const int64_t own_row = is_sent ? c.rows.first_row(self, self) + position : 0;
        uint8_t* target = !is_sent    ? nullptr
                          : is_remote ? c.ring.slot_at(destination, position)
                                      : p.recv_x + own_row * p.row_bytes;
        const uint32_t lanes = __ballot_sync(kFullMask, is_sent);
        algo::warp_multicast<kUnroll>(reinterpret_cast<const Vec16*>(p.x + static_cast<int64_t>(token) * p.row_bytes),
                                      static_cast<int>(p.row_bytes / sizeof(Vec16)), lanes,
                                      reinterpret_cast<Vec16*>(target));
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
            const int lane = __ffs(static_cast<int>(rest)) - 1;
            uint8_t* slot = algo::broadcast_pointer(target, lane);
            if (first_rank + lane == self)
                deliver_own_metadata(c, token, __shfl_sync(kFullMask, own_row, lane));
            else
                send_metadata(c, token, first_rank + lane, slot);
        }
        __syncwarp();  // every lane's stores, one lane's release
        if (is_remote) c.ring.publish(destination, position);
        return true;
    }

    // Tokens are dealt one by one, so that all warps move through the windows together.
    static EP_DEVICE void send(const Context& c, int warp, int num_warps) {
        for (int token = warp; token < c.p.num_tokens; token += num_warps)
            for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize)
                if (!send_token(c, token, first)) return;
    }

    static EP_DEVICE void receive_row(const Context& c, int source, int position, int num_rows) {
        const Params& p = c.p;
        const uint8_t* slot = c.ring.row_at(source, position);
        const int64_t row = c.rows.first_row(source, c.watch.heap.rank()) + position;
        algo::warp_copy<algo::SourceKind::kFromPeer, kUnroll>(reinterpret_cast<Vec16*>(p.recv_x + row * p.row_bytes),
                                                              reinterpret_cast<const Vec16*>(slot),
                                                              static_cast<int>(p.row_bytes / sizeof(Vec16)));
        deliver_metadata(
            p, row, *reinterpret_cast<const int*>(slot + p.slot.src_idx.offset),
            [&](int k) { return *reinterpret_cast<const int*>(slot + p.slot.topk_idx.at(k)); },
            [&](int k) { return *reinterpret_cast<const float*>(slot + p.slot.topk_weights.at(k)); },
            [&](int i) { return *reinterpret_cast<const uint32_t*>(slot + p.slot.scales.at(i)); });
        __syncwarp();  // every lane's reads, one lane's release
        if (prim::lane_idx() == 0) c.ring.give_back(source, position, num_rows);
    }

    static EP_DEVICE void receive(const Context& c, int warp, int num_warps) {
        const int self = c.watch.heap.rank();
        const algo::RowStream stream = algo::deal_stream(warp, num_warps, self, c.watch.heap.num_ranks(),
                                                         [&](int source) { return c.rows.num_rows(source, self); });
        algo::serve_streams(
            c.watch, Stage::kRow, stream,
            [&](int source, int position) { return c.ring.row_is_here(source, position); },
            [&](int source, int position, int count) { receive_row(c, source, position, count); });
    }

    // Rows that nobody sent must not look like tokens.
    static EP_DEVICE void mark_unused_rows(const Context& c, int warp, int num_warps) {
        const Params& p = c.p;
        const int64_t begin = static_cast<int64_t>(c.rows.total_rows(c.watch.heap.rank())) * p.num_topk;
        const int64_t end = static_cast<int64_t>(p.num_recv_rows) * p.num_topk;
        for (int64_t i = begin + warp * kWarpSize + prim::lane_idx(); i < end; i += num_warps * kWarpSize) {
            store_expert_id(p.recv_topk_idx, p.idx_bytes, i, -1);
            p.recv_topk_weights[i] = 0.0f;
        }
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Watch watch{make_watch_words(p.watch), make_heap(p.heap), layout::Operation::kDispatch,
                                algo::current_call(p.watch.local)};
        const algo::Ring ring(watch, p.window);
        const Context context{p, watch, ring, RowMap{p.rank_prefix_matrix, p.heap.num_ranks}};
        if (begin_call(watch, context.rows, p.is_first_kernel, p.num_recv_rows, &shared.is_ready)) {
            const int block = static_cast<int>(blockIdx.x);
            const int warp = prim::warp_idx();
            if (warp < p.geometry.num_send_warps) {
                send(context, warp * p.geometry.num_blocks + block, p.geometry.num_send_warps * p.geometry.num_blocks);
            } else {
                const int receive_warp = (warp - p.geometry.num_send_warps) * p.geometry.num_blocks + block;
                const int num_receive_warps = p.geometry.num_recv_warps * p.geometry.num_blocks;
                receive(context, receive_warp, num_receive_warps);
                if (p.is_worst_case) mark_unused_rows(context, receive_warp, num_receive_warps);
            }
        }
        algo::finish_call(watch);
    }
};

void launch(const DispatchParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.geometry.num_blocks;
    config.num_threads = kWarpSize * (params.geometry.num_send_warps + params.geometry.num_recv_warps);
    config.is_cooperative = true;
    config.name = "deep_ep::dispatch";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch
