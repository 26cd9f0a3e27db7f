// The sending half of combine: rows back to their owners' slots.
//
// One stream per owner: wait for a free slot, copy the row and its weights into it, set its flag. With bulk copies a warp
// keeps several rows on their way through shared memory. A rank that lends its input sends nothing but the weights.
#pragma once

#include "device/algo/stages.h"
#include "device/algo/streams.h"
#include "device/algo/warp.h"
#include "kernels/intranode/combine_context.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

constexpr int kSendUnroll = 7;
constexpr int kPublishBatch = 2;  // rows that a send warp publishes together

EP_DEVICE void send_row(const Context& c, int owner, int position) {
    const CombineParams& p = c.p;
    const int64_t row = c.rows.first_row(owner, c.watch.heap.rank()) + position;
    const algo::Port port = c.ring.to(owner);
    uint8_t* slot = port.slot(position);
    algo::warp_copy<algo::SourceKind::kInput, kSendUnroll>(reinterpret_cast<Vec16*>(slot),
                                                           reinterpret_cast<const Vec16*>(p.x + row * p.row_bytes),
                                                           static_cast<int>(p.row_bytes / sizeof(Vec16)));
    for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize)
        *reinterpret_cast<float*>(slot + p.slot.topk_weights.at(k)) = p.topk_weights[row * p.num_topk + k];
    __syncwarp();  // every lane's stores, one lane's release
    if (prim::lane_idx() == 0) port.publish(position);
}

EP_DEVICE bool send(const Context& c, int warp, int num_warps) {
    const int self = c.watch.heap.rank();
    const algo::RowStream stream = algo::deal_stream(warp, num_warps, self, c.watch.heap.num_ranks(),
                                                     [&](int owner) { return c.rows.num_rows(owner, self); });
    return algo::serve_streams(
        c.watch, Stage::kSlot, stream, [&](int owner, int position) { return c.ring.to(owner).slot_is_free(position); },
        [&](int owner, int position, int) { send_row(c, owner, position); });
}

// -- With bulk copies: the same work, with stages of shared memory between loads and stores -----------------------------

// One send warp's rows: item n is the row at position first + n * step of one owner.
struct StagedSend {
    algo::Port port;
    int owner;
    int first, step, count;
    int64_t first_row;

    EP_DEVICE int position(int item) const { return first + item * step; }
    EP_DEVICE int64_t row(int item) const { return first_row + position(item); }
};

// This lane's weight of the row; those beyond the first 32 are loaded when they are needed.
EP_DEVICE float held_weight(const Context& c, const StagedSend& send, int item) {
    const int k = prim::lane_idx();
    return k < c.p.num_topk ? c.p.topk_weights[send.row(item) * c.p.num_topk + k] : 0.0f;
}

EP_DEVICE void stage_weights(const Context& c, const StagedSend& send, int item, float held, uint8_t* stage) {
    const CombineParams& p = c.p;
    for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize)
        *reinterpret_cast<float*>(stage + p.slot.topk_weights.at(k)) =
            k < kWarpSize ? held : p.topk_weights[send.row(item) * p.num_topk + k];
    prim::fence_async_shared();
}

// The whole warp: flags of the items [published, end), whose stores are at their owner. One release for all of them:
// lanes that release together wait together.
EP_DEVICE int publish_until(const StagedSend& send, int published, int end) {
    __syncwarp();  // the leader's finished stores, every lane's release
    for (; published < end; published += kWarpSize) {
        const int item = published + prim::lane_idx();
        if (item < end) send.port.publish(send.position(item));
    }
    return end;
}

// The whole warp: of the items from `item` on, how many (at most 32) have a free slot, one after the other.
EP_DEVICE int num_slots_free(const Context& c, const StagedSend& send, int item) {
    const int mine = item + prim::lane_idx();
    const bool is_free = mine < send.count && c.ring.is_set(send.port.slot_is_free(send.position(mine)));
    const uint32_t taken = ~__ballot_sync(kFullMask, is_free);
    __syncwarp();  // each lane's acquire and weights, the leader's bulk stores
    return taken == 0 ? kWarpSize : __ffs(static_cast<int>(taken)) - 1;
}

EP_DEVICE bool send_staged(const Context& c, int warp, int num_warps, uint8_t* memory) {
    const CombineParams& p = c.p;
    const int self = c.watch.heap.rank();
    const algo::RowStream stream = algo::only_stream(algo::deal_stream(
        warp, num_warps, self, c.watch.heap.num_ranks(), [&](int owner) { return c.rows.num_rows(owner, self); }));
    const StagedSend send{c.ring.to(stream.peer),
                          stream.peer,
                          stream.next,
                          stream.step,
                          algo::num_rows_left(stream),
                          c.rows.first_row(stream.peer, self)};
    const algo::Stages stages(memory, p.geometry.send);
    const bool is_leader = prim::lane_idx() == 0;
    const int ahead = stages.num_ahead();
    auto load = [&](int item) {
        if (is_leader) stages.load(item, p.x + send.row(item) * p.row_bytes, p.row_bytes);
    };
    stages.init();
    int loaded = 0;
    for (; loaded < ahead && loaded < send.count; ++loaded) {
        load(loaded);
        stage_weights(c, send, loaded, held_weight(c, send, loaded), stages.at(loaded));
    }
    int num_free = 0;  // items whose slots are known to be free
    int published = 0;
    int item = 0;
    for (; item < send.count; ++item) {
        const int ahead_item = loaded;
        const bool loads_more = ahead_item < send.count;
        float weight = 0.0f;
        if (loads_more) {
            if (is_leader) stages.wait_reusable();
            __syncwarp();  // the leader's wait, every lane's stores to the stage
            load(loaded++);
            weight = held_weight(c, send, ahead_item);
        }
        if (num_free == item) {
            num_free += num_slots_free(c, send, item);
            if (num_free == item) {
                // Everything stored so far is published before a wait: who frees the slot may need it.
                if (is_leader) prim::bulk_wait<0>();
                published = publish_until(send, published, item);
                const bool is_free =
                    !is_leader || c.ring.wait(Stage::kSlot, send.owner, send.port.slot_is_free(send.position(item)));
                if (!__all_sync(kFullMask, is_free)) break;
                ++num_free;
            }
            if (is_leader) prim::fence_async_global();
        }
        stages.wait(item);
        if (is_leader) {
            prim::bulk_store(send.port.slot(send.position(item)), stages.at(item),
                             layout::bulk_bytes(p.slot.topk_weights.end()));
            prim::bulk_commit();
        }
        if (item - published >= kPublishBatch) {
            if (is_leader) prim::bulk_wait<1>();
            published = publish_until(send, published, item);
        }
        if (loads_more) stage_weights(c, send, ahead_item, weight, stages.at(ahead_item));
        __syncwarp();  // every lane's weights, the leader's bulk store
    }
    if (is_leader) prim::bulk_wait<0>();
    publish_until(send, published, item);
    for (int rest = item; rest < loaded; ++rest) stages.wait(rest);  // given up: nothing may land after the end
    return item == send.count;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
