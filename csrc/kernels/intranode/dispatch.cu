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
#include "device/algo/group.h"
#include "device/algo/ring.h"
#include "kernels/intranode/call_session.h"
#include "kernels/intranode/dispatch_parts.h"
#include "kernels/params.h"

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

// -- The sending role: a token is read once, and written to each rank that needs it ----------------------------------
// Our own row and those for ranks that lend their outputs go straight to their final places, the others into the next slot
// of each destination's window, then one flag for each. With bulk copies several rows are on their way through shared memory.

// The token has a row at `rank`: then it is one of those that the counts have announced there.
EP_DEVICE bool is_stated(const DispatchContext& c, int rank, int token, int position) {
    return position < 0 || position < c.rows.num_rows_at(rank) ||
           refuse_position(c.watch, rank, token, position, c.rows.num_rows_at(rank));
}

// Of the token's row among ours at `rank`; -1: it has none there.
EP_DEVICE int position_at(const DispatchContext& c, int token, int rank) {
    const int num_ranks = c.watch.heap.num_ranks();
    return rank < num_ranks ? c.p.send_head[static_cast<int64_t>(token) * num_ranks + rank] : -1;
}

// What lanes load for a token while the one before it is on its way. Lane i's position is that at rank i.
struct TokenNotes {
    int position;
    HeldWords words;
};

EP_DEVICE TokenNotes load_notes(algo::Warp warp, const DispatchContext& c, int token) {
    return {position_at(c, token, warp.thread_rank()), load_words(warp, c.p, InputMetadata<DispatchContext>{c, token})};
}

// One token to those of 32 ranks, from `first_rank`, that need it. Lane i speaks for rank first_rank + i.
EP_DEVICE bool send_token(algo::Warp warp, const DispatchContext& c, int token, const HeldWords& words, int first_rank,
                          int position) {
    warp.expect();
    const DispatchParams& p = c.p;
    const int destination = first_rank + warp.thread_rank();
    const bool is_sent = position >= 0;
    uint8_t* direct = is_sent ? direct_rows(c, destination) : nullptr;
    const bool uses_slot = is_sent && direct == nullptr;

    const bool is_free =
        is_stated(c, destination, token, position) &&
        (!uses_slot || c.ring.wait(Stage::kSlot, destination, c.ring.to(destination).slot_is_free(position)));
    if (!__all_sync(kFullMask, is_free)) return false;
    warp.sync();  // one lane's acquire of a slot, every lane's stores into it

    const int64_t row = is_sent ? static_cast<int64_t>(c.rows.first_row_at(destination)) + position : 0;
    uint8_t* target = !is_sent    ? nullptr
                      : uses_slot ? c.ring.to(destination).slot(position)
                                  : direct + row * p.row_bytes;
    const uint32_t lanes = __ballot_sync(kFullMask, is_sent);
    const uint32_t slot_lanes = __ballot_sync(kFullMask, uses_slot);
    algo::multicast_row<kUnroll>(warp, reinterpret_cast<const Vec16*>(p.x + static_cast<int64_t>(token) * p.row_bytes),
                                 static_cast<int>(p.row_bytes / sizeof(Vec16)), lanes,
                                 reinterpret_cast<Vec16*>(target));
    const InputMetadata<DispatchContext> input{c, token};
    const HeldMetadata metadata(input, words);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int lane = __ffs(static_cast<int>(rest)) - 1;
        uint8_t* slot = algo::broadcast_pointer(warp, target, lane);
        const int64_t final_row = __shfl_sync(kFullMask, row, lane);
        if ((slot_lanes >> lane & 1u) != 0)
            put_metadata(warp, p, p.slot, slot, metadata);
        else
            deliver_metadata(warp, c, first_rank + lane, final_row, metadata);
    }
    warp.sync();  // every lane's stores, one lane's release
    if (uses_slot) c.ring.to(destination).publish(position);
    return true;
}

// Tokens are dealt one by one, so that all warps move through the windows together.
EP_DEVICE bool send(algo::Warp warp, const DispatchContext& c, int warp_idx, int num_warps) {
    const auto notes_of = [&](int token) { return token < c.p.num_tokens ? load_notes(warp, c, token) : TokenNotes{}; };
    TokenNotes next = notes_of(warp_idx);
    for (int token = warp_idx; token < c.p.num_tokens; token += num_warps) {
        const TokenNotes now = next;
        next = notes_of(token + num_warps);
        if (!send_token(warp, c, token, now.words, 0, now.position)) return false;
        for (int first = kWarpSize; first < c.watch.heap.num_ranks(); first += kWarpSize)
            if (!send_token(warp, c, token, now.words, first, position_at(c, token, first + warp.thread_rank())))
                return false;
    }
    return true;
}

// -- Sending with bulk copies: the same work, with stages of shared memory between loads and stores -----------------
// A stage is the image of a slot: the row, brought by a bulk load, and its metadata, written by the lanes.

// The lanes' own notes, behind the image: where the token goes.
EP_DEVICE int* position_in(algo::Warp warp, const DispatchParams& p, uint8_t* stage) {
    return reinterpret_cast<int*>(stage + p.geometry.send.stage_bytes - layout::kPositionBytes) + warp.thread_rank();
}

EP_DEVICE void stage_notes(algo::Warp warp, const DispatchContext& c, int token, const TokenNotes& notes,
                           uint8_t* stage) {
    *position_in(warp, c.p, stage) = notes.position;
    const InputMetadata<DispatchContext> input{c, token};
    put_metadata(warp, c.p, c.p.slot, stage, HeldMetadata(input, notes.words));
    prim::fence_async_shared();
}

// A warp's tokens, item by item. Lane i stores to rank i and publishes there.
struct TokenSend {
    int first, step, count;
    algo::Port port;    // of this lane
    uint8_t* direct;    // this lane's rank gets rows straight into its outputs; null: into slots
    int64_t first_row;  // of our rows there
    uint32_t direct_lanes;

    EP_DEVICE int token(int item) const { return first + item * step; }
    EP_DEVICE bool uses_slot(int position) const { return position >= 0 && direct == nullptr; }
};

EP_DEVICE TokenSend make_send(algo::Warp warp, const DispatchContext& c, int warp_idx, int num_warps) {
    const int self = c.watch.heap.rank();
    const int rank = warp.thread_rank() < c.watch.heap.num_ranks() ? warp.thread_rank() : self;
    const int num_left = c.p.num_tokens - warp_idx;
    uint8_t* direct = direct_rows(c, rank);
    return {warp_idx,
            num_warps,
            num_left > 0 ? (num_left + num_warps - 1) / num_warps : 0,
            c.ring.to(rank),
            direct,
            c.rows.first_row_at(rank),
            __ballot_sync(kFullMask, direct != nullptr && warp.thread_rank() < c.watch.heap.num_ranks())};
}

// Flags of the items [published, end), whose stores are where they belong.
EP_DEVICE int publish_until(algo::Warp warp, const DispatchContext& c, const TokenSend& send,
                            const algo::Stages& stages, int published, int end) {
    for (; published < end; ++published) {
        const int position = *position_in(warp, c.p, stages.at(published));
        if (send.uses_slot(position)) send.port.publish(position);
    }
    return published;
}

// The item's slots are free at all its destinations. Before a wait everything stored so far is published: who frees
// a slot may need it.
EP_DEVICE bool wait_for_slots(algo::Warp warp, const DispatchContext& c, const TokenSend& send,
                              const algo::Stages& stages, int position, int item, int& published) {
    const bool may_wait = send.uses_slot(position) && position >= c.p.window.window;
    if (!__any_sync(kFullMask, may_wait)) return true;
    const algo::FlagTest test = may_wait ? send.port.slot_is_free(position) : algo::FlagTest{nullptr, 0};
    bool is_free = c.ring.is_set(test);
    if (!__all_sync(kFullMask, is_free)) {
        prim::bulk_wait<0>();
        published = publish_until(warp, c, send, stages, published, item);
        is_free = c.ring.wait(Stage::kSlot, warp.thread_rank(), test);
    }
    prim::fence_async_global();
    return __all_sync(kFullMask, is_free);
}

// Each lane stores the staged token to its rank: the whole image into a slot, or the row alone to its final place.
EP_DEVICE void store_staged(const DispatchContext& c, const TokenSend& send, int position, const uint8_t* stage) {
    const DispatchParams& p = c.p;
    if (send.uses_slot(position))
        prim::bulk_store(send.port.slot(position), stage, layout::bulk_bytes(p.slot.scales.end()));
    else if (position >= 0)
        prim::bulk_store(send.direct + (send.first_row + position) * p.row_bytes, stage, p.row_bytes);
    prim::bulk_commit();  // one group an item on every lane, so that groups can be counted
}

// What belongs to the rows that went straight to their final places.
EP_DEVICE void deliver_staged_metadata(algo::Warp warp, const DispatchContext& c, const TokenSend& send, int position,
                                       const uint8_t* stage) {
    const int64_t row = send.first_row + position;
    for (uint32_t rest = send.direct_lanes; rest != 0; rest &= rest - 1) {
        const int rank = __ffs(static_cast<int>(rest)) - 1;
        if (__shfl_sync(kFullMask, position, rank) < 0) continue;
        deliver_metadata(warp, c, rank, __shfl_sync(kFullMask, row, rank), SlotMetadata{stage, c.p.slot});
    }
}

EP_DEVICE bool send_staged(algo::Warp warp, const DispatchContext& c, int warp_idx, int num_warps, uint8_t* memory) {
    const DispatchParams& p = c.p;
    const TokenSend send = make_send(warp, c, warp_idx, num_warps);
    const bool has_slots = __any_sync(kFullMask, send.direct == nullptr);
    const algo::Stages stages(memory, p.geometry.send);
    const int ahead = stages.num_ahead();
    auto load = [&](int item) {
        if (warp.thread_rank() == 0)
            stages.load(item, p.x + static_cast<int64_t>(send.token(item)) * p.row_bytes, p.row_bytes);
    };
    prim::fence_async_global();  // each lane: the loans that this block has seen, its bulk stores
    stages.init(warp);
    int loaded = 0;
    for (; loaded < ahead && loaded < send.count; ++loaded) {
        load(loaded);
        stage_notes(warp, c, send.token(loaded), load_notes(warp, c, send.token(loaded)), stages.at(loaded));
    }
    warp.sync();  // every lane's metadata, each lane's bulk store
    int published = 0;
    int item = 0;
    for (; item < send.count; ++item) {
        const int ahead_item = loaded;
        const bool loads_more = ahead_item < send.count;
        TokenNotes notes = {};
        if (loads_more) {
            stages.wait_reusable();
            warp.sync();  // each lane's wait, the next load
            load(loaded++);
            notes = load_notes(warp, c, send.token(ahead_item));
        }
        const int position = *position_in(warp, p, stages.at(item));
        if (!__all_sync(kFullMask, is_stated(c, warp.thread_rank(), send.token(item), position))) break;
        if (!wait_for_slots(warp, c, send, stages, position, item, published)) break;
        stages.wait(item);
        store_staged(c, send, position, stages.at(item));
        if (has_slots) {
            prim::bulk_wait<1>();
            published = publish_until(warp, c, send, stages, published, item);
        }
        // After the release, which would wait for these stores.
        deliver_staged_metadata(warp, c, send, position, stages.at(item));
        if (loads_more) stage_notes(warp, c, send.token(ahead_item), notes, stages.at(ahead_item));
        warp.sync();  // every lane's metadata, each lane's bulk store; every lane's reads, the next load
    }
    prim::bulk_wait<0>();
    if (has_slots) publish_until(warp, c, send, stages, published, item);
    for (int rest = item; rest < loaded; ++rest) stages.wait(rest);  // given up: nothing may land after the end
    return item == send.count;
}

template <bool kIsStaged> EP_DEVICE bool send_any(algo::Warp warp, const DispatchContext& c, int send_warp) {
    const Geometry& geometry = c.p.geometry;
    const RoleWarp self = role_warp(geometry, send_warp, geometry.num_send_warps);
    if constexpr (kIsStaged)
        return send_staged(warp, c, self.idx, self.count, send_memory(geometry, send_warp));
    else
        return send(warp, c, self.idx, self.count);
}

// -- The operation ---------------------------------------------------------------------------------------------------

// Rows are sent through stages of shared memory, or through registers: a kernel for both would have registers for neither.
template <bool kIsStaged> struct Kernel : CallOperation<Kernel<kIsStaged>, DispatchParams, DispatchState> {
    using Base = CallOperation<Kernel, DispatchParams, DispatchState>;
    using Params = DispatchParams;
    using Shared = DispatchState;
    static constexpr int kMaxThreads = kWarpSize * kMaxDispatchWarps;
    static constexpr auto kOperation = layout::Operation::kDispatch;

    static EP_DEVICE bool is_first_launch(const Params& p) { return p.is_first_kernel; }

    static EP_DEVICE bool open(algo::Warp warp, const Params& p, const algo::Watch& watch, typename Base::Look) {
        return open_call(warp, p, watch);
    }

    static EP_DEVICE void prepare(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        dispatch::prepare(block, p, watch, shared);
    }

    static EP_DEVICE Begun learn(algo::Block block, const Params& p, const algo::Watch& watch, Shared& shared) {
        return dispatch::learn(block, p, watch, shared);
    }

    static EP_DEVICE bool work(algo::Block, const Params& p, const algo::Watch& watch, Shared& shared) {
        const algo::Ring ring(watch, p.window);
        const DispatchContext c{p, watch, ring, shared.rows, &shared.bad_token};
        const Geometry& geometry = p.geometry;
        const algo::Warp warp;
        const int recv_warp = prim::warp_idx() - geometry.num_send_warps;
        if (p.is_worst_case) mark_unused_rows(algo::Grid{}, p, shared.rows.num_rows(watch.heap.num_ranks()));
        if (recv_warp < 0) return send_any<kIsStaged>(warp, c, prim::warp_idx());
        const RoleWarp self = role_warp(geometry, recv_warp, geometry.num_recv_warps);
        return receive(warp, c, self.idx, self.count);
    }

    static EP_DEVICE bool check(algo::Warp warp, const Params& p, const Shared& shared) {
        return input_can_be(warp, p, shared);
    }

    static EP_DEVICE void void_outputs(algo::Block block, const Params& p) { void_dispatch(block, p); }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch

void deep_ep::kernels::launch(const DispatchParams& params, dev::Stream stream) {
    using dispatch::Kernel;
    const Geometry& geometry = params.geometry;
    const auto launch = geometry.send.num_stages > 0 ? launch_call<Kernel<true>, DispatchParams>
                                                     : launch_call<Kernel<false>, DispatchParams>;
    launch("deep_ep::dispatch", params, geometry.num_send_warps + geometry.num_recv_warps, stream);
}
