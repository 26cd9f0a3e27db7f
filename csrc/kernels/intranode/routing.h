// Where rows stand, and in which order tokens go to each rank.
#pragma once

#include "device/prim.h"
#include "layout/intranode.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// rank_prefix_matrix[src][dst]: rows that the sources 0..src send to dst.
struct RowMap {
    const int* prefix;
    int num_ranks;

    EP_DEVICE int first_row(int source, int destination) const {
        return source == 0 ? 0 : prefix[(source - 1) * num_ranks + destination];
    }
    EP_DEVICE int num_rows(int source, int destination) const {
        return prefix[source * num_ranks + destination] - first_row(source, destination);
    }
    EP_DEVICE int total_rows(int destination) const { return prefix[(num_ranks - 1) * num_ranks + destination]; }
};

// What one rank needs of that matrix, in shared memory: it is known before the matrix is.
class RowTable {
public:
    EP_DEVICE int first_row_at(int destination) const { return first_at_[destination]; }
    EP_DEVICE int first_row_from(int source) const { return source == 0 ? 0 : end_from_[source - 1]; }
    EP_DEVICE int num_rows_from(int source) const { return end_from_[source] - first_row_from(source); }

    EP_DEVICE int num_rows(int num_ranks) const { return end_from_[num_ranks - 1]; }

    // Takes in prefix[source][destination]. Every source of a destination, in order, by one thread.
    EP_DEVICE void take(int self, int source, int destination, int sum) {
        if (source == 0 && self == 0) first_at_[destination] = 0;
        if (source + 1 == self) first_at_[destination] = sum;
        if (destination == self) end_from_[source] = sum;
    }

private:
    int first_at_[layout::kMaxRanks];  // of this rank's rows at each destination
    int end_from_[layout::kMaxRanks];  // of each source's rows here: one beyond the last
};

// Positions of tokens among those that go to one rank: a scan down the column of that rank. Every block scans everything,
// which is quicker than to wait for other blocks, and keeps the positions of the tokens that it sends: block b those with
// token % gridDim.x == b.
struct TokenScan {
    const uint8_t* is_token_in_rank;  // [num_tokens, num_ranks]
    int* send_head;                   // the same shape
    int num_tokens, num_ranks;

    EP_DEVICE bool is_sent(int token, int rank) const {
        return token < num_tokens && is_token_in_rank[static_cast<int64_t>(token) * num_ranks + rank] != 0;
    }
    EP_DEVICE void keep(int token, int rank, int position) const {
        if (token < num_tokens && token % static_cast<int>(gridDim.x) == static_cast<int>(blockIdx.x))
            send_head[static_cast<int64_t>(token) * num_ranks + rank] = position;
    }
};

// The warp's share of one column, 32 tokens at a time: `take(token, is_sent, ballot)`.
template <class Take>
EP_DEVICE void scan_share(const TokenScan& scan, int rank, int first_token, int end_token, const Take& take) {
    constexpr int kBatch = 8;  // loads under way at once
    for (int base = first_token; base < end_token; base += kBatch * prim::kWarpSize) {
        bool is_sent[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int token = base + i * prim::kWarpSize + prim::lane_idx();
            is_sent[i] = token < end_token && scan.is_sent(token, rank);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int token = base + i * prim::kWarpSize + prim::lane_idx();
            const uint32_t ballot = __ballot_sync(prim::kFullMask, is_sent[i]);
            if (token < end_token) take(token, is_sent[i], ballot);
        }
    }
}

// All threads of the block. `totals`: two integers a warp in shared memory. A barrier must follow before positions are used.
EP_DEVICE void scan_columns(const TokenScan& scan, int* totals) {
    const int num_warps = static_cast<int>(blockDim.x) / prim::kWarpSize;
    const int num_groups = (scan.num_tokens + prim::kWarpSize - 1) / prim::kWarpSize;
    const int share = (num_groups + num_warps - 1) / num_warps * prim::kWarpSize;
    const int first_token = prim::warp_idx() * share;
    const int end_token = first_token + share;
    const uint32_t lanes_before = (1u << prim::lane_idx()) - 1;
    for (int rank = 0; rank < scan.num_ranks; ++rank) {
        int num_sent = 0;
        scan_share(scan, rank, first_token, end_token, [&](int, bool, uint32_t ballot) { num_sent += __popc(ballot); });
        int* column = totals + rank % 2 * num_warps;  // those of the rank before are still read
        if (prim::lane_idx() == 0) column[prim::warp_idx()] = num_sent;
        __syncthreads();
        int position = 0;
        for (int warp = 0; warp < prim::warp_idx(); ++warp) position += column[warp];
        scan_share(scan, rank, first_token, end_token, [&](int token, bool is_sent, uint32_t ballot) {
            scan.keep(token, rank, is_sent ? position + __popc(ballot & lanes_before) : -1);
            position += __popc(ballot);
        });
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
