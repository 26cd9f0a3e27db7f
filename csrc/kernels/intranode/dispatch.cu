// dispatch: every token to the final row of each rank that needs it, once per rank.
//
//   send warps      token t: read once; our own copy goes straight to its final row, the others into the next slot of
//                   each destination's window; then one flag per destination
//   receive warps   one stream per source: wait for the flag of the next row, move the slot to its final row, give the
//                   slot back where a later row needs it
//
// With bulk copies, send warps keep several rows on their way through shared memory. Receive warps do not: one engine
// carries all bulk copies of an SM, and is full with what is sent (docs/performance/intranode.md).
//
// Messages, buffer map and orderings: docs/protocols/intranode.md.
#include "device/algo/ring.h"
#include "device/algo/stages.h"
#include "device/algo/streams.h"
#include "device/algo/warp.h"
#include "device/launch.h"
#include "kernels/context.h"
#include "kernels/intranode/frame.h"
#include "kernels/intranode/launchers.h"
#include "kernels/intranode/staging.h"

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Vec16;

constexpr int kUnroll = 7;  // 7168 bytes: two rounds; 14336: four

struct Kernel {
    using Params = DispatchParams;
    static constexpr int kMaxThreads = kMaxDispatchThreads;
    struct Shared {
        int is_ready;
    };

    struct Context {
        const Params& p;
        const algo::Watch& watch;
        const algo::Ring& ring;
        RowMap rows;
    };

    // What travels is the expert's global id: the same bytes to every destination.
    static EP_DEVICE int global_expert(const Params& p, int token, int k) {
        return static_cast<int>(load_expert_id(p.topk_idx, p.idx_bytes, static_cast<int64_t>(token) * p.num_topk + k));
    }

    // The expert as `rank` counts its own, or -1.
    static EP_DEVICE int local_expert(const Params& p, int id, int rank) {
        const int local = id - rank * p.num_local_experts;
        return local >= 0 && local < p.num_local_experts ? local : -1;
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
            p, row, token, [&](int k) { return local_expert(p, global_expert(p, token, k), c.watch.heap.rank()); },
            [&](int k) { return p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k]; },
            [&](int i) { return input_scale(p, token, i); });
    }

    static EP_DEVICE void send_metadata(const Context& c, int token, uint8_t* slot) {
        const Params& p = c.p;
        if (prim::lane_idx() == 0) *reinterpret_cast<int*>(slot + p.slot.src_idx.offset) = token;
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize) {
            *reinterpret_cast<int*>(slot + p.slot.topk_idx.at(k)) = global_expert(p, token, k);
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
            !is_remote || c.ring.wait(Stage::kSlot, destination, c.ring.to(destination).slot_is_free(position));
        if (!__all_sync(kFullMask, is_free)) return false;
        __syncwarp();  // one lane's acquire of a slot, every lane's stores into it

        const int64_t own_row = is_sent ? c.rows.first_row(self, self) + position : 0;
        uint8_t* target = !is_sent    ? nullptr
                          : is_remote ? c.ring.to(destination).slot(position)
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
                send_metadata(c, token, slot);
        }
        __syncwarp();  // every lane's stores, one lane's release
        if (is_remote) c.ring.to(destination).publish(position);
        return true;
    }

    // Tokens are dealt one by one, so that all warps move through the windows together.
    static EP_DEVICE void send(const Context& c, int warp, int num_warps) {
        for (int token = warp; token < c.p.num_tokens; token += num_warps)
            for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize)
                if (!send_token(c, token, first)) return;
    }

    // From a slot, or from the image of one in shared memory.
    static EP_DEVICE void deliver_slot_metadata(const Context& c, int64_t row, const uint8_t* slot) {
        const Params& p = c.p;
        const auto* ids = reinterpret_cast<const int*>(slot + p.slot.topk_idx.offset);
        const auto* weights = reinterpret_cast<const float*>(slot + p.slot.topk_weights.offset);
        const auto* scales = reinterpret_cast<const uint32_t*>(slot + p.slot.scales.offset);
        deliver_metadata(
            p, row, *reinterpret_cast<const int*>(slot + p.slot.src_idx.offset),
            [&](int k) { return local_expert(p, ids[k], c.watch.heap.rank()); }, [&](int k) { return weights[k]; },
            [&](int i) { return scales[i]; });
    }

    static EP_DEVICE void receive_row(const Context& c, int source, int position, int num_rows) {
        const Params& p = c.p;
        const algo::Port port = c.ring.from(source);
        const uint8_t* slot = port.slot(position);
        const int64_t row = c.rows.first_row(source, c.watch.heap.rank()) + position;
        algo::warp_copy<algo::SourceKind::kFromPeer, kUnroll>(reinterpret_cast<Vec16*>(p.recv_x + row * p.row_bytes),
                                                              reinterpret_cast<const Vec16*>(slot),
                                                              static_cast<int>(p.row_bytes / sizeof(Vec16)));
        deliver_slot_metadata(c, row, slot);
        __syncwarp();  // every lane's reads, one lane's release
        if (prim::lane_idx() == 0) port.give_back(position, num_rows);
    }

    static EP_DEVICE void receive(const Context& c, int warp, int num_warps) {
        const int self = c.watch.heap.rank();
        const algo::RowStream stream = algo::deal_stream(warp, num_warps, self, c.watch.heap.num_ranks(),
                                                         [&](int source) { return c.rows.num_rows(source, self); });
        algo::serve_streams(
            c.watch, Stage::kRow, stream,
            [&](int source, int position) { return c.ring.from(source).row_is_here(position); },
            [&](int source, int position, int count) { receive_row(c, source, position, count); });
    }

    // -- Sending with bulk copies: the same work, with stages of shared memory between loads and stores -----------------
    // A stage is the image of a slot: the row, brought by a bulk load, and its metadata, written by the lanes.

    // What lanes load for an item while its row is on the way; entries beyond these are loaded when they are needed.
    struct Metadata {
        int position;  // lane i: at rank i
        int expert;
        float weight;
        uint32_t scale[2];
    };

    static EP_DEVICE Metadata load_metadata(const Context& c, int token) {
        const Params& p = c.p;
        const int lane = prim::lane_idx();
        const int num_ranks = c.watch.heap.num_ranks();
        const bool has_entry = lane < p.num_topk;
        return {lane < num_ranks ? p.send_head[static_cast<int64_t>(token) * num_ranks + lane] : -1,
                has_entry ? global_expert(p, token, lane) : -1,
                has_entry ? p.topk_weights[static_cast<int64_t>(token) * p.num_topk + lane] : 0.0f,
                {lane < p.num_scales ? input_scale(p, token, lane) : 0,
                 lane + kWarpSize < p.num_scales ? input_scale(p, token, lane + kWarpSize) : 0}};
    }

    // The lanes' own notes, behind the image: where the token goes.
    static EP_DEVICE int* position_in(const Params& p, uint8_t* stage) {
        return reinterpret_cast<int*>(stage + p.geometry.send.stage_bytes - layout::kPositionBytes) + prim::lane_idx();
    }

    static EP_DEVICE void stage_metadata(const Context& c, int token, const Metadata& held, uint8_t* stage) {
        const Params& p = c.p;
        const int lane = prim::lane_idx();
        *position_in(p, stage) = held.position;
        if (lane == 0) *reinterpret_cast<int*>(stage + p.slot.src_idx.offset) = token;
        auto* ids = reinterpret_cast<int*>(stage + p.slot.topk_idx.offset);
        auto* weights = reinterpret_cast<float*>(stage + p.slot.topk_weights.offset);
        auto* scales = reinterpret_cast<uint32_t*>(stage + p.slot.scales.offset);
        for (int k = lane; k < p.num_topk; k += kWarpSize) {
            const bool is_held = k < kWarpSize;
            ids[k] = is_held ? held.expert : global_expert(p, token, k);
            weights[k] = is_held ? held.weight : p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k];
        }
        for (int i = lane; i < p.num_scales; i += kWarpSize)
            scales[i] = i < kWarpSize ? held.scale[0] : i < 2 * kWarpSize ? held.scale[1] : input_scale(p, token, i);
        prim::fence_async_shared();
    }

    // A warp's tokens, item by item. Lane i stores to rank i and publishes there.
    struct StagedSend {
        int first, step, count;
        algo::Port port;  // of this lane
        bool is_self;     // this lane's rank is our own
        int own_lane;
        int64_t own_row;  // where our own rows begin

        EP_DEVICE int token(int item) const { return first + item * step; }
        EP_DEVICE bool is_remote(int position) const { return position >= 0 && !is_self; }
    };

    static EP_DEVICE StagedSend make_send(const Context& c, int warp, int num_warps) {
        const int self = c.watch.heap.rank();
        const int rank = prim::lane_idx() < c.watch.heap.num_ranks() ? prim::lane_idx() : self;
        const int num_left = c.p.num_tokens - warp;
        return {warp,
                num_warps,
                num_left > 0 ? (num_left + num_warps - 1) / num_warps : 0,
                c.ring.to(rank),
                rank == self,
                self,
                c.rows.first_row(self, self)};
    }

    // Every lane: flags of the items [published, end), whose stores are where they belong.
    static EP_DEVICE int publish_until(const Context& c, const StagedSend& send, const algo::Stages& stages,
                                       int published, int end) {
        for (; published < end; ++published) {
            const int position = *position_in(c.p, stages.at(published));
            if (send.is_remote(position)) send.port.publish(position);
        }
        return published;
    }

    // The item's slots are free at all its destinations. Before a wait everything stored so far is published: who frees
    // a slot may need it.
    static EP_DEVICE bool wait_for_slots(const Context& c, const StagedSend& send, const algo::Stages& stages,
                                         int position, int item, int& published) {
        const bool may_wait = send.is_remote(position) && position >= c.p.window.window;
        if (!__any_sync(kFullMask, may_wait)) return true;
        const algo::FlagTest test = may_wait ? send.port.slot_is_free(position) : algo::FlagTest{nullptr, 0};
        bool is_free = c.ring.is_set(test);
        if (!__all_sync(kFullMask, is_free)) {
            prim::bulk_wait<0>();
            published = publish_until(c, send, stages, published, item);
            is_free = c.ring.wait(Stage::kSlot, prim::lane_idx(), test);
        }
        prim::fence_async_global();
        return __all_sync(kFullMask, is_free);
    }

    // Each lane stores the staged token to its rank: the whole image into a slot, or the row alone to our own output.
    static EP_DEVICE void store_staged(const Context& c, const StagedSend& send, int position, const uint8_t* stage) {
        const Params& p = c.p;
        if (send.is_remote(position))
            prim::bulk_store(send.port.slot(position), stage, layout::bulk_bytes(p.slot.scales.end()));
        else if (position >= 0)
            prim::bulk_store(p.recv_x + (send.own_row + position) * p.row_bytes, stage, p.row_bytes);
        prim::bulk_commit();  // one group an item on every lane, so that groups can be counted
    }

    static EP_DEVICE void send_staged(const Context& c, int warp, int num_warps, uint8_t* memory) {
        const Params& p = c.p;
        const StagedSend send = make_send(c, warp, num_warps);
        const algo::Stages stages(memory, p.geometry.send);
        const int ahead = stages.num_ahead();
        auto load = [&](int item) {
            if (prim::lane_idx() == 0)
                stages.load(item, p.x + static_cast<int64_t>(send.token(item)) * p.row_bytes, p.row_bytes);
        };
        stages.init();
        int loaded = 0;
        for (; loaded < ahead && loaded < send.count; ++loaded) {
            load(loaded);
            stage_metadata(c, send.token(loaded), load_metadata(c, send.token(loaded)), stages.at(loaded));
        }
        __syncwarp();  // every lane's metadata, each lane's bulk store
        int published = 0;
        int item = 0;
        for (; item < send.count; ++item) {
            const int ahead_item = loaded;
            const bool loads_more = ahead_item < send.count;
            Metadata metadata = {};
            if (loads_more) {
                stages.wait_reusable();
                __syncwarp();  // each lane's wait, the next load
                load(loaded++);
                metadata = load_metadata(c, send.token(ahead_item));
            }
            const int position = *position_in(p, stages.at(item));
            if (!wait_for_slots(c, send, stages, position, item, published)) break;
            stages.wait(item);
            store_staged(c, send, position, stages.at(item));
            prim::bulk_wait<1>();
            published = publish_until(c, send, stages, published, item);
            // After the release, which would wait for these stores.
            const int own_position = __shfl_sync(kFullMask, position, send.own_lane);
            if (own_position >= 0) deliver_slot_metadata(c, send.own_row + own_position, stages.at(item));
            if (loads_more) stage_metadata(c, send.token(ahead_item), metadata, stages.at(ahead_item));
            __syncwarp();  // every lane's metadata, each lane's bulk store; every lane's reads, the next load
        }
        prim::bulk_wait<0>();
        publish_until(c, send, stages, published, item);
        for (int rest = item; rest < loaded; ++rest) stages.wait(rest);  // given up: nothing may land after the end
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

    // -- The kernel ------------------------------------------------------------------------------------------------------

    static EP_DEVICE void work(const Context& c) {
        const Geometry& geometry = c.p.geometry;
        const int block = static_cast<int>(blockIdx.x);
        const int send_warp = prim::warp_idx();
        const int recv_warp = send_warp - geometry.num_send_warps;
        if (recv_warp < 0) {
            const int warp = send_warp * geometry.num_blocks + block;
            const int num_warps = geometry.num_send_warps * geometry.num_blocks;
            if (prim::has_bulk_copy() && geometry.send.num_stages > 0)
                send_staged(c, warp, num_warps, send_memory(geometry, send_warp));
            else
                send(c, warp, num_warps);
        } else {
            const int warp = recv_warp * geometry.num_blocks + block;
            const int num_warps = geometry.num_recv_warps * geometry.num_blocks;
            receive(c, warp, num_warps);
            if (c.p.is_worst_case) mark_unused_rows(c, warp, num_warps);
        }
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Watch watch{make_watch_words(p.watch), make_heap(p.heap), layout::Operation::kDispatch,
                                algo::current_call(p.watch.local)};
        const algo::Ring ring(watch, p.window);
        const Context context{p, watch, ring, RowMap{p.rank_prefix_matrix, p.heap.num_ranks}};
        if (begin_call(watch, context.rows, p.is_first_kernel, p.num_recv_rows, &shared.is_ready)) work(context);
        algo::finish_call(watch);
    }
};

void launch(const DispatchParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.geometry.num_blocks;
    config.num_threads = kWarpSize * (params.geometry.num_send_warps + params.geometry.num_recv_warps);
    config.dynamic_shared_bytes = staging_bytes(params.geometry);
    config.is_cooperative = true;
    config.name = "deep_ep::dispatch";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch
