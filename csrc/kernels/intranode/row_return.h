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

// Row `row` of our input, and its weights. The whole warp's stores are done when this ends. `meanwhile`: of algo::copy_row.
template <class Meanwhile = algo::Nothing>
EP_DEVICE void put_row(algo::Warp warp, const CombineContext& c, int64_t row, const RowPlace& place,
                       const Meanwhile& meanwhile = {}) {
    const CombineParams& p = c.p;
    const float weight = held_weight(warp, c, row);
    algo::copy_row<algo::SourceKind::kInput, kSendUnroll>(warp, reinterpret_cast<Vec16*>(place.row),
                                                          reinterpret_cast<const Vec16*>(p.x + row * p.row_bytes),
                                                          static_cast<int>(p.row_bytes / sizeof(Vec16)), meanwhile);
    put_weights(warp, c, row, weight, place.weights);
    warp.sync();  // every lane's stores, one lane's release or request
}

// To owners' slots, all of them.
EP_DEVICE bool send(algo::Warp warp, const CombineContext& c, FlagRequester& flags, int warp_idx, int num_warps) {
    const int self = c.watch.heap.rank();
    const algo::RowStream stream = algo::deal_stream(warp, warp_idx, num_warps, self, c.watch.heap.num_ranks(),
                                                     [&](int owner) { return c.rows.num_rows(owner, self); });
    return algo::serve_streams(
        warp, c.watch, Stage::kSlot, stream,
        [&](int owner, int position) { return c.ring.to(owner).slot_is_free(position); },
        [&](int owner, int position, int) {
            const RowPlace place = place_in_slot(c, c.ring.to(owner).slot(position));
            put_row(warp, c, c.rows.first_row(owner, self) + position, place);
            flags.row_is_here(warp, owner, position);
        });
}

// To one owner that lends its sums: it waits for nothing, so one warp's rows need no stream. The rows of a batch share a release,
// which waits for their stores while the next row is loaded.
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
        const int token = next_token;
        next_token = token_of(position + num_warps);  // under way with this row
        const RowPlace place = place_in_sums(c, sums, owner, token);
        if (!place.is_there()) return false;
        put_row(warp, c, first_row + position, place, [&] {
            if (position - published >= kPublishBatch * num_warps) publish_until(position);
        });
    }
    publish_until(position);
    return true;
}

// The same by a rank that does not lend its own sums, or adds nothing to them: rare, so the ways through slots carry none of it.
EP_DEVICE_COLD bool send_all_to_sums(const CombineParams* p, uint64_t call, int warp_idx, int num_warps) {
    const algo::Watch watch = make_watch(*p, call);
    const algo::Ring ring(watch, p->window);
    const CombineContext c{*p, watch, ring, RowMap{p->rank_prefix_matrix, p->heap.num_ranks}};
    const int owner = 1 - watch.heap.rank();
    return send_to_sums(algo::Warp{}, c, lent_sums(c, owner), owner, warp_idx, num_warps);
}

// -- With bulk copies: the same work, with stages of shared memory between loads and stores -----------------------------

// One send warp's rows: item n is the row at position first + n * step of one owner.
struct RowSend {
    algo::Port port;
    int owner;
    int first, step, count;
    int64_t first_row;

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
        if (item < end) send.port.publish(send.position(item));
    }
    return end;
}

// Of the items from `item` on, how many (at most 32) have a free slot, one after the other.
EP_DEVICE int num_slots_free(algo::Warp warp, const CombineContext& c, const RowSend& send, int item) {
    const int mine = item + warp.thread_rank();
    const bool is_free = mine < send.count && c.ring.is_set(send.port.slot_is_free(send.position(mine)));
    const uint32_t taken = ~__ballot_sync(kFullMask, is_free);
    warp.sync();  // each lane's acquire and weights, the leader's bulk stores
    return taken == 0 ? kWarpSize : __ffs(static_cast<int>(taken)) - 1;
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
                       c.rows.first_row(stream.peer, self)};
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
        if (is_leader) {
            prim::bulk_store(send.port.slot(send.position(item)), stages.at(item),
                             layout::bulk_bytes(p.slot.topk_weights.end()));
            prim::bulk_commit();
        }
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
