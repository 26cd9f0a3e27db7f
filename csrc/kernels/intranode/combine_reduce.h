// The reducing half of combine: the sum of a token's rows, in FP32 and in rank order, straight from where they stand.
//
// A row stands in our own input, in a slot that its rank has filled, or in the input that its rank lends. A bias is one more
// source of a token, behind the ranks. Rows come by ordinary loads, a piece of two rows at a time: bulk copies through
// shared memory move less (docs/performance/intranode.md, step 20).
#pragma once

#include "device/algo/bf16.h"
#include "device/algo/warp.h"
#include "kernels/intranode/combine_context.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

constexpr int kPairUnroll = 7;  // vectors that a lane holds of each of two rows
constexpr int kSumUnroll = 4;   // the same beside FP32 sums of that many
constexpr int kPairs = 4;       // of bfloat16 in 16 bytes

// One lane's vectors of a piece of a row.
template <int kUnroll> struct Piece { Vec16 vecs[kUnroll]; };

template <int kUnroll> EP_DEVICE void load_piece(Piece<kUnroll>& piece, const uint8_t* row, int base, int num_vecs) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        const int idx = base + i * kWarpSize + prim::lane_idx();
        if (idx < num_vecs) piece.vecs[i] = prim::load_shared_with_peers(reinterpret_cast<const Vec16*>(row) + idx);
    }
}

// FP32 sums of one lane's elements of a piece. They begin at zero, so that a lone -0 comes out as +0, whatever the number of
// sources.
template <int kUnroll> struct Sums {
    float low[kUnroll][kPairs];
    float high[kUnroll][kPairs];

    EP_DEVICE void add(const Piece<kUnroll>& piece, int i) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            low[i][pair] += algo::bf16_low(piece.vecs[i].word[pair]);
            high[i][pair] += algo::bf16_high(piece.vecs[i].word[pair]);
        }
    }
    EP_DEVICE Vec16 rounded(int i) const {
        Vec16 value;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) value.word[pair] = prim::round_to_bf16x2(low[i][pair], high[i][pair]);
        return value;
    }
};

// What sums are made of: the ranks in ascending order, then the biases. Lane i of a warp speaks for source i of a group of 32.
struct Source {
    int index;
    const uint8_t* rows;   // where its rows for us stand; null: they come into slots, or there are none
    const float* weights;  // of those
    int num_rows;          // that it has for us

    EP_DEVICE bool is_rank(const Context& c) const { return index < c.watch.heap.num_ranks(); }
    EP_DEVICE bool uses_slots(const Context& c) const { return rows == nullptr && is_rank(c); }
};

EP_DEVICE int num_sources(const Context& c) { return c.watch.heap.num_ranks() + kMaxBiases; }

EP_DEVICE Source source_at(const Context& c, int index) {
    const int num_ranks = c.watch.heap.num_ranks();
    if (index >= num_ranks) {
        const int bias = index - num_ranks;
        return {index, bias < kMaxBiases ? c.p.bias[bias] : nullptr, nullptr, c.p.num_tokens};
    }
    const uint8_t* rows = direct_rows(c, index);
    const bool has_weights = rows != nullptr && c.p.num_topk > 0;
    return {index, rows, has_weights ? direct_weights(c, index) : nullptr, c.rows.num_rows(c.watch.heap.rank(), index)};
}

// Of the source's row of the token; -1: it has none.
EP_DEVICE int position_of(const Context& c, const Source& source, int token) {
    if (token >= c.p.num_tokens) return -1;
    if (source.is_rank(c)) return c.p.send_head[static_cast<int64_t>(token) * c.watch.heap.num_ranks() + source.index];
    return source.rows != nullptr ? token : -1;
}

EP_DEVICE const uint8_t* row_at(const Context& c, const Source& source, int position) {
    if (position < 0) return nullptr;
    return source.rows != nullptr ? source.rows + static_cast<int64_t>(position) * c.p.row_bytes
                                  : c.ring.from(source.index).slot(position);
}

// One thread.
EP_DEVICE bool wait_for_row(const Context& c, const Source& source, int token, int position) {
    if (position < 0) return true;
    if (position >= source.num_rows) return refuse_position(c.watch, source.index, token, position, source.num_rows);
    return !source.uses_slots(c) ||
           c.ring.wait(Stage::kRow, source.index, c.ring.from(source.index).row_is_here(position));
}

// The first 32 sources, which mostly are all: what a lane knows of its own, and of its row of the token.
struct Token {
    int token;
    Source source;
    int position;
    const uint8_t* row;
};

EP_DEVICE bool wait_for_rows(const Context& c, const Token& token) {
    bool is_here = wait_for_row(c, token.source, token.token, token.position);
    for (int first = kWarpSize; first < num_sources(c); first += kWarpSize) {
        const Source source = source_at(c, first + prim::lane_idx());
        is_here &= wait_for_row(c, source, token.token, position_of(c, source, token.token));
    }
    is_here = __all_sync(kFullMask, is_here);
    __syncwarp();  // each lane's acquire, every lane's reads
    return is_here;
}

// Calls use(row of the source) for each lane that has one, two at a time: use(first, second), second null where there is none.
template <class Use> EP_DEVICE void for_each_pair(const uint8_t* row, const Use& use) {
    for (uint32_t rest = __ballot_sync(kFullMask, row != nullptr); rest != 0;) {
        const uint8_t* first = algo::broadcast_pointer(row, __ffs(static_cast<int>(rest)) - 1);
        rest &= rest - 1;
        const bool has_second = rest != 0;
        const uint8_t* second = algo::broadcast_pointer(row, has_second ? __ffs(static_cast<int>(rest)) - 1 : 0);
        rest &= rest - 1;
        use(first, has_second ? second : nullptr);
    }
}

EP_DEVICE Vec16* combined_row(const Context& c, int token) {
    return reinterpret_cast<Vec16*>(c.p.combined_x + static_cast<int64_t>(token) * c.p.row_bytes);
}

EP_DEVICE int num_row_vecs(const Context& c) { return static_cast<int>(c.p.row_bytes / sizeof(Vec16)); }

// The sum of two rows, or of one (`second` null), or nothing (`first` null too): what most tokens have between two ranks. No
// sums are kept while the next piece is loaded, so that more of it can be under way.
EP_DEVICE void reduce_pair(const Context& c, int token, const uint8_t* first, const uint8_t* second) {
    const int num_vecs = num_row_vecs(c);
    Vec16* target = combined_row(c, token);
    for (int base = 0; base < num_vecs; base += kPairUnroll * kWarpSize) {
        Piece<kPairUnroll> of_first = {}, of_second = {};
        if (first != nullptr) load_piece(of_first, first, base, num_vecs);
        if (second != nullptr) load_piece(of_second, second, base, num_vecs);
#pragma unroll
        for (int i = 0; i < kPairUnroll; ++i) {
            Sums<1> sums = {};
            sums.add({{of_first.vecs[i]}}, 0);
            sums.add({{of_second.vecs[i]}}, 0);
            const int idx = base + i * kWarpSize + prim::lane_idx();
            if (idx < num_vecs) prim::store_streaming(target + idx, sums.rounded(0));
        }
    }
}

// The order of the sources is part of the contract: it fixes the rounding. `for_each` calls its argument with two rows at a
// time, of all sources.
template <class ForEach> EP_DEVICE void reduce_row(const Context& c, int token, const ForEach& for_each) {
    const int num_vecs = num_row_vecs(c);
    for (int base = 0; base < num_vecs; base += kSumUnroll * kWarpSize) {
        Sums<kSumUnroll> sums = {};
        for_each([&](const uint8_t* first, const uint8_t* second) {
            Piece<kSumUnroll> of_first = {}, of_second = {};
            load_piece(of_first, first, base, num_vecs);
            if (second != nullptr) load_piece(of_second, second, base, num_vecs);
#pragma unroll
            for (int i = 0; i < kSumUnroll; ++i) {
                sums.add(of_first, i);
                if (second != nullptr) sums.add(of_second, i);
            }
        });
#pragma unroll
        for (int i = 0; i < kSumUnroll; ++i) {
            const int idx = base + i * kWarpSize + prim::lane_idx();
            if (idx < num_vecs) prim::store_streaming(combined_row(c, token) + idx, sums.rounded(i));
        }
    }
}

// More sources than lanes.
EP_DEVICE_COLD void reduce_row_of_many(const Context& c, int token) {
    reduce_row(c, token, [&](const auto& use) {
        for (int group = 0; group < num_sources(c); group += kWarpSize) {
            const Source source = source_at(c, group + prim::lane_idx());
            for_each_pair(row_at(c, source, position_of(c, source, token)), use);
        }
    });
}

EP_DEVICE void reduce_token(const Context& c, const Token& token) {
    if (num_sources(c) > kWarpSize) return reduce_row_of_many(c, token.token);
    const uint32_t lanes = __ballot_sync(kFullMask, token.row != nullptr);
    if (__popc(lanes) > 2) return reduce_row(c, token.token, [&](const auto& use) { for_each_pair(token.row, use); });
    const int first = lanes == 0 ? 0 : __ffs(static_cast<int>(lanes)) - 1;
    const uint32_t rest = lanes & (lanes - 1);
    const int second = rest == 0 ? first : __ffs(static_cast<int>(rest)) - 1;
    const uint8_t* first_row = algo::broadcast_pointer(token.row, first);
    const uint8_t* second_row = algo::broadcast_pointer(token.row, second);
    reduce_pair(c, token.token, first_row, rest == 0 ? nullptr : second_row);
}

// One warp, before it reads weights: those of all lenders can be read.
EP_DEVICE bool wait_for_weights(const Context& c) {
    const algo::Heap& heap = c.watch.heap;
    bool is_here = true;
    if (c.p.num_topk > 0 && c.p.may_lend)
        for (int rank = prim::lane_idx(); rank < heap.num_ranks(); rank += kWarpSize)
            if (rank != heap.rank() && algo::loan_of(c.watch, rank).x != 0)
                is_here &= algo::wait_at_least(c.watch, {Stage::kWeights, rank}, heap.weight_flag(heap.rank(), rank),
                                               c.watch.call);
    is_here = __all_sync(kFullMask, is_here);
    __syncwarp();  // each lane's acquire, every lane's reads
    return is_here;
}

// Where the weights of this lane's row stand; null: it is no rank, or has no row.
EP_DEVICE const float* weights_at(const Context& c, const Source& source, int position, const uint8_t* row) {
    if (row == nullptr || !source.is_rank(c)) return nullptr;
    return source.rows != nullptr ? source.weights + static_cast<int64_t>(position) * c.p.num_topk
                                  : reinterpret_cast<const float*>(row + c.p.slot.topk_weights.offset);
}

// Sums of the weights that belong to the rows, in rank order like everything.
EP_DEVICE void reduce_weights(const Context& c, const Token& token) {
    const CombineParams& p = c.p;
    for (int first_k = 0; first_k < p.num_topk; first_k += kWarpSize) {
        const int k = first_k + prim::lane_idx();
        const bool has_entry = k < p.num_topk;
        float sum = 0.0f;
        const auto add_pair = [&](const uint8_t* first, const uint8_t* second) {
            const float of_first = has_entry ? reinterpret_cast<const float*>(first)[k] : 0.0f;
            const float of_second = has_entry && second != nullptr ? reinterpret_cast<const float*>(second)[k] : 0.0f;
            sum += of_first;
            sum += of_second;
        };
        const auto add_group = [&](const Source& source, int position, const uint8_t* row) {
            for_each_pair(reinterpret_cast<const uint8_t*>(weights_at(c, source, position, row)), add_pair);
        };
        add_group(token.source, token.position, token.row);
        for (int group = kWarpSize; group < c.watch.heap.num_ranks(); group += kWarpSize) {
            const Source source = source_at(c, group + prim::lane_idx());
            const int position = position_of(c, source, token.token);
            add_group(source, position, row_at(c, source, position));
        }
        if (has_entry) p.combined_topk_weights[static_cast<int64_t>(token.token) * p.num_topk + k] = sum;
    }
}

EP_DEVICE void give_slots_back(const Context& c, const Token& token) {
    if (token.position >= 0 && token.source.uses_slots(c))
        c.ring.from(token.source.index).give_back(token.position, token.source.num_rows);
    for (int group = kWarpSize; group < c.watch.heap.num_ranks(); group += kWarpSize) {
        const Source source = source_at(c, group + prim::lane_idx());
        const int position = position_of(c, source, token.token);
        if (position >= 0 && source.uses_slots(c)) c.ring.from(source.index).give_back(position, source.num_rows);
    }
}

// The whole warp takes the next of its block's tokens.
EP_DEVICE int take_token(const Context& c, int* next_item) {
    int item = 0;
    if (prim::lane_idx() == 0) item = prim::fetch_add<prim::Order::kRelaxed, prim::Scope::kCta>(next_item, 1);
    return __shfl_sync(kFullMask, item, 0) * c.p.geometry.num_blocks + static_cast<int>(blockIdx.x);
}

EP_DEVICE bool reduce(const Context& c, int* next_item) {
    const Source source = source_at(c, prim::lane_idx());
    int next_token = take_token(c, next_item);
    int position = position_of(c, source, next_token);
    bool has_weights = false;
    while (next_token < c.p.num_tokens) {
        const Token token{next_token, source, position, row_at(c, source, position)};
        next_token = take_token(c, next_item);
        position = position_of(c, source, next_token);  // under way with this token's rows
        if (!wait_for_rows(c, token)) return false;
        reduce_token(c, token);
        if (!has_weights && !wait_for_weights(c)) return false;
        has_weights = true;
        reduce_weights(c, token);
        __syncwarp();  // every lane's reads, each lane's release
        give_slots_back(c, token);
    }
    return true;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
