// dispatch: every token to the final row of each rank that needs it, once per rank.
//
//   at first        each block: learns where rows go and stand. Where the counts have not been exchanged before (the caller
//                   gives the number of rows that may come), this kernel exchanges them
//   send warps      token t: read once; our own copy and those for ranks that lend their outputs go straight to their
//                   final rows, the others into the next slot of each destination's window, then one flag for each
//   receive warps   (of a rank that does not lend) one stream per source: wait for the flag of the next row, move the
//                   slot to its final row, give the slot back where a later row needs it
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
#include "kernels/intranode/dispatch_begin.h"
#include "kernels/intranode/frame.h"
#include "kernels/intranode/launchers.h"
#include "kernels/intranode/staging.h"

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

using prim::kFullMask;
using prim::Vec16;

constexpr int kUnroll = 7;  // 7168 bytes: two rounds; 14336: four

struct Kernel {
    using Params = DispatchParams;
    static constexpr int kMaxThreads = kMaxDispatchThreads;
    using Shared = BlockState;

    struct Context {
        const Params& p;
        const algo::Watch& watch;
        const algo::Ring& ring;
        const RowTable& rows;
        int* bad_token;
    };

    // What travels is the expert's global id: the same bytes to every destination. get_dispatch_layout has refused an id
    // that is out of range, so one that is found here has changed since.
    static EP_DEVICE int global_expert(const Context& c, int token, int k) {
        const Params& p = c.p;
        const int64_t id = load_expert_id(p.topk_idx, p.idx_bytes, static_cast<int64_t>(token) * p.num_topk + k);
        if (is_expert(p, id)) return static_cast<int>(id);
        prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(c.bad_token, token);
        return -1;
    }

    // The expert as `rank` counts its own, or -1.
    static EP_DEVICE int local_expert(const Params& p, int id, int rank) {
        const int local = id - rank * p.num_local_experts;
        return local >= 0 && local < p.num_local_experts ? local : -1;
    }

    static EP_DEVICE uint32_t input_scale(const Params& p, int token, int i) {
        return p.scales[token * p.scale_stride_token + i * p.scale_stride_scale];
    }

    // The outputs of a rank that are not rows; null: it wants none.
    struct MetadataOutputs {
        uint32_t* scales;
        void* topk_idx;
        float* topk_weights;
        int* src_idx;
    };

    // Our own, or those that `rank` lends us.
    static EP_DEVICE MetadataOutputs metadata_outputs(const Context& c, int rank) {
        const Params& p = c.p;
        if (rank == c.watch.heap.rank()) return {p.recv_scales, p.recv_topk_idx, p.recv_topk_weights, p.recv_src_idx};
        const layout::Loan& loan = algo::loan_of(c.watch, rank);
        auto lent = [&](uint64_t offset) { return offset == 0 ? nullptr : c.watch.heap.at(rank, offset); };
        return {reinterpret_cast<uint32_t*>(lent(loan.scales)), lent(loan.topk_idx),
                reinterpret_cast<float*>(lent(loan.topk_weights)), reinterpret_cast<int*>(lent(loan.src_idx))};
    }

    // Where this lane's rank wants its rows, if they go straight there; null: into slots, or nowhere.
    static EP_DEVICE uint8_t* direct_rows(const Context& c, int rank) {
        const int self = c.watch.heap.rank();
        if (rank == self) return c.p.recv_x;
        if (!c.p.may_lend || rank >= c.watch.heap.num_ranks()) return nullptr;
        const uint64_t offset = algo::loan_of(c.watch, rank).x;
        return offset == 0 ? nullptr : c.watch.heap.at(rank, offset);
    }

    // The warp fills everything of an output row but the row itself.
    template <class Expert, class Weight, class Scale>
    static EP_DEVICE void deliver_metadata(const Params& p, const MetadataOutputs& out, int64_t row, int src_idx,
                                           const Expert& expert, const Weight& weight, const Scale& scale) {
        if (prim::lane_idx() == 0 && out.src_idx != nullptr) out.src_idx[row] = src_idx;
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize) {
            const int id = expert(k);
            store_expert_id(out.topk_idx, p.idx_bytes, row * p.num_topk + k, id);
            out.topk_weights[row * p.num_topk + k] = id >= 0 ? weight(k) : 0.0f;
        }
        for (int i = prim::lane_idx(); i < p.num_scales; i += kWarpSize) out.scales[row * p.num_scales + i] = scale(i);
    }

    // Straight from our inputs to the final row at `rank`.
    static EP_DEVICE void deliver_input_metadata(const Context& c, int token, int rank, int64_t row) {
        const Params& p = c.p;
        deliver_metadata(
            p, metadata_outputs(c, rank), row, token,
            [&](int k) { return local_expert(p, global_expert(c, token, k), rank); },
            [&](int k) { return p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k]; },
            [&](int i) { return input_scale(p, token, i); });
    }

    static EP_DEVICE void send_metadata(const Context& c, int token, uint8_t* slot) {
        const Params& p = c.p;
        if (prim::lane_idx() == 0) *reinterpret_cast<int*>(slot + p.slot.src_idx.offset) = token;
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize) {
            *reinterpret_cast<int*>(slot + p.slot.topk_idx.at(k)) = global_expert(c, token, k);
            *reinterpret_cast<float*>(slot + p.slot.topk_weights.at(k)) =
                p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k];
        }
        for (int i = prim::lane_idx(); i < p.num_scales; i += kWarpSize)
            *reinterpret_cast<uint32_t*>(slot + p.slot.scales.at(i)) = input_scale(p, token, i);
    }

    // One thread. The token has a row at `rank`: then it is one of those that the counts have announced there.
    static EP_DEVICE bool is_stated(const Context& c, int rank, int token, int position) {
        return position < 0 || position < c.rows.num_rows_at(rank) ||
               refuse_position(c.watch, rank, token, position, c.rows.num_rows_at(rank));
    }

    // One token to those of 32 ranks, from `first_rank`, that need it. Lane i speaks for rank first_rank + i.
    static EP_DEVICE bool send_token(const Context& c, int token, int first_rank) {
        const Params& p = c.p;
        const int num_ranks = c.watch.heap.num_ranks();
        const int destination = first_rank + prim::lane_idx();
        const int position =
            destination < num_ranks ? p.send_head[static_cast<int64_t>(token) * num_ranks + destination] : -1;
        const bool is_sent = position >= 0;
        uint8_t* direct = is_sent ? direct_rows(c, destination) : nullptr;
        const bool uses_slot = is_sent && direct == nullptr;

        const bool is_free =
            is_stated(c, destination, token, position) &&
            (!uses_slot || c.ring.wait(Stage::kSlot, destination, c.ring.to(destination).slot_is_free(position)));
        if (!__all_sync(kFullMask, is_free)) return false;
        __syncwarp();  // one lane's acquire of a slot, every lane's stores into it

        const int64_t row = is_sent ? static_cast<int64_t>(c.rows.first_row_at(destination)) + position : 0;
        uint8_t* target = !is_sent    ? nullptr
                          : uses_slot ? c.ring.to(destination).slot(position)
                                      : direct + row * p.row_bytes;
        const uint32_t lanes = __ballot_sync(kFullMask, is_sent);
        const uint32_t slot_lanes = __ballot_sync(kFullMask, uses_slot);
        algo::warp_multicast<kUnroll>(reinterpret_cast<const Vec16*>(p.x + static_cast<int64_t>(token) * p.row_bytes),
                                      static_cast<int>(p.row_bytes / sizeof(Vec16)), lanes,
                                      reinterpret_cast<Vec16*>(target));
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
            const int lane = __ffs(static_cast<int>(rest)) - 1;
            uint8_t* slot = algo::broadcast_pointer(target, lane);
            const int64_t final_row = __shfl_sync(kFullMask, row, lane);
            if ((slot_lanes >> lane & 1u) != 0)
                send_metadata(c, token, slot);
            else
                deliver_input_metadata(c, token, first_rank + lane, final_row);
        }
        __syncwarp();  // every lane's stores, one lane's release
        if (uses_slot) c.ring.to(destination).publish(position);
        return true;
    }

    // Tokens are dealt one by one, so that all warps move through the windows together.
    static EP_DEVICE bool send(const Context& c, int warp, int num_warps) {
        for (int token = warp; token < c.p.num_tokens; token += num_warps)
            for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize)
                if (!send_token(c, token, first)) return false;
        return true;
    }

    // From a slot, or from the image of one in shared memory, to the final row at `rank`.
    static EP_DEVICE void deliver_slot_metadata(const Context& c, int rank, int64_t row, const uint8_t* slot) {
        const Params& p = c.p;
        const auto* ids = reinterpret_cast<const int*>(slot + p.slot.topk_idx.offset);
        const auto* weights = reinterpret_cast<const float*>(slot + p.slot.topk_weights.offset);
        const auto* scales = reinterpret_cast<const uint32_t*>(slot + p.slot.scales.offset);
        deliver_metadata(
            p, metadata_outputs(c, rank), row, *reinterpret_cast<const int*>(slot + p.slot.src_idx.offset),
            [&](int k) { return local_expert(p, ids[k], rank); }, [&](int k) { return weights[k]; },
            [&](int i) { return scales[i]; });
    }

    static EP_DEVICE void receive_row(const Context& c, int source, int position, int num_rows) {
        const Params& p = c.p;
        const algo::Port port = c.ring.from(source);
        const uint8_t* slot = port.slot(position);
        const int64_t row = c.rows.first_row_from(source) + position;
        algo::warp_copy<algo::SourceKind::kFromPeer, kUnroll>(reinterpret_cast<Vec16*>(p.recv_x + row * p.row_bytes),
                                                              reinterpret_cast<const Vec16*>(slot),
                                                              static_cast<int>(p.row_bytes / sizeof(Vec16)));
        deliver_slot_metadata(c, c.watch.heap.rank(), row, slot);
        __syncwarp();  // every lane's reads, one lane's release
        if (prim::lane_idx() == 0) port.give_back(position, num_rows);
    }

    static EP_DEVICE bool receive(const Context& c, int warp, int num_warps) {
        const int self = c.watch.heap.rank();
        const algo::RowStream stream = algo::deal_stream(warp, num_warps, self, c.watch.heap.num_ranks(),
                                                         [&](int source) { return c.rows.num_rows_from(source); });
        return algo::serve_streams(
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
                has_entry ? global_expert(c, token, lane) : -1,
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
            ids[k] = is_held ? held.expert : global_expert(c, token, k);
            weights[k] = is_held ? held.weight : p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k];
        }
        for (int i = lane; i < p.num_scales; i += kWarpSize)
            scales[i] = i < kWarpSize ? held.scale[0] : i < 2 * kWarpSize ? held.scale[1] : input_scale(p, token, i);
        prim::fence_async_shared();
    }

    // A warp's tokens, item by item. Lane i stores to rank i and publishes there.
    struct StagedSend {
        int first, step, count;
        algo::Port port;    // of this lane
        uint8_t* direct;    // this lane's rank gets rows straight into its outputs; null: into slots
        int64_t first_row;  // of our rows there
        uint32_t direct_lanes;

        EP_DEVICE int token(int item) const { return first + item * step; }
        EP_DEVICE bool uses_slot(int position) const { return position >= 0 && direct == nullptr; }
    };

    static EP_DEVICE StagedSend make_send(const Context& c, int warp, int num_warps) {
        const int self = c.watch.heap.rank();
        const int rank = prim::lane_idx() < c.watch.heap.num_ranks() ? prim::lane_idx() : self;
        const int num_left = c.p.num_tokens - warp;
        uint8_t* direct = direct_rows(c, rank);
        return {warp,
                num_warps,
                num_left > 0 ? (num_left + num_warps - 1) / num_warps : 0,
                c.ring.to(rank),
                direct,
                c.rows.first_row_at(rank),
                __ballot_sync(kFullMask, direct != nullptr && prim::lane_idx() < c.watch.heap.num_ranks())};
    }

    // Every lane: flags of the items [published, end), whose stores are where they belong.
    static EP_DEVICE int publish_until(const Context& c, const StagedSend& send, const algo::Stages& stages,
                                       int published, int end) {
        for (; published < end; ++published) {
            const int position = *position_in(c.p, stages.at(published));
            if (send.uses_slot(position)) send.port.publish(position);
        }
        return published;
    }

    // The item's slots are free at all its destinations. Before a wait everything stored so far is published: who frees
    // a slot may need it.
    static EP_DEVICE bool wait_for_slots(const Context& c, const StagedSend& send, const algo::Stages& stages,
                                         int position, int item, int& published) {
        const bool may_wait = send.uses_slot(position) && position >= c.p.window.window;
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

    // Each lane stores the staged token to its rank: the whole image into a slot, or the row alone to its final place.
    static EP_DEVICE void store_staged(const Context& c, const StagedSend& send, int position, const uint8_t* stage) {
        const Params& p = c.p;
        if (send.uses_slot(position))
            prim::bulk_store(send.port.slot(position), stage, layout::bulk_bytes(p.slot.scales.end()));
        else if (position >= 0)
            prim::bulk_store(send.direct + (send.first_row + position) * p.row_bytes, stage, p.row_bytes);
        prim::bulk_commit();  // one group an item on every lane, so that groups can be counted
    }

    // The whole warp: what belongs to the rows that went straight to their final places.
    static EP_DEVICE void deliver_staged_metadata(const Context& c, const StagedSend& send, int position,
                                                  const uint8_t* stage) {
        const int64_t row = send.first_row + position;
        for (uint32_t rest = send.direct_lanes; rest != 0; rest &= rest - 1) {
            const int rank = __ffs(static_cast<int>(rest)) - 1;
            if (__shfl_sync(kFullMask, position, rank) < 0) continue;
            deliver_slot_metadata(c, rank, __shfl_sync(kFullMask, row, rank), stage);
        }
    }

    static EP_DEVICE bool send_staged(const Context& c, int warp, int num_warps, uint8_t* memory) {
        const Params& p = c.p;
        const StagedSend send = make_send(c, warp, num_warps);
        const bool has_slots = __any_sync(kFullMask, send.direct == nullptr);
        const algo::Stages stages(memory, p.geometry.send);
        const int ahead = stages.num_ahead();
        auto load = [&](int item) {
            if (prim::lane_idx() == 0)
                stages.load(item, p.x + static_cast<int64_t>(send.token(item)) * p.row_bytes, p.row_bytes);
        };
        prim::fence_async_global();  // each lane: the loans that this block has seen, its bulk stores
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
            if (!__all_sync(kFullMask, is_stated(c, prim::lane_idx(), send.token(item), position))) break;
            if (!wait_for_slots(c, send, stages, position, item, published)) break;
            stages.wait(item);
            store_staged(c, send, position, stages.at(item));
            if (has_slots) {
                prim::bulk_wait<1>();
                published = publish_until(c, send, stages, published, item);
            }
            // After the release, which would wait for these stores.
            deliver_staged_metadata(c, send, position, stages.at(item));
            if (loads_more) stage_metadata(c, send.token(ahead_item), metadata, stages.at(ahead_item));
            __syncwarp();  // every lane's metadata, each lane's bulk store; every lane's reads, the next load
        }
        prim::bulk_wait<0>();
        if (has_slots) publish_until(c, send, stages, published, item);
        for (int rest = item; rest < loaded; ++rest) stages.wait(rest);  // given up: nothing may land after the end
        return item == send.count;
    }

    // Rows that nobody sent must not look like tokens.
    static EP_DEVICE void mark_unused_rows(const Context& c) {
        const Params& p = c.p;
        const int64_t begin = static_cast<int64_t>(c.rows.num_rows(c.watch.heap.num_ranks())) * p.num_topk;
        const int64_t end = static_cast<int64_t>(p.num_recv_rows) * p.num_topk;
        const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
        for (int64_t i = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += step) {
            store_expert_id(p.recv_topk_idx, p.idx_bytes, i, -1);
            p.recv_topk_weights[i] = 0.0f;
        }
    }

    // -- The kernel ------------------------------------------------------------------------------------------------------

    static EP_DEVICE bool send_any(const Context& c, int send_warp) {
        const Geometry& geometry = c.p.geometry;
        const int warp = send_warp * geometry.num_blocks + static_cast<int>(blockIdx.x);
        const int num_warps = geometry.num_send_warps * geometry.num_blocks;
        if (prim::has_bulk_copy() && geometry.send.num_stages > 0)
            return send_staged(c, warp, num_warps, send_memory(geometry, send_warp));
        return send(c, warp, num_warps);
    }

    static EP_DEVICE void work(const Context& c, FrameState& state) {
        const Geometry& geometry = c.p.geometry;
        const int recv_warp = prim::warp_idx() - geometry.num_send_warps;
        const bool is_ok = recv_warp < 0 ? send_any(c, prim::warp_idx())
                                         : receive(c, recv_warp * geometry.num_blocks + static_cast<int>(blockIdx.x),
                                                   geometry.num_recv_warps * geometry.num_blocks);
        if (!is_ok) state.note_failure();
    }

    static EP_DEVICE void void_outputs(const Params& p) {
        const int64_t num_rows = p.num_recv_rows;
        const int64_t num_entries = num_rows * p.num_topk;
        void_output(p.recv_x, num_rows * p.row_bytes);
        void_output(p.recv_scales, num_rows * p.num_scales * 4);
        void_output(p.recv_topk_idx, num_entries * p.idx_bytes);
        void_output(p.recv_topk_weights, num_entries * 4);
        void_output(p.recv_src_idx, num_rows * 4);
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const Begun begun = begin(p, shared);
        const algo::Watch watch = make_watch(p, shared.call);
        const bool is_last_warp = prim::warp_idx() == static_cast<int>(blockDim.x) / kWarpSize - 1;
        if (p.counts != nullptr && begun != Begun::kFailed && blockIdx.x == 0 && is_last_warp)
            tell_host(p, watch, shared.rows);
        if (begun == Begun::kShort) return;  // the host launches the rest of the call
        if (begun == Begun::kReady) {
            const algo::Ring ring(watch, p.window);
            const Context context{p, watch, ring, shared.rows, &shared.bad_token};
            if (p.is_worst_case) mark_unused_rows(context);
            work(context, shared.frame);
        }
        if (!input_can_be(p, shared)) shared.frame.note_failure();
        finish_call(watch, begun == Begun::kReady, p.may_lend, p.loan.x != 0, shared.frame, [&] { void_outputs(p); });
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
