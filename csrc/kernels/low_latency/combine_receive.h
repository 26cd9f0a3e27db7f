// The receive phase of combine: each token is shared by several warps, which wait for the parts of its ranks and sum them
// in rank order.
#pragma once

#include "kernels/low_latency/combine_row.h"
#include "kernels/low_latency/turn.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

using Params = LowLatencyCombineParams;

constexpr int kMaxWarpsForItem = 32;
constexpr int kPartsAtOnce = 4;  // that are read before the first of them is added

// The lanes of a warp wait for one rank each; returns the lanes whose rank has sent its part. `id`: this lane's.
EP_DEVICE uint32_t wait_for_parts(const Params& p, const Context& c, int token, int64_t id, int first_rank) {
    const int rank = first_rank + prim::lane_idx();
    const uint64_t* flag = c.watch.heap.token_full(c.rank(), c.bank, rank < c.num_ranks() ? rank : 0, token);
    // A look before it is known who has a part: the ids may still be under way.
    bool is_here = rank < c.num_ranks() && is_set(c.watch, flag);
    const bool is_expected = is_destination(c, {p.topk_idx, p.idx_bytes}, id, token, first_rank);
    if (is_expected && !is_here) is_here = wait_for_source(c.call, c.watch, Stage::kRow, rank, flag);
    const uint32_t lanes = __ballot_sync(kFullMask, is_expected && is_here);
    __syncwarp();  // each lane's acquire, every lane's reads
    return lanes;
}

// The parts of the ranks in `lanes`, several of them loaded together, added in rank order.
template <bool kIsLogfmt>
EP_DEVICE void add_parts(const Context& c, int token, int first_rank, uint32_t lanes, int chunk, Sums& sums) {
#pragma unroll 1
    for (uint32_t rest = lanes; rest != 0;) {
        Part<kIsLogfmt> held[kPartsAtOnce];
        uint32_t loaded = rest;
#pragma unroll
        for (auto& part : held) {
            if (loaded == 0) break;
            const int rank = first_rank + __ffs(static_cast<int>(loaded)) - 1;
            part = load_part<kIsLogfmt>(c.call, c.slot(c.rank(), rank, token), chunk);
            loaded &= loaded - 1;
        }
#pragma unroll
        for (const auto& part : held) {
            if (rest == 0) break;
            add_part(sums, part);
            rest &= rest - 1;
        }
    }
}

// One warp: every `num_parts`-th chunk of one token.
template <bool kIsLogfmt, class Draw>
EP_DEVICE void receive_token(const Params& p, const Context& c, int token, int part, int num_parts, const Draw& draw) {
    uint8_t* target = p.combined_x + static_cast<int64_t>(token) * p.call.hidden * 2;
    const int64_t id = Ids{p.topk_idx, p.idx_bytes}.load(c, token, 0);
    int held_group = -1;  // of 32 ranks
    uint32_t lanes = 0;
#pragma unroll 1
    for (int chunk = part; chunk < num_chunks(c.call); chunk += num_parts) {
        Sums sums = {};
#pragma unroll 1
        for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
            if (first != held_group) lanes = wait_for_parts(p, c, token, id, first);
            held_group = first;
            add_parts<kIsLogfmt>(c, token, first, lanes, chunk, sums);
        }
        draw();
        store_rounded<kIsLogfmt>(c.call, sums, chunk, target);
    }
}

template <bool kIsLogfmt> EP_DEVICE void receive(const Params& p, const Context& c, Block* block) {
    const int most = num_chunks(c.call) < kMaxWarpsForItem ? num_chunks(c.call) : kMaxWarpsForItem;
    const int num_parts = warps_for_item(p.num_tokens, most);
    const int num_shares = p.num_tokens * num_parts;
    for_each_unit(c, block, num_shares, [&](int unit, bool, const auto& draw) {
        if (unit < num_shares) receive_token<kIsLogfmt>(p, c, unit / num_parts, unit % num_parts, num_parts, draw);
    });
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
