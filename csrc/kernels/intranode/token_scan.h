// Positions of tokens among those that go to one rank: a scan down the column of that rank in is_token_in_rank. (Across nodes:
// also among those that go to one node.)
//
// Every block scans everything, because waiting for what other blocks have scanned takes longer, and works out the positions
// of the tokens that it sends itself: block b sends those with token % gridDim.x == b.
#pragma once

#include "device/algo/group.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

constexpr int kScanGroups = 128;  // of 32 tokens: a tile

// Of one tile and column; shared memory.
struct ScanTile {
    uint32_t is_sent[kScanGroups];    // a bit for each token of the group
    int num_before[kScanGroups + 1];  // tokens that are sent before the group; the last: before the next tile
};

struct TokenScan {
    const uint8_t* is_token_in_rank;  // [num_tokens, num_columns]
    int* head;                        // the same shape: the position, -1: not sent
    int num_tokens, num_columns;

    EP_DEVICE bool is_sent(int token, int column) const {
        return is_token_in_rank[static_cast<int64_t>(token) * num_columns + column] != 0;
    }
    // By all threads: so many tokens are.
    EP_DEVICE void end_column(int, int) const {}
};

template <class Scan> EP_DEVICE int num_groups_of(const Scan& scan, int first_token) {
    const int num_groups = (scan.num_tokens - first_token + prim::kWarpSize - 1) / prim::kWarpSize;
    return num_groups < kScanGroups ? num_groups : kScanGroups;
}

// A warp takes a group at a time.
template <class Scan>
EP_DEVICE void gather_bits(algo::Block block, const Scan& scan, int column, int first_token, ScanTile& tile) {
    constexpr int kBatch = 6;  // loads under way at once
    const int num_warps = block.num_warps();
    const int num_groups = num_groups_of(scan, first_token);
    for (int first = prim::warp_idx(); first < num_groups; first += kBatch * num_warps) {
        bool is_sent[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int token = first_token + (first + i * num_warps) * prim::kWarpSize + prim::lane_idx();
            is_sent[i] = token < scan.num_tokens && scan.is_sent(token, column);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const uint32_t bits = __ballot_sync(prim::kFullMask, is_sent[i]);
            const int group = first + i * num_warps;
            if (prim::lane_idx() == 0 && group < num_groups) tile.is_sent[group] = bits;
        }
    }
}

// Each lane adds up neighbouring groups. `num_before` the tile.
EP_DEVICE void add_up_groups(algo::Warp warp, int num_groups, int num_before, ScanTile& tile) {
    constexpr int kGroupsOfLane = kScanGroups / prim::kWarpSize;
    const int first = warp.thread_rank() * kGroupsOfLane;
    int counts[kGroupsOfLane];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kGroupsOfLane; ++i) {
        counts[i] = first + i < num_groups ? __popc(tile.is_sent[first + i]) : 0;
        sum += counts[i];
    }
    int before = sum;
#pragma unroll
    for (int distance = 1; distance < prim::kWarpSize; distance *= 2) {
        const int other = __shfl_up_sync(prim::kFullMask, before, distance);
        if (warp.thread_rank() >= distance) before += other;
    }
    before += num_before - sum;
#pragma unroll
    for (int i = 0; i < kGroupsOfLane; ++i) {
        tile.num_before[first + i] = before;
        before += counts[i];
    }
    if (warp.thread_rank() == prim::kWarpSize - 1) tile.num_before[kScanGroups] = before;
}

// The positions of this block's tokens.
template <class Scan>
EP_DEVICE void keep_positions(algo::Block block, const Scan& scan, int column, int first_token, const ScanTile& tile) {
    const auto num_blocks = static_cast<int>(gridDim.x);
    const int skipped = (static_cast<int>(blockIdx.x) - first_token % num_blocks + num_blocks) % num_blocks;
    const int end = first_token + num_groups_of(scan, first_token) * prim::kWarpSize;
    for (int token = first_token + skipped + block.thread_rank() * num_blocks; token < end && token < scan.num_tokens;
         token += block.size() * num_blocks) {
        const int group = (token - first_token) / prim::kWarpSize;
        const uint32_t bits = tile.is_sent[group];
        const int bit = token % prim::kWarpSize;
        const int position = tile.num_before[group] + __popc(bits & ((1u << bit) - 1));
        scan.head[static_cast<int64_t>(token) * scan.num_columns + column] = (bits >> bit & 1u) != 0 ? position : -1;
    }
}

// A barrier must follow before positions are used.
template <class Scan> EP_DEVICE void scan_columns(algo::Block block, const Scan& scan, ScanTile* two_tiles) {
    block.expect();
    int num_tiles = 0;  // in a tile while the one before it is still read
    for (int column = 0; column < scan.num_columns; ++column) {
        int num_before = 0;
        for (int first_token = 0; first_token < scan.num_tokens; first_token += kScanGroups * prim::kWarpSize) {
            ScanTile& tile = two_tiles[num_tiles++ % 2];
            gather_bits(block, scan, column, first_token, tile);
            block.sync();
            if (prim::warp_idx() == 0) add_up_groups(algo::Warp{}, num_groups_of(scan, first_token), num_before, tile);
            block.sync();
            num_before = tile.num_before[kScanGroups];
            keep_positions(block, scan, column, first_token, tile);
        }
        scan.end_column(column, num_before);
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
