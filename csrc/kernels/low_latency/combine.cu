// low_latency_combine: each token's owner gets one row back from each rank that worked on it, and sums them.
//
//   send     our top-k weights to every rank; then, for each token of any source that has experts here: sum of
//            weight x row over those experts in FP32, rounded once, into the token's slot at its owner, one flag
//   receive  each token is shared by several warps: wait for the flags of its ranks, sum in FP32 in rank order, write
//
// Messages, buffer map and orderings: docs/protocols/low_latency.md.
#include "device/algo/bf16.h"
#include "device/algo/warp.h"
#include "device/launch.h"
#include "kernels/low_latency/frame.h"
#include "kernels/low_latency/launchers.h"
#include "kernels/low_latency/logfmt_row.h"
#include "kernels/low_latency/row.h"
#include "kernels/low_latency/spoil.h"
#include "kernels/low_latency/turn.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

constexpr int kPairs = 4;         // of bfloat16 in 16 bytes
constexpr int kRowsAhead = 4;     // loads of so many experts' rows are under way at once
constexpr int kWeightsAhead = 4;  // table entries of a thread
constexpr int kMaxWarpsForItem = 32;
static_assert(kVecsOfPiece * 2 * kPairs == kLogUnit);  // a piece is a unit of the logarithmic format

// One kernel for each phase and format: the packing of the logarithmic one costs registers.
template <Phase kPhase, bool kIsLogfmt> struct Kernel {
    using Params = LowLatencyCombineParams;
    static constexpr int kMaxThreads = kMaxLowLatencyThreads;
    static constexpr int kMinBlocks = 1;
    struct Shared {
        Block block;
    };

    // FP32 sums of eight elements.
    struct Sums {
        float low[kPairs];
        float high[kPairs];
    };

    static EP_DEVICE void add(Sums& sums, const Vec16& value, float weight) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            sums.low[pair] += weight * algo::bf16_low(value.word[pair]);
            sums.high[pair] += weight * algo::bf16_high(value.word[pair]);
        }
    }

    static EP_DEVICE Vec16 rounded(const Sums& sums) {
        Vec16 value;
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair)
            value.word[pair] = prim::round_to_bf16x2(sums.low[pair], sums.high[pair]);
        return value;
    }

    // Of the row.
    static EP_DEVICE int lane_vec(int chunk, int i) {
        return chunk * kChunkVecs + piece_vec(kIsLogfmt ? Pieces::kNeighbours : Pieces::kHalves, i);
    }

    // What a warp needs to sum one chunk of a token of `source`. Lanes stand for 32 of its top-k entries.
    struct Work {
        int source, token, first_k;
        int row;          // this lane's, of the entry; -1: its expert is not here
        uint32_t rows;    // lanes that have one
        int expert;       // this lane's, as the caller of combine names it
        float weight;     // this lane's
        uint32_t wanted;  // lanes whose entry the caller has kept in this call
    };

    // The rows are those of the dispatch, so they are known before the weights.
    static EP_DEVICE Work load_rows(const Params& p, int source, int token, int first_k) {
        Work work = {source, token, first_k, -1, 0, -1, 0.0f, 0};
        const int k = first_k + prim::lane_idx();
        const int64_t first = (static_cast<int64_t>(source) * p.call.num_max_tokens + token) * p.call.num_topk;
        if (k < p.call.num_topk) work.row = p.row_of_entry[first + k];
        return work;
    }

    static EP_DEVICE void find_rows(const Context& c, Work& work) {
        // With another handle than that of the dispatch the row is garbage, and must not be an address as well.
        if (work.row >= c.num_local_experts() * c.num_rows_of_expert()) work.row = -1;
        work.rows = __ballot_sync(kFullMask, work.row >= 0);
    }

    // After the source's table.
    static EP_DEVICE void load_weights_of(const Context& c, Work& work) {
        const int k = work.first_k + prim::lane_idx();
        const bool is_one = k < c.call.num_topk;
        if (!is_one) return;
        const int64_t entry = static_cast<int64_t>(work.token) * c.call.num_topk + k;
        work.weight = c.weight_table(work.source)[entry];
        work.expert = c.table(work.source)[entry];
    }

    // After that. Returns whether any of the entries has its expert here.
    static EP_DEVICE bool find_wanted(const Context& c, Work& work) {
        work.wanted = __ballot_sync(kFullMask, local_expert(c, work.expert) >= 0);
        return work.wanted != 0;
    }

    // Of up to kRowsAhead rows, the pieces of this lane.
    struct Ahead {
        Vec16 vec[kRowsAhead][kVecsOfPiece];
    };

    static EP_DEVICE void load_ahead(const Params& p, const Work& work, uint32_t lanes, int chunk, Ahead& ahead) {
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (lanes == 0) break;
            const int row = __shfl_sync(kFullMask, work.row, __ffs(static_cast<int>(lanes)) - 1);
            const auto* source = reinterpret_cast<const Vec16*>(p.x + static_cast<int64_t>(row) * p.call.hidden * 2);
#pragma unroll
            for (int j = 0; j < kVecsOfPiece; ++j) {
                if (kIsLogfmt) ahead.vec[i][j] = {};  // channels behind the end of the row share a scale with others
                if (lane_vec(chunk, j) < num_row_vecs(p.call))
                    ahead.vec[i][j] = prim::load_input(source + lane_vec(chunk, j));
            }
            lanes &= lanes - 1;
        }
    }

    // Adds what is ahead, in order of k; returns the lanes that are left.
    static EP_DEVICE uint32_t add_ahead(const Work& work, uint32_t lanes, const Ahead& ahead,
                                        Sums (&sums)[kVecsOfPiece]) {
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (lanes == 0) break;
            const int lane = __ffs(static_cast<int>(lanes)) - 1;
            const float weight = __shfl_sync(kFullMask, work.weight, lane);
            if ((work.wanted >> lane & 1u) != 0)
#pragma unroll
                for (int j = 0; j < kVecsOfPiece; ++j) add(sums[j], ahead.vec[i][j], weight);
            lanes &= lanes - 1;
        }
        return lanes;
    }

    static EP_DEVICE void store_sums(const Params& p, const Sums (&sums)[kVecsOfPiece], int chunk, uint8_t* slot) {
        if constexpr (kIsLogfmt) {
            const auto row = layout::LogfmtRow::make(static_cast<uint64_t>(p.call.hidden));
            const int unit = chunk * kWarpSize + prim::lane_idx();
            float values[kLogUnit];
#pragma unroll
            for (int i = 0; i < kLogUnit / 2; ++i) {
                values[2 * i] = sums[i / kPairs].low[i % kPairs];
                values[2 * i + 1] = sums[i / kPairs].high[i % kPairs];
            }
            store_logfmt(values, slot, row, unit, unit < static_cast<int>(row.high.count));
        } else {
#pragma unroll
            for (int j = 0; j < kVecsOfPiece; ++j)
                if (lane_vec(chunk, j) < num_row_vecs(p.call))
                    prim::store_streaming(reinterpret_cast<Vec16*>(slot) + lane_vec(chunk, j), rounded(sums[j]));
        }
    }

    // One warp: a chunk of a token's row. `work` and `ahead`: the first rows, which are under way.
    static EP_DEVICE void sum_chunk(const Params& p, const Context& c, Work work, Ahead& ahead, int chunk,
                                    Sums (&sums)[kVecsOfPiece]) {
        uint32_t rest = add_ahead(work, work.rows, ahead, sums);
#pragma unroll 1
        for (;;) {
#pragma unroll 1
            while (rest != 0) {
                load_ahead(p, work, rest, chunk, ahead);
                rest = add_ahead(work, rest, ahead, sums);
            }
            if (p.call.num_topk <= work.first_k + kWarpSize) return;
            work = load_rows(p, work.source, work.token, work.first_k + kWarpSize);
            load_weights_of(c, work);
            find_rows(c, work);
            find_wanted(c, work);
            rest = work.rows;
        }
    }

    // One warp: does an entry name an expert here whose rows its own row is none of? Then topk_idx or the handle are not those
    // of one dispatch. An entry that combine leaves out (-1) may have a row all the same, and one of a source that was masked
    // in the dispatch has none.
    static EP_DEVICE bool is_foreign(const Context& c, const Work& work) {
        const int expert = local_expert(c, work.expert);
        const int place = work.row - expert * c.num_rows_of_expert();
        const bool is_its_own = place >= 0 && place < c.num_rows_of_expert();
        const bool may_lack = c.call.is_shrinkable && work.row < 0;
        return __any_sync(kFullMask, expert >= 0 && !is_its_own && !may_lack) != 0;
    }

    static EP_DEVICE_COLD void refuse_entries(algo::Watch watch, int source, int token) {
        algo::fail(watch, layout::FailureKind::kBadInput, {Stage::kEntry, source}, static_cast<uint64_t>(token), 0, 0);
    }

    // Every warp: has the token experts here? `work`: the first of its entries. False as well where the call fails, which all
    // warps of the block find out.
    static EP_DEVICE bool has_work(const Params& p, const Context& c, Work& work) {
        bool is_found = find_wanted(c, work), is_wrong = is_foreign(c, work);
#pragma unroll 1
        for (int first = kWarpSize; first < c.call.num_topk; first += kWarpSize) {
            Work more = load_rows(p, work.source, work.token, first);
            load_weights_of(c, more);
            is_found |= find_wanted(c, more);
            is_wrong |= is_foreign(c, more);
        }
        if (is_wrong) refuse_entries(c.watch, work.source, work.token);
        return is_found && !is_wrong;
    }

    // How many tokens the first 32 sources have, as far as this warp has asked: lane i knows of source i.
    struct Sources {
        uint32_t known;
        int num_tokens;
    };

    static EP_DEVICE bool is_known(const Sources& sources, int source) {
        return source < kWarpSize && (sources.known >> source & 1u) != 0;
    }

    static EP_DEVICE int known_tokens(const Sources& sources, int source) {
        return __shfl_sync(kFullMask, sources.num_tokens, source % kWarpSize);
    }

    static EP_DEVICE bool is_beyond(const Sources& sources, int source, int token) {
        return is_known(sources, source) && token >= known_tokens(sources, source);
    }

    // One warp; acquire.
    static EP_DEVICE bool wait_for_weights(const Context& c, int source) {
        return as_lane_0_says(prim::lane_idx() == 0 && wait_for_table(c, source));
    }

    // One warp: does the token exist, and has it experts here? Finds its weights too.
    static EP_DEVICE bool is_wanted(const Params& p, const Context& c, Sources& sources, Work& work, Block* block) {
        int num_tokens = 0;
        if (is_known(sources, work.source)) {
            num_tokens = known_tokens(sources, work.source);
        } else {
            const bool is_here = wait_for_weights(c, work.source);
            if (is_here) {
                num_tokens = c.num_tokens_of(work.source);
                load_weights_of(c, work);
            } else if (!c.call.is_shrinkable) {
                // The call is aborted; another warp may have seen the table just in time.
                prim::store<Order::kRelaxed, Scope::kCta>(&block->is_ready, 0);
            }
            // In an aborted call warps may disagree, and must still meet at the same barriers: they learn nothing.
            const bool is_settled = is_here || c.call.is_shrinkable;
            if (is_settled && prim::lane_idx() == work.source) sources.num_tokens = num_tokens;
            if (is_settled && work.source < kWarpSize) sources.known |= 1u << work.source;
        }
        return work.token < num_tokens && has_work(p, c, work);
    }

    // Tokens of all sources in turn, so that no link is the last; every rank begins with another source.
    static EP_DEVICE int source_of(const Context& c, int item) { return (c.rank() + 1 + item) % c.num_ranks(); }

    // The items of a block, as one of its warps goes through them: the numbers of the rows of the item after the current one
    // are under way, and its rows too once those of the current one have been added up.
    struct Stream {
        int item;  // the current one; below zero: none yet
        Work work, next;
        Ahead ahead;
    };

    static EP_DEVICE int num_items(const Params& p, const Context& c) { return c.num_ranks() * p.call.num_max_tokens; }

    static EP_DEVICE Work load_item(const Params& p, const Context& c, int item) {
        if (item >= num_items(p, c)) return {0, 0, 0, -1, 0, -1, 0.0f, 0};
        return load_rows(p, source_of(c, item), item / c.num_ranks(), 0);
    }

    // To the next item, and begins the one after it.
    static EP_DEVICE void advance(const Params& p, const Context& c, const Sources& sources, Stream& stream) {
        const int num_blocks = static_cast<int>(gridDim.x);
        stream.item += num_blocks;
        stream.work = stream.next;
        stream.next = load_item(p, c, stream.item + num_blocks);
        find_rows(c, stream.work);
        if (is_known(sources, stream.work.source)) load_weights_of(c, stream.work);
    }

    // The whole block: the current token, and what comes after it is begun.
    static EP_DEVICE void reduce_token(const Params& p, const Context& c, Sources& sources, Stream& stream,
                                       Block* block) {
        const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
        const bool is_one = stream.item >= 0 && !is_beyond(sources, stream.work.source, stream.work.token);
        const bool works = is_one && is_wanted(p, c, sources, stream.work, block);
        const int source = stream.work.source, token = stream.work.token;
        bool is_last = false;
#pragma unroll 1
        for (int chunk = prim::warp_idx(); !is_last; chunk += num_warps) {
            const bool is_inside = works && chunk * kChunkVecs < num_row_vecs(p.call);
            Sums sums[kVecsOfPiece] = {};
            if (is_inside) sum_chunk(p, c, stream.work, stream.ahead, chunk, sums);
            is_last = (chunk + num_warps) * kChunkVecs >= num_row_vecs(p.call);
            if (is_last) advance(p, c, sources, stream);
            load_ahead(p, stream.work, stream.work.rows, is_last ? prim::warp_idx() : chunk + num_warps, stream.ahead);
            if (is_inside) store_sums(p, sums, chunk, c.slot(source, c.rank(), token));
        }
        if (!is_one) return;
        __syncthreads();  // every warp's part of the row, one thread's release
        // Pairs with: wait_for_parts at the owner.
        if (threadIdx.x == 0 && works && prim::load<Order::kRelaxed, Scope::kCta>(&block->is_ready) != 0)
            prim::store<Order::kRelease, Scope::kSys>(c.watch.heap.token_full(source, c.bank, c.rank(), token),
                                                      c.watch.call);
    }

    static EP_DEVICE void send(const Params& p, Context& c, Block* block) {
        const int first = static_cast<int>(blockIdx.x);
        // Most likely the block that begins first; it begins with these instead of a token.
        const bool has_weights = first == 0;
        Sources sources = {};
        Stream stream = {};
        Weights weights = {};
        stream.item = first - static_cast<int>(gridDim.x);
        stream.next = load_item(p, c, first);
        if (has_weights) {
            weights = load_weights(p, c, 0);
        } else {
            advance(p, c, sources, stream);
            load_ahead(p, stream.work, stream.work.rows, prim::warp_idx(), stream.ahead);
        }
        begin_send(c, block);
        // Another warp may find out already that it is not.
        const bool is_ready = prim::load<Order::kRelaxed, Scope::kCta>(&block->is_ready) != 0;
        if (is_ready && block->is_first != 0) send_weights(p, c, block, weights, has_weights);
#pragma unroll 1
        while (is_ready && stream.item < num_items(p, c)) reduce_token(p, c, sources, stream, block);
        end_send(c, block);
    }

    // A thread's part of our own table, from entry `base` on.
    struct Weights {
        int expert[kWeightsAhead];
        float weight[kWeightsAhead];
    };

    static EP_DEVICE Weights load_weights(const Params& p, const Context& c, int base) {
        Weights held = {};
#pragma unroll
        for (int i = 0; i < kWeightsAhead; ++i) {
            const int entry = base + i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
            if (entry >= p.num_tokens * c.call.num_topk) continue;
            // An id out of range reaches no rank; the table must agree.
            held.expert[i] = checked_expert(c, load_expert_id(p.topk_idx, p.idx_bytes, entry));
            held.weight[i] = p.topk_weights[entry];
        }
        return held;
    }

    // All threads of the block that began first: our top-k ids and weights to every rank. Peers wait for them in their
    // send phases, so they must not depend on a block that may not be resident yet.
    static EP_DEVICE void send_weights(const Params& p, const Context& c, const Block* block, Weights held,
                                       bool is_loaded) {
        const int num_entries = p.num_tokens * c.call.num_topk;
        for (int base = 0; base < num_entries; base += kWeightsAhead * static_cast<int>(blockDim.x)) {
            if (base > 0 || !is_loaded) held = load_weights(p, c, base);
            for (int peer = 0; peer < c.num_ranks(); ++peer) {
                if (block->leaves_out(c.call, peer)) continue;
                uint8_t* message = c.message(peer, c.rank());
                auto* ids = reinterpret_cast<int*>(message + c.call.message.topk_idx.offset);
                auto* weights = reinterpret_cast<float*>(message + c.call.message.topk_weights.offset);
#pragma unroll
                for (int i = 0; i < kWeightsAhead; ++i) {
                    const int entry = base + i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
                    if (entry < num_entries) ids[entry] = held.expert[i];
                    if (entry < num_entries) weights[entry] = held.weight[i];
                }
            }
        }
        publish_table(c, block, p.num_tokens);
        if (is_last_warp()) publish_ended(c);
    }

    // The lanes of a warp wait for one rank each; returns the lanes whose rank has sent its part. `id`: this lane's.
    // `is_lost`: set where a part does not come since the call has failed.
    static EP_DEVICE uint32_t wait_for_parts(const Params& p, const Context& c, int token, int64_t id, int first_rank,
                                             bool& is_lost) {
        const int rank = first_rank + prim::lane_idx();
        const uint64_t* flag = c.watch.heap.token_full(c.rank(), c.bank, rank < c.num_ranks() ? rank : 0, token);
        // A look before it is known who has a part: the ids may still be under way.
        bool is_here = rank < c.num_ranks() && is_set(c.watch, flag);
        const bool is_expected = is_destination(c, {p.topk_idx, p.idx_bytes}, id, token, first_rank);
        if (is_expected && !is_here) is_here = wait_for_source(c.call, c.watch, Stage::kRow, rank, flag);
        const uint32_t lanes = __ballot_sync(kFullMask, is_expected && is_here);
        if (__any_sync(kFullMask, is_expected && !is_here)) is_lost |= has_failed(c.watch);
        __syncwarp();  // each lane's acquire, every lane's reads
        return lanes;
    }

    // A unit of the receive phase: eight channels, or as many as the logarithmic format packs together.
    static constexpr int kVecsOfUnit = kIsLogfmt ? kVecsOfPiece : 1;
    static constexpr int kPartsAhead = kIsLogfmt ? 1 : 8;

    // One thread: the parts of up to kPartsAhead ranks, loaded together, added in rank order.
    static EP_DEVICE void add_rounded(const Context& c, Sums& sums, int token, int first_rank, uint32_t lanes,
                                      int vec) {
        while (lanes != 0) {
            Vec16 held[kPartsAhead];
            uint32_t rest = lanes;
#pragma unroll
            for (int i = 0; i < kPartsAhead; ++i) {
                if (rest == 0) break;
                const uint8_t* slot = c.slot(c.rank(), first_rank + __ffs(static_cast<int>(rest)) - 1, token);
                held[i] = prim::load_shared_with_peers(reinterpret_cast<const Vec16*>(slot) + vec);
                rest &= rest - 1;
            }
#pragma unroll
            for (int i = 0; i < kPartsAhead; ++i) {
                if (lanes == 0) break;
                add(sums, held[i], 1.0f);
                lanes &= lanes - 1;
            }
        }
    }

    static EP_DEVICE void add_logfmt(const Params& p, const Context& c, Sums (&sums)[kVecsOfUnit], int token,
                                     int first_rank, uint32_t lanes, int unit) {
        const auto row = layout::LogfmtRow::make(static_cast<uint64_t>(p.call.hidden));
        for (; lanes != 0; lanes &= lanes - 1) {
            const int rank = first_rank + __ffs(static_cast<int>(lanes)) - 1;
            float values[kLogUnit];
            load_logfmt(values, c.slot(c.rank(), rank, token), row, unit);
#pragma unroll
            for (int i = 0; i < kVecsOfUnit * kPairs; ++i) {
                sums[i / kPairs].low[i % kPairs] += values[2 * i];
                sums[i / kPairs].high[i % kPairs] += values[2 * i + 1];
            }
        }
    }

    // One warp: its share of one token.
    template <class Draw>
    static EP_DEVICE void receive_token(const Params& p, const Context& c, int token, int part, int num_parts,
                                        const Draw& draw) {
        const int num_units = (num_row_vecs(p.call) + kVecsOfUnit - 1) / kVecsOfUnit;
        const int share = (num_units + num_parts - 1) / num_parts;
        const int end = (part + 1) * share < num_units ? (part + 1) * share : num_units;
        auto* target = reinterpret_cast<Vec16*>(p.combined_x + static_cast<int64_t>(token) * p.call.hidden * 2);
        const int64_t id = Ids{p.topk_idx, p.idx_bytes}.load(c, token, 0);
        int held_group = -1;
        uint32_t lanes = 0;
        bool is_lost = false;
#pragma unroll 1
        for (int base = part * share; base < end; base += kWarpSize) {
            const int unit = base + prim::lane_idx();
            Sums sums[kVecsOfUnit] = {};
#pragma unroll 1
            for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
                if (first != held_group) lanes = wait_for_parts(p, c, token, id, first, is_lost);
                held_group = first;
                if (unit >= end) continue;
                if constexpr (kIsLogfmt)
                    add_logfmt(p, c, sums, token, first, lanes, unit);
                else
                    add_rounded(c, sums[0], token, first, lanes, unit);
            }
            draw();
#pragma unroll
            for (int i = 0; i < kVecsOfUnit; ++i) {
                const int vec = unit * kVecsOfUnit + i;
                if (unit < end && vec < num_row_vecs(p.call))
                    prim::store_streaming(target + vec, is_lost ? spoiled_vec() : rounded(sums[i]));
            }
        }
    }

    static EP_DEVICE void receive(const Params& p, const Context& c, Block* block) {
        const int num_units = (num_row_vecs(p.call) + kVecsOfUnit - 1) / kVecsOfUnit;
        const int most = (num_units + kWarpSize - 1) / kWarpSize;
        const int num_parts = warps_for_item(p.num_tokens, most < kMaxWarpsForItem ? most : kMaxWarpsForItem);
        const int num_shares = p.num_tokens * num_parts;
        for_each_unit(c, block, num_shares, [&](int unit, bool, const auto& draw) {
            if (unit < num_shares) receive_token(p, c, unit / num_parts, unit % num_parts, num_parts, draw);
        });
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        Context context = make_context(p.call, layout::Operation::kLowLatencyCombine, kPhase);
        if constexpr (kPhase == Phase::kReceive)
            begin_receive(context);
        else
            send(p, context, &shared.block);
        if constexpr (kPhase != Phase::kSend)
            if (kPhase == Phase::kReceive || shared.block.receives != 0) receive(p, context, &shared.block);
        add_statistics(context, &shared.block);
    }
};

template <bool kIsLogfmt>
void launch_phase(const dev::LaunchConfig& config, dev::Stream stream, const LowLatencyCombineParams& params) {
    switch (params.call.phase) {
        case Phase::kSend: return dev::launch<Kernel<Phase::kSend, kIsLogfmt>>(config, stream, params);
        case Phase::kReceive: return dev::launch<Kernel<Phase::kReceive, kIsLogfmt>>(config, stream, params);
        case Phase::kBoth: return dev::launch<Kernel<Phase::kBoth, kIsLogfmt>>(config, stream, params);
    }
}

void launch(const LowLatencyCombineParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.call.num_blocks;
    config.num_threads = kWarpSize * params.call.num_warps;
    config.name = "deep_ep::low_latency::combine";
    if (params.uses_logfmt)
        launch_phase<true>(config, stream, params);
    else
        launch_phase<false>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
