// The send phase of dispatch: each token, cast, into its slot at every rank that has one of its experts, and one flag for
// each; the last block begins with the routing table.
#pragma once

#include "device/algo/formats.h"
#include "device/algo/group.h"
#include "kernels/low_latency/bf16_row.h"
#include "kernels/low_latency/routing_table.h"

namespace deep_ep::kernels::low_latency::dispatch {
inline namespace EP_BACKEND {

using Params = LowLatencyDispatchParams;

constexpr int kLanesPerGroup = 8;  // a lane's piece becomes 16 bytes of FP8
static_assert(kLanesPerGroup * kVecsOfPiece * 8 == layout::kFp8GroupSize);

// The destinations of a token among 32 ranks; lane i speaks for rank first_rank + i.
struct Targets {
    uint32_t lanes;
    uint8_t* slot;  // this lane's
};

EP_DEVICE Pieces pieces_of(const Params& p) {
    return p.payload == Payload::kFp8 ? Pieces::kNeighbours : Pieces::kInterleaved;
}

EP_DEVICE Piece load_input_piece(Warp warp, const Params& p, int token, int chunk) {
    const auto* row = reinterpret_cast<const Vec16*>(p.x) + static_cast<int64_t>(token) * num_row_vecs(p.call);
    return load_chunk(warp, pieces_of(p), p.call, chunk, [&](int vec) { return prim::load_input(row + vec); });
}

EP_DEVICE float largest_of(const Piece& piece) {
    float largest = 0.0f;
#pragma unroll
    for (const Vec16& vec : piece.vec)
#pragma unroll
        for (uint32_t pair : vec.word)
            largest = fmaxf(largest, fmaxf(fabsf(algo::bf16_low(pair)), fabsf(algo::bf16_high(pair))));
    return largest;
}

EP_DEVICE Vec16 cast(const Piece& piece, float inverse) {
    Vec16 packed = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t pair = piece.vec[i / 4].word[i % 4];
        packed.word[i / 2] |= algo::fp8_e4m3_pair(algo::bf16_low(pair) * inverse, algo::bf16_high(pair) * inverse)
                              << (16 * (i % 2));
    }
    return packed;
}

// A chunk, cast and written to every target.
EP_DEVICE void send_fp8(Warp warp, const Params& p, const Piece& piece, int chunk, const Targets& targets) {
    warp.expect();
    float largest = largest_of(piece);
#pragma unroll
    for (int distance = 1; distance < kLanesPerGroup; distance *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, distance));
    const algo::Fp8Scale scale = algo::fp8_scale(largest, p.rounds_scales);
    const Vec16 packed = cast(piece, scale.inverse);
    const int vec = chunk * kWarpSize + warp.thread_rank();  // of the row in FP8
    for (uint32_t rest = targets.lanes; rest != 0; rest &= rest - 1) {
        uint8_t* slot = algo::broadcast_pointer(warp, targets.slot, __ffs(static_cast<int>(rest)) - 1);
        if (vec * kVecsOfPiece >= num_row_vecs(p.call)) continue;
        prim::store_streaming(reinterpret_cast<Vec16*>(slot) + vec, packed);
        if (vec % kLanesPerGroup == 0)
            *reinterpret_cast<float*>(slot + p.call.message.scales.at(vec / kLanesPerGroup)) = scale.scale;
    }
}

EP_DEVICE void send_bf16(Warp warp, const Params& p, const Piece& piece, int chunk, const Targets& targets) {
    warp.expect();
    for (uint32_t rest = targets.lanes; rest != 0; rest &= rest - 1) {
        uint8_t* slot = algo::broadcast_pointer(warp, targets.slot, __ffs(static_cast<int>(rest)) - 1);
        store_chunk(warp, Pieces::kInterleaved, p.call, chunk, piece, slot);
    }
}

// What a warp loads of a token before it knows anything about the call.
struct Head {
    Piece piece;  // of the warp's first chunk
    int64_t id;   // this lane's of the first 32 entries
};

EP_DEVICE Ids ids_of(const Params& p) { return {p.topk_idx, p.idx_bytes}; }

EP_DEVICE Head load_head(Warp warp, const Params& p, const CallContext& c, int token) {
    if (token >= p.num_tokens) return {};
    return {load_input_piece(warp, p, token, prim::warp_idx()), ids_of(p).load(warp, c, token, 0)};
}

// The destinations of a token among 32 ranks, each in its lane. Far ranks share one slot, in staging, which one of them stands
// for; `is_staged`: one did among the ranks before.
EP_DEVICE Targets targets_of(Warp warp, const CallContext& c, int token, int rank, bool is_sent, uint32_t far_lanes,
                             bool is_staged) {
    if constexpr (kAcrossNodes) {
        const bool stands_for_all = !is_staged && warp.thread_rank() == __ffs(static_cast<int>(far_lanes)) - 1;
        const bool is_written = is_sent && (!c.is_far(rank) || stands_for_all);
        return {__ballot_sync(kFullMask, is_written), !is_written      ? nullptr
                                                      : stands_for_all ? c.far().at<uint8_t>(c.staged_slot(token))
                                                                       : c.slot(rank, c.rank(), token)};
    } else {
        return {__ballot_sync(kFullMask, is_sent), is_sent ? c.slot(rank, c.rank(), token) : nullptr};
    }
}

// The block, after a barrier: a token that is staged, to those who hold it for the far ranks in `far_lanes`, a warp for each.
// Ranks of a node follow each other, so `last` of those before is enough to know that one has it already.
EP_DEVICE void put_token(Block block, const Params& p, const CallContext& c, int token, int first_rank,
                         uint32_t far_lanes, int& last) {
    const FarRanks far = c.far();
    int turn = 0;
#pragma unroll 1
    for (uint32_t rest = far_lanes; rest != 0; rest &= rest - 1) {
        const int peer = far.holder(first_rank + __ffs(static_cast<int>(rest)) - 1);
        if (peer == last) continue;
        last = peer;
        if (turn++ % block.num_warps() != prim::warp_idx()) continue;
        // Pairs with: wait_for_slot at the destination, or at its neighbours.
        far.put(Warp{}, peer,
                {c.far_message(peer, c.rank()) + c.call.message.slots.at(token), c.staged_slot(token),
                 static_cast<uint32_t>(layout::align_up(p.call.message.scales.end(), 16))},
                {far.token_full(c.bank, c.rank(), token), c.watch.call});
    }
}

// One token to all ranks that need it. Who is left out must be the same for all warps: they share the puts.
EP_DEVICE void send_token(Block block, const Params& p, const CallContext& c, const SendPhase<Tells::kAtEnd>& phase,
                          int token, const Head& head) {
    block.expect();
    const Warp warp;
    bool is_staged = false;
    int last_holder = -1;
#pragma unroll 1
    for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
        const bool is_sent =
            is_destination(warp, c, ids_of(p), head.id, token, first, [&](int peer) { return phase.leaves_out(peer); });
        const int rank = first + warp.thread_rank();
        const uint32_t far_lanes = kAcrossNodes ? __ballot_sync(kFullMask, is_sent && c.is_far(rank)) : 0;
        const Targets targets = targets_of(warp, c, token, rank, is_sent, far_lanes, is_staged);
        is_staged |= far_lanes != 0;
#pragma unroll 1
        for (int chunk = prim::warp_idx(); chunk < num_chunks(p.call); chunk += block.num_warps()) {
            const Piece piece = chunk == prim::warp_idx() ? head.piece : load_input_piece(warp, p, token, chunk);
            if (p.payload == Payload::kFp8)
                send_fp8(warp, p, piece, chunk, targets);
            else
                send_bf16(warp, p, piece, chunk, targets);
        }
        block.sync();  // every warp's part of the row, warp 0's releases
        // Pairs with: wait_for_slot at the destination.
        if (prim::warp_idx() == 0 && is_sent && !c.is_far(rank))
            prim::store<Order::kRelease, Scope::kSys>(c.token_flag_at(rank, token), c.watch.call);
        if constexpr (kAcrossNodes) put_token(block, p, c, token, first, far_lanes, last_holder);
    }
}

// Across nodes combine asks which of its parts come from far ranks: the experts of our own tokens, -1 where there is none.
EP_DEVICE void keep_own_entries(Block block, const Params& p, const CallContext& c) {
    int* own = p.row_of_entry + int64_t{c.num_ranks()} * c.call.num_max_tokens * c.call.num_topk;
    algo::for_each(block, c.call.num_max_tokens * c.call.num_topk, [&](int i) {
        own[i] = i < p.num_tokens * c.call.num_topk
                     ? checked_expert(c, algo::load_expert_id(p.topk_idx, p.idx_bytes, i))
                     : -1;
    });
}

// The last block makes the routing table, and sends tokens only where it is alone.
EP_DEVICE void send(Block block, const Params& p, LaunchSession& launch) {
    const CallContext& c = launch.context;
    const Warp warp;
    const bool has_table = blockIdx.x == gridDim.x - 1;
    const int num_senders = gridDim.x > 1 ? static_cast<int>(gridDim.x) - 1 : 1;
    const int first = static_cast<int>(blockIdx.x) < num_senders ? static_cast<int>(blockIdx.x) : p.num_tokens;
    const Choice choice{ids_of(p), p.num_tokens};
    const auto sets = TokenSets::make(p.call.num_experts, p.num_set_words);
    Head head = load_head(warp, p, c, first);
    launch.ask_number();
    const BankLook look = launch.look_at_banks();
    if (has_table) make_tile(block, c, choice, sets, 0);
    launch.take_number();
    const SendPhase<Tells::kAtEnd> phase(block, launch, look);
    const bool is_ready = phase.is_ready();
    if (is_ready && has_table) send_routing_table(block, c, phase, choice, sets);
    if (kAcrossNodes && has_table) keep_own_entries(block, p, c);
#pragma unroll 1
    for (int token = first; is_ready && token < p.num_tokens; token += num_senders) {
        const Head next = load_head(warp, p, c, token + num_senders);
        send_token(block, p, c, phase, token, head);
        head = next;
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::dispatch
