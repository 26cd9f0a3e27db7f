// The sending role of combine: rows back to their owners' slots, or to the sums that owners lend.
//
// One stream per owner: wait for a free slot, copy the row and its weights into it, set its flag. An owner that lends its sums
// gets each row at the place of its token there, and needs no slot. With bulk copies a warp
// keeps several rows on their way through shared memory. A rank that lends its input sends nothing but the weights.
#pragma once

#include "device/algo/group.h"
#include "device/algo/ring.h"
#include "kernels/intranode/combine_context.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

constexpr int kSendUnroll = 7;
constexpr int kPublishBatch = 2;  // rows that a send warp publishes together

// This lane's weight of the row; those beyond the first 32 are loaded when they are needed.
EP_DEVICE float held_weight(algo::Warp warp, const CombineContext& c, int64_t row) {
    const int k = warp.thread_rank();
    return k < c.p.num_topk ? c.p.topk_weights[row * c.p.num_topk + k] : 0.0f;
}

// A row's place at its owner, or in the image of a slot.
struct RowPlace {
    uint8_t* row;
    float* weights;

    EP_DEVICE bool is_there() const { return row != nullptr; }
};
EP_DEVICE RowPlace place_in_slot(const CombineContext& c, uint8_t* slot) {
    return {slot, reinterpret_cast<float*>(slot + c.p.slot.topk_weights.offset)};
}

// Of a token that came here as our row `row`, among the sums that its owner lends. Null: the owner has no such token.
EP_DEVICE RowPlace place_in_sums(const CombineContext& c, const LentSums& sums, int owner, int token) {
    if (token < 0 || token >= sums.num_tokens) {
        refuse_position(c.watch, owner, token, token, sums.num_tokens);
        return {};
    }
    return {sums.rows + static_cast<int64_t>(token) * c.p.row_bytes,
            sums.weights + static_cast<int64_t>(token) * c.p.num_topk};
}

EP_DEVICE void put_weights(algo::Warp warp, const CombineContext& c, int64_t row, float held, float* weights) {
    const CombineParams& p = c.p;
    for (int k = warp.thread_rank(); k < p.num_topk; k += kWarpSize)
        weights[k] = k < kWarpSize ? held : p.topk_weights[row * p.num_topk + k];
}

// Row `row` of our input, and its weights. The whole warp's stores are done when this ends.
EP_DEVICE void put_row(algo::Warp warp, const CombineContext& c, int64_t row, const RowPlace& place) {
    const CombineParams& p = c.p;
    const float weight = held_weight(warp, c, row);
    algo::copy_row<algo::SourceKind::kInput, kSendUnroll>(warp, reinterpret_cast<Vec16*>(place.row),
                                                          reinterpret_cast<const Vec16*>(p.x + row * p.row_bytes),
                                                          static_cast<int>(p.row_bytes / sizeof(Vec16)));
    put_weights(warp, c, row, weight, place.weights);
    warp.sync();  // every lane's stores, one lane's release or request
}

EP_DEVICE bool send(algo::Warp warp, const CombineContext& c, FlagRequester& flags, int warp_idx, int num_warps) {
    const int self = c.watch.heap.rank();
    const algo::RowStream stream = algo::deal_stream(warp, warp_idx, num_warps, self, c.watch.heap.num_ranks(),
                                                     [&](int owner) { return c.rows.num_rows(owner, self); });
    bool is_ok = true;
    const auto serve = [&](int owner, int position, int) {
        const algo::Port port = c.ring.to(owner);
        const LentSums sums = lent_sums(c, owner);
        const int64_t row = c.rows.first_row(owner, self) + position;
        const RowPlace place =
            sums.are_lent() ? place_in_sums(c, sums, owner, c.p.src_idx[row]) : place_in_slot(c, port.slot(position));
        is_ok &= place.is_there();
        if (!place.is_there()) return;
        put_row(warp, c, row, place);
        if (!sums.are_lent())
            flags.row_is_here(warp, owner, position);
        else if (warp.thread_rank() == 0)
            port.publish_in_place(position);
    };
    const bool is_served = algo::serve_streams(
        warp, c.watch, Stage::kSlot, stream,
        [&](int owner, int position) {
            return lent_sums(c, owner).are_lent() ? algo::FlagTest{nullptr, 0}
                                                  : c.ring.to(owner).slot_is_free(position);
        },
        serve);
    return is_served && is_ok;
}

// To one owner that lends its sums: it waits for nothing, so one warp's rows need no stream. The rows of a batch share a release.
EP_DEVICE bool send_to_sums(algo::Warp warp, const CombineContext& c, const LentSums& sums, int owner, int warp_idx,
                            int num_warps) {
    const int self = c.watch.heap.rank();
    const algo::Port port = c.ring.to(owner);
    const int num_rows = c.rows.num_rows(owner, self);
    const int64_t first_row = c.rows.first_row(owner, self);
    const auto token_of = [&](int position) { return position < num_rows ? c.p.src_idx[first_row + position] : 0; };
    int next_token = token_of(warp_idx);
    int published = warp_idx;
    const auto publish_until = [&](int end) {
        const int mine = published + warp.thread_rank() * num_warps;
        if (mine < end && warp.thread_rank() < kPublishBatch) port.publish_in_place(mine);
        published = end;
    };
    int position = warp_idx;
    for (; position < num_rows; position += num_warps) {
        if (position - published >= kPublishBatch * num_warps) publish_until(position);
        const int token = next_token;
        next_token = token_of(position + num_warps);  // under way with this row
        const RowPlace place = place_in_sums(c, sums, owner, token);
        if (!place.is_there()) return false;
        put_row(warp, c, first_row + position, place);
    }
    publish_until(position);
    return true;
}

// -- With bulk copies: the same work, with stages of shared memory between loads and stores -----------------------------

// One send warp's rows: item n is the row at position first + n * step of one owner.
struct RowSend {
    algo::Port port;
    int owner;
    int first, step, count;
    int64_t first_row;
    LentSums sums;  // of the owner

    EP_DEVICE int position(int item) const { return first + item * step; }
    EP_DEVICE int64_t row(int item) const { return first_row + position(item); }
};

EP_DEVICE void stage_weights(algo::Warp warp, const CombineContext& c, const RowSend& send, int item, float held,
                             uint8_t* stage) {
    put_weights(warp, c, send.row(item), held, place_in_slot(c, stage).weights);
    prim::fence_async_shared();
}

// Flags of the items [published, end), whose stores are at their owner. One release for all of them:
// lanes that release together wait together.
EP_DEVICE int publish_until(algo::Warp warp, const RowSend& send, int published, int end) {
    warp.sync();  // the leader's finished stores, every lane's release
    for (; published < end; published += kWarpSize) {
        const int item = published + warp.thread_rank();
        if (item >= end) continue;
        if (send.sums.are_lent())
            send.port.publish_in_place(send.position(item));
        else
            send.port.publish(send.position(item));
    }
    return end;
}

// Of the items from `item` on, how many (at most 32) have a free slot, one after the other.
EP_DEVICE int num_slots_free(algo::Warp warp, const CombineContext& c, const RowSend& send, int item) {
    if (send.sums.are_lent()) return send.count;
    const int mine = item + warp.thread_rank();
    const bool is_free = mine < send.count && c.ring.is_set(send.port.slot_is_free(send.position(mine)));
    const uint32_t taken = ~__ballot_sync(kFullMask, is_free);
    warp.sync();  // each lane's acquire and weights, the leader's bulk stores
    return taken == 0 ? kWarpSize : __ffs(static_cast<int>(taken)) - 1;
}

// Where the rows of the items from `item` on belong at the owner, one for each lane.
EP_DEVICE int owners_tokens(algo::Warp warp, const CombineContext& c, const RowSend& send, int item) {
    const int mine = item + warp.thread_rank();
    return mine < send.count ? c.p.src_idx[send.row(mine)] : 0;
}

// The staged row to its owner: the image of its slot, or the row alone to its place among the sums. False: it has none.
// `token`: at the owner, where it lends its sums.
EP_DEVICE bool store_staged(algo::Warp warp, const CombineContext& c, const RowSend& send, int item, int token,
                            uint8_t* stage) {
    const CombineParams& p = c.p;
    const bool is_leader = warp.thread_rank() == 0;
    if (!send.sums.are_lent()) {
        if (is_leader)
            prim::bulk_store(send.port.slot(send.position(item)), stage, layout::bulk_bytes(p.slot.topk_weights.end()));
    } else {
        const RowPlace place = place_in_sums(c, send.sums, send.owner, token);
        if (!place.is_there()) return false;
        if (is_leader) prim::bulk_store(place.row, stage, p.row_bytes);
        const float* weights = place_in_slot(c, stage).weights;
        for (int k = warp.thread_rank(); k < p.num_topk; k += kWarpSize) place.weights[k] = weights[k];
    }
    if (is_leader) prim::bulk_commit();
    return true;
}

EP_DEVICE bool send_staged(algo::Warp warp, const CombineContext& c, int warp_idx, int num_warps, uint8_t* memory) {
    const CombineParams& p = c.p;
    const int self = c.watch.heap.rank();
    const algo::RowStream stream =
        algo::only_stream(warp, algo::deal_stream(warp, warp_idx, num_warps, self, c.watch.heap.num_ranks(),
                                                  [&](int owner) { return c.rows.num_rows(owner, self); }));
    const RowSend send{c.ring.to(stream.peer),
                       stream.peer,
                       stream.next,
                       stream.step,
                       algo::num_rows_left(stream),
                       c.rows.first_row(stream.peer, self),
                       lent_sums(c, stream.peer)};
    const algo::Stages stages(memory, p.geometry.send);
    const bool is_leader = warp.thread_rank() == 0;
    const int ahead = stages.num_ahead();
    auto load = [&](int item) {
        if (is_leader) stages.load(item, p.x + send.row(item) * p.row_bytes, p.row_bytes);
    };
    stages.init(warp);
    int loaded = 0;
    for (; loaded < ahead && loaded < send.count; ++loaded) {
        load(loaded);
        stage_weights(warp, c, send, loaded, held_weight(warp, c, send.row(loaded)), stages.at(loaded));
    }
    int num_free = 0;  // items whose slots are known to be free
    int published = 0;
    int tokens = 0;  // lane i's: of item i of each 32
    int item = 0;
    for (; item < send.count; ++item) {
        const int ahead_item = loaded;
        const bool loads_more = ahead_item < send.count;
        float weight = 0.0f;
        if (loads_more) {
            if (is_leader) stages.wait_reusable();
            warp.sync();  // the leader's wait, every lane's stores to the stage
            load(loaded++);
            weight = held_weight(warp, c, send.row(ahead_item));
        }
        if (num_free == item) {
            num_free += num_slots_free(warp, c, send, item);
            if (num_free == item) {
                // Everything stored so far is published before a wait: who frees the slot may need it.
                if (is_leader) prim::bulk_wait<0>();
                published = publish_until(warp, send, published, item);
                const bool is_free =
                    !is_leader || c.ring.wait(Stage::kSlot, send.owner, send.port.slot_is_free(send.position(item)));
                if (!__all_sync(kFullMask, is_free)) break;
                ++num_free;
            }
            if (is_leader) prim::fence_async_global();
        }
        stages.wait(item);
        if (send.sums.are_lent() && item % kWarpSize == 0) tokens = owners_tokens(warp, c, send, item);
        const int token = __shfl_sync(kFullMask, tokens, item % kWarpSize);
        if (!store_staged(warp, c, send, item, token, stages.at(item))) break;
        if (item - published >= kPublishBatch) {
            if (is_leader) prim::bulk_wait<1>();
            published = publish_until(warp, send, published, item);
        }
        if (loads_more) stage_weights(warp, c, send, ahead_item, weight, stages.at(ahead_item));
        warp.sync();  // every lane's weights, the leader's bulk store
    }
    if (is_leader) prim::bulk_wait<0>();
    publish_until(warp, send, published, item);
    for (int rest = item; rest < loaded; ++rest) stages.wait(rest);  // given up: nothing may land after the end
    return item == send.count;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
