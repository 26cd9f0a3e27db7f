// The reducing role of combine across nodes: the sum of a token's rows in this node, in rank order, and of the sums that come from
// other nodes, in node order, and of the biases; one rounding.
#pragma once

#include "kernels/internode/combine_context.h"

namespace deep_ep::kernels::internode::combine {
inline namespace EP_BACKEND {

class TokenReduce {
public:
    EP_DEVICE explicit TokenReduce(const Context& c) : c_(c) {}

    EP_DEVICE bool run(algo::Warp warp, int warp_idx, int num_warps) const {
        bool has_weights = false;
        for (int token = warp_idx; token < c_.p.num_tokens; token += num_warps) {
            if (!wait_for_rows(warp, token)) return false;
            if (!has_weights && !kernels::combine::wait_for_weights(warp, c_.local)) return false;
            has_weights = true;
            reduce(warp, token);
            warp.sync();  // every lane's reads, each lane's release
            if (!give_back(warp, token)) return false;
        }
        return true;
    }

private:
    // What a token's sum is made of: rows at the ranks of this node, sums of the nodes, biases.
    EP_DEVICE int num_rows() const { return c_.num_ranks() + c_.link.num_nodes(); }
    EP_DEVICE bool is_rank(int i) const { return i < c_.num_ranks(); }
    EP_DEVICE int node_of(int i) const { return i - c_.num_ranks(); }
    EP_DEVICE RowSource source(int rank) const { return {c_.self(), c_.link.node(), rank}; }

    // Where row i of the token stands in its stream, -1: there is none.
    EP_DEVICE int place_of(int token, int i) const {
        if (is_rank(i))
            return c_.p.send_head[static_cast<int64_t>(token) * c_.local.rows.num_sources +
                                  c_.local.watch.heap.first_rank() + i];
        if (!c_.link.is_peer(node_of(i))) return -1;
        return c_.p.send_rail_head[static_cast<int64_t>(token) * c_.link.num_nodes() + node_of(i)];
    }

    EP_DEVICE bool wait_for_row(int token, int i, int place) const {
        if (is_rank(i))
            return is_stated(c_, source(i), token, place) &&
                   c_.local.ring.wait(Stage::kRow, i, row_is_here(c_, source(i), place));
        const int node = node_of(i);
        return is_on_rail(c_.link, node, place, c_.num_sent[node]) &&
               c_.link.wait(Stage::kRailChunk, node, c_.link.arrived(node, c_.link.chunk_of(place)));
    }

    EP_DEVICE bool wait_for_rows(algo::Warp warp, int token) const {
        bool is_here = true;
        algo::for_each(warp, num_rows(), [&](int i) {
            if (const int place = place_of(token, i); place >= 0) is_here &= wait_for_row(token, i, place);
        });
        return algo::all(warp, is_here);
    }

    EP_DEVICE void reduce(algo::Warp warp, int token) const {
        const auto row = [&](int i) -> const uint8_t* {
            if (i >= num_rows()) {
                const uint8_t* bias = c_.p.bias[i - num_rows()];
                return bias == nullptr ? nullptr : bias + static_cast<int64_t>(token) * c_.p.row_bytes;
            }
            const int place = place_of(token, i);
            if (place < 0) return nullptr;
            return is_rank(i) ? row_at(c_, source(i), place) : c_.link.received(node_of(i), place);
        };
        const auto weights = [&](int i) -> const float* {
            const int place = place_of(token, i);
            if (place < 0) return nullptr;
            if (is_rank(i)) return weights_at(c_, source(i), place);
            return reinterpret_cast<const float*>(c_.link.received(node_of(i), place) +
                                                  c_.p.rail.slot.topk_weights.offset);
        };
        sum_rows(warp, num_rows() + kMaxBiases, c_.p.row_bytes, row,
                 c_.p.combined_x + static_cast<int64_t>(token) * c_.p.row_bytes);
        sum_weights(warp, num_rows(), c_.p.num_topk, weights,
                    c_.p.combined_topk_weights + static_cast<int64_t>(token) * c_.p.num_topk);
    }

    EP_DEVICE bool give_back(algo::Warp warp, int token) const {
        bool is_ok = true;
        algo::for_each(warp, num_rows(), [&](int i) {
            const int place = place_of(token, i);
            if (place < 0) return;
            if (is_rank(i))
                give_slot_back(c_, source(i), place);
            else
                is_ok &= c_.link.give_back(node_of(i), place, c_.num_sent[node_of(i)]);
        });
        return __all_sync(kFullMask, is_ok);
    }

    const Context& c_;
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::combine
