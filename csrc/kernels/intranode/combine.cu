// combine: every rank sends the rows it has worked on back to their owners, and each owner sums what comes back.
//
//   send warps     one stream per owner: wait for a free slot, copy the row (and its weights) into it, set its flag
//   reduce warps   token t: wait for the rows of all ranks that had it, sum in FP32 in rank order straight from the
//                  slots (our own row: from x), add the bias, write once, give the slots back
//
// With bulk copies, both keep several rows, or pieces of rows, on their way through shared memory.
//
// Messages, buffer map and orderings: docs/protocols/intranode.md.
#include "device/algo/bf16.h"
#include "device/algo/ring.h"
#include "device/algo/stages.h"
#include "device/algo/streams.h"
#include "device/algo/warp.h"
#include "device/launch.h"
#include "kernels/context.h"
#include "kernels/intranode/frame.h"
#include "kernels/intranode/launchers.h"
#include "kernels/intranode/staging.h"

namespace deep_ep::kernels::combine {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Vec16;

constexpr int kSendUnroll = 7;
constexpr int kReduceUnroll = 4;
constexpr int kStagedUnroll = 7;
constexpr int kChunkVecs = kStagedUnroll * kWarpSize;  // of a row: what a warp has in a stage, and sums at a time
static_assert(kChunkVecs * sizeof(Vec16) == layout::kReduceStageBytes);
constexpr int kPublishBatch = 2;  // rows that a send warp publishes together
constexpr int kPairs = 4;         // of bfloat16 in 16 bytes

struct Kernel {
    using Params = CombineParams;
    static constexpr int kMaxThreads = kMaxCombineThreads;
    struct Shared {
        int is_ready;
    };

    struct Context {
        const Params& p;
        const algo::Watch& watch;
        const algo::Ring& ring;
        RowMap rows;
    };

    // FP32 sums of kUnroll x 8 elements of one lane.
    template <int kUnroll> struct Sums {
        float low[kUnroll][kPairs];
        float high[kUnroll][kPairs];
    };

    static EP_DEVICE void send_row(const Context& c, int owner, int position) {
        const Params& p = c.p;
        const int64_t row = c.rows.first_row(owner, c.watch.heap.rank()) + position;
        const algo::Port port = c.ring.to(owner);
        uint8_t* slot = port.slot(position);
        algo::warp_copy<algo::SourceKind::kInput, kSendUnroll>(reinterpret_cast<Vec16*>(slot),
                                                               reinterpret_cast<const Vec16*>(p.x + row * p.row_bytes),
                                                               static_cast<int>(p.row_bytes / sizeof(Vec16)));
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize)
            *reinterpret_cast<float*>(slot + p.slot.topk_weights.at(k)) = p.topk_weights[row * p.num_topk + k];
        __syncwarp();  // every lane's stores, one lane's release
        if (prim::lane_idx() == 0) port.publish(position);
    }

    static EP_DEVICE void send(const Context& c, int warp, int num_warps) {
        const int self = c.watch.heap.rank();
        const algo::RowStream stream = algo::deal_stream(warp, num_warps, self, c.watch.heap.num_ranks(),
                                                         [&](int owner) { return c.rows.num_rows(owner, self); });
        algo::serve_streams(
            c.watch, Stage::kSlot, stream,
            [&](int owner, int position) { return c.ring.to(owner).slot_is_free(position); },
            [&](int owner, int position, int) { send_row(c, owner, position); });
    }

    // This lane's rank among 32 from `first_rank`: the position of its row of the token, or -1.
    static EP_DEVICE int position_at(const Context& c, int token, int first_rank) {
        const int num_ranks = c.watch.heap.num_ranks();
        const int rank = first_rank + prim::lane_idx();
        return rank < num_ranks ? c.p.send_head[static_cast<int64_t>(token) * num_ranks + rank] : -1;
    }

    static EP_DEVICE bool wait_for_rows(const Context& c, int token) {
        bool is_here = true;
        for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize) {
            const int position = position_at(c, token, first);
            const int rank = first + prim::lane_idx();
            if (position >= 0 && rank != c.watch.heap.rank())
                is_here &= c.ring.wait(Stage::kRow, rank, c.ring.from(rank).row_is_here(position));
        }
        is_here = __all_sync(kFullMask, is_here);
        __syncwarp();  // each lane's acquire, every lane's reads
        return is_here;
    }

    // Where this lane's rank has its row of the token: our own output of the experts, or a slot.
    static EP_DEVICE const uint8_t* row_pointer(const Context& c, int first_rank, int position) {
        const int rank = first_rank + prim::lane_idx();
        const int self = c.watch.heap.rank();
        if (position < 0) return nullptr;
        if (rank != self) return c.ring.from(rank).slot(position);
        return c.p.x + (static_cast<int64_t>(c.rows.first_row(self, self)) + position) * c.p.row_bytes;
    }

    template <int kUnroll> static EP_DEVICE void add(Sums<kUnroll>& sums, int i, const Vec16& value) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            sums.low[i][pair] += algo::bf16_low(value.word[pair]);
            sums.high[i][pair] += algo::bf16_high(value.word[pair]);
        }
    }

    template <int kUnroll>
    static EP_DEVICE void add_vectors(Sums<kUnroll>& sums, const Vec16* source, int base, int num_vecs) {
        Vec16 held[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int idx = base + i * kWarpSize + prim::lane_idx();
            if (idx < num_vecs) held[i] = prim::load_shared_with_peers(source + idx);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (base + i * kWarpSize + prim::lane_idx() < num_vecs) add(sums, i, held[i]);
    }

    template <int kUnroll>
    static EP_DEVICE void write_sums(const Sums<kUnroll>& sums, Vec16* target, int base, int num_vecs) {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int idx = base + i * kWarpSize + prim::lane_idx();
            Vec16 value;
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair)
                value.word[pair] = prim::round_to_bf16x2(sums.low[i][pair], sums.high[i][pair]);
            if (idx < num_vecs) prim::store_streaming(target + idx, value);
        }
    }

    // Ranks in ascending order, then the biases: the order is part of the contract, it fixes the rounding.
    static EP_DEVICE void reduce_token(const Context& c, int token) {
        const Params& p = c.p;
        const int num_vecs = static_cast<int>(p.row_bytes / sizeof(Vec16));
        const int64_t token_offset = static_cast<int64_t>(token) * p.row_bytes;
        int held_group = -1;  // of 32 ranks: the one whose pointers the lanes hold
        const uint8_t* pointer = nullptr;
        uint32_t lanes = 0;
        for (int base = 0; base < num_vecs; base += kReduceUnroll * kWarpSize) {
            Sums<kReduceUnroll> sums = {};
            for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize) {
                if (first != held_group) {
                    pointer = row_pointer(c, first, position_at(c, token, first));
                    lanes = __ballot_sync(kFullMask, pointer != nullptr);
                    held_group = first;
                }
                for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
                    const uint8_t* row = algo::broadcast_pointer(pointer, __ffs(static_cast<int>(rest)) - 1);
                    add_vectors(sums, reinterpret_cast<const Vec16*>(row), base, num_vecs);
                }
            }
            for (const uint8_t* bias : p.bias)
                if (bias != nullptr)
                    add_vectors(sums, reinterpret_cast<const Vec16*>(bias + token_offset), base, num_vecs);
            write_sums(sums, reinterpret_cast<Vec16*>(p.combined_x + token_offset), base, num_vecs);
        }
    }

    static EP_DEVICE float weight_from(const Context& c, int token, int rank, int k) {
        const Params& p = c.p;
        const int self = c.watch.heap.rank();
        const int position = p.send_head[static_cast<int64_t>(token) * c.watch.heap.num_ranks() + rank];
        if (position < 0) return 0.0f;
        if (rank == self)
            return p.topk_weights[(static_cast<int64_t>(c.rows.first_row(self, self)) + position) * p.num_topk + k];
        return *reinterpret_cast<const float*>(c.ring.from(rank).slot(position) + p.slot.topk_weights.at(k));
    }

    static EP_DEVICE void reduce_weights(const Context& c, int token) {
        const Params& p = c.p;
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize) {
            float sum = 0.0f;
            for (int rank = 0; rank < c.watch.heap.num_ranks(); ++rank) sum += weight_from(c, token, rank, k);
            p.combined_topk_weights[static_cast<int64_t>(token) * p.num_topk + k] = sum;
        }
    }

    static EP_DEVICE void give_slots_back(const Context& c, int token) {
        const int self = c.watch.heap.rank();
        for (int first = 0; first < c.watch.heap.num_ranks(); first += kWarpSize) {
            const int position = position_at(c, token, first);
            const int rank = first + prim::lane_idx();
            if (position >= 0 && rank != self) c.ring.from(rank).give_back(position, c.rows.num_rows(self, rank));
        }
    }

    static EP_DEVICE void reduce(const Context& c, int warp, int num_warps) {
        for (int token = warp; token < c.p.num_tokens; token += num_warps) {
            if (!wait_for_rows(c, token)) return;
            reduce_token(c, token);
            reduce_weights(c, token);
            __syncwarp();  // every lane's reads, each lane's release
            give_slots_back(c, token);
        }
    }

    // -- With bulk copies: the same work, with stages of shared memory between loads and stores -------------------------

    // One send warp's rows: item n is the row at position first + n * step of one owner.
    struct StagedSend {
        algo::Port port;
        int owner;
        int first, step, count;
        int64_t first_row;

        EP_DEVICE int position(int item) const { return first + item * step; }
        EP_DEVICE int64_t row(int item) const { return first_row + position(item); }
    };

    // This lane's weight of the row; those beyond the first 32 are loaded when they are needed.
    static EP_DEVICE float held_weight(const Context& c, const StagedSend& send, int item) {
        const int k = prim::lane_idx();
        return k < c.p.num_topk ? c.p.topk_weights[send.row(item) * c.p.num_topk + k] : 0.0f;
    }

    static EP_DEVICE void stage_weights(const Context& c, const StagedSend& send, int item, float held,
                                        uint8_t* stage) {
        const Params& p = c.p;
        for (int k = prim::lane_idx(); k < p.num_topk; k += kWarpSize)
            *reinterpret_cast<float*>(stage + p.slot.topk_weights.at(k)) =
                k < kWarpSize ? held : p.topk_weights[send.row(item) * p.num_topk + k];
        prim::fence_async_shared();
    }

    // The whole warp: flags of the items [published, end), whose stores are at their owner. One release for all of them:
    // lanes that release together wait together.
    static EP_DEVICE int publish_until(const StagedSend& send, int published, int end) {
        __syncwarp();  // the leader's finished stores, every lane's release
        for (; published < end; published += kWarpSize) {
            const int item = published + prim::lane_idx();
            if (item < end) send.port.publish(send.position(item));
        }
        return end;
    }

    // The whole warp: of the items from `item` on, how many (at most 32) have a free slot, one after the other.
    static EP_DEVICE int num_slots_free(const Context& c, const StagedSend& send, int item) {
        const int mine = item + prim::lane_idx();
        const bool is_free = mine < send.count && c.ring.is_set(send.port.slot_is_free(send.position(mine)));
        const uint32_t taken = ~__ballot_sync(kFullMask, is_free);
        __syncwarp();  // each lane's acquire and weights, the leader's bulk stores
        return taken == 0 ? kWarpSize : __ffs(static_cast<int>(taken)) - 1;
    }

    static EP_DEVICE void send_staged(const Context& c, int warp, int num_warps, uint8_t* memory) {
        const Params& p = c.p;
        const int self = c.watch.heap.rank();
        const algo::RowStream stream = algo::only_stream(algo::deal_stream(
            warp, num_warps, self, c.watch.heap.num_ranks(), [&](int owner) { return c.rows.num_rows(owner, self); }));
        const StagedSend send{c.ring.to(stream.peer),
                              stream.peer,
                              stream.next,
                              stream.step,
                              algo::num_rows_left(stream),
                              c.rows.first_row(stream.peer, self)};
        const algo::Stages stages(memory, p.geometry.send);
        const bool is_leader = prim::lane_idx() == 0;
        const int ahead = stages.num_ahead();
        auto load = [&](int item) {
            if (is_leader) stages.load(item, p.x + send.row(item) * p.row_bytes, p.row_bytes);
        };
        stages.init();
        int loaded = 0;
        for (; loaded < ahead && loaded < send.count; ++loaded) {
            load(loaded);
            stage_weights(c, send, loaded, held_weight(c, send, loaded), stages.at(loaded));
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
                __syncwarp();  // the leader's wait, every lane's stores to the stage
                load(loaded++);
                weight = held_weight(c, send, ahead_item);
            }
            if (num_free == item) {
                num_free += num_slots_free(c, send, item);
                if (num_free == item) {
                    // Everything stored so far is published before a wait: who frees the slot may need it.
                    if (is_leader) prim::bulk_wait<0>();
                    published = publish_until(send, published, item);
                    const bool is_free = !is_leader || c.ring.wait(Stage::kSlot, send.owner,
                                                                   send.port.slot_is_free(send.position(item)));
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
                published = publish_until(send, published, item);
            }
            if (loads_more) stage_weights(c, send, ahead_item, weight, stages.at(ahead_item));
            __syncwarp();  // every lane's weights, the leader's bulk store
        }
        if (is_leader) prim::bulk_wait<0>();
        publish_until(send, published, item);
        for (int rest = item; rest < loaded; ++rest) stages.wait(rest);  // given up: nothing may land after the end
    }

    // What a reduce warp knows about a token. Lane i speaks for rank i.
    struct Token {
        int token;
        int position;            // of the rank's row, -1: none
        const uint8_t* pointer;  // of the rank's row
        uint32_t lanes;          // that have a row
        bool is_here;            // all rows have come
    };

    // Lane i's view of rank i, worked out once.
    struct Source {
        algo::Port port;
        bool is_self;
        int num_rows;          // that it sends us
        const uint8_t* own_x;  // our own rows
    };

    static EP_DEVICE Source make_source(const Context& c) {
        const int self = c.watch.heap.rank();
        const int rank = prim::lane_idx() < c.watch.heap.num_ranks() ? prim::lane_idx() : self;
        return {c.ring.from(rank), rank == self, c.rows.num_rows(self, rank),
                c.p.x + static_cast<int64_t>(c.rows.first_row(self, self)) * c.p.row_bytes};
    }

    static EP_DEVICE Token open_token(const Context& c, const Source& source, int token, int position) {
        const uint8_t* pointer = position < 0     ? nullptr
                                 : source.is_self ? source.own_x + static_cast<int64_t>(position) * c.p.row_bytes
                                                  : source.port.slot(position);
        return {token, position, pointer, __ballot_sync(kFullMask, pointer != nullptr), false};
    }

    static EP_DEVICE int position_of(const Context& c, int token) {
        return token < c.p.num_tokens ? position_at(c, token, 0) : -1;
    }

    static EP_DEVICE bool rows_are_here(const Context& c, const Source& source, const Token& token) {
        bool is_here = true;
        if (token.position >= 0 && !source.is_self) is_here = c.ring.is_set(source.port.row_is_here(token.position));
        is_here = __all_sync(kFullMask, is_here);
        __syncwarp();  // each lane's acquire, the leader's bulk loads
        return is_here;
    }

    // How far the loads have come: chunk by chunk, of each chunk one piece for each rank, in this token or the next.
    struct Fetch {
        int num_issued = 0;
        int base;       // of the chunk, in vectors
        uint32_t rest;  // ranks whose piece of this chunk is still to be loaded
        bool is_on_next;

        EP_DEVICE void start(const Token& token, bool is_next) {
            base = 0;
            rest = token.lanes;
            is_on_next = is_next;
        }
    };

    // Loads pieces until every stage is taken or no more rows are there. Waits for nothing.
    static EP_DEVICE void fetch_more(const Context& c, const Source& source, const algo::Stages& stages, Fetch& fetch,
                                     int num_taken, const Token& now, Token& next) {
        const int num_vecs = static_cast<int>(c.p.row_bytes / sizeof(Vec16));
        while (fetch.num_issued - num_taken < layout::kReduceStages) {
            if (fetch.rest != 0) {
                const int rank = __ffs(static_cast<int>(fetch.rest)) - 1;
                const uint8_t* row = algo::broadcast_pointer(fetch.is_on_next ? next.pointer : now.pointer, rank);
                const int num_left = num_vecs - fetch.base;
                const int num_here = num_left < kChunkVecs ? num_left : kChunkVecs;
                if (prim::lane_idx() == 0)
                    stages.load(fetch.num_issued, reinterpret_cast<const Vec16*>(row) + fetch.base,
                                static_cast<uint32_t>(num_here) * sizeof(Vec16));
                ++fetch.num_issued;
                fetch.rest &= fetch.rest - 1;
            } else if (fetch.base + kChunkVecs < num_vecs) {
                fetch.base += kChunkVecs;
                fetch.rest = fetch.is_on_next ? next.lanes : now.lanes;
            } else {
                if (fetch.is_on_next) return;
                if (!next.is_here) next.is_here = rows_are_here(c, source, next);
                if (!next.is_here) return;
                prim::fence_async_global();
                fetch.start(next, true);
            }
        }
    }

    static EP_DEVICE void add_stage(Sums<kStagedUnroll>& sums, const uint8_t* stage, int num_vecs) {
#pragma unroll
        for (int i = 0; i < kStagedUnroll; ++i) {
            const int idx = i * kWarpSize + prim::lane_idx();
            if (idx < num_vecs) add(sums, i, reinterpret_cast<const Vec16*>(stage)[idx]);
        }
    }

    // Biases are rare: few registers rather than many loads at a time.
    static EP_DEVICE void add_one_by_one(Sums<kStagedUnroll>& sums, const Vec16* source, int base, int num_vecs) {
#pragma unroll
        for (int i = 0; i < kStagedUnroll; ++i) {
            const int idx = base + i * kWarpSize + prim::lane_idx();
            if (idx < num_vecs) add(sums, i, prim::load_input(source + idx));
        }
    }

    // Sums of the weights that came with the rows, in rank order like everything.
    static EP_DEVICE void sum_weights(const Context& c, const Token& token) {
        constexpr int kBatch = 4;
        const Params& p = c.p;
        if (p.num_topk == 0) return;
        const int self = c.watch.heap.rank();
        const int64_t own_row = c.rows.first_row(self, self) + __shfl_sync(kFullMask, token.position, self);
        const float* own = p.topk_weights + own_row * p.num_topk;
        for (int first = 0; first < p.num_topk; first += kWarpSize) {
            const int k = first + prim::lane_idx();
            float sum = 0.0f;
            for (uint32_t rest = token.lanes; rest != 0;) {
                float held[kBatch];
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    const int source = rest != 0 ? __ffs(static_cast<int>(rest)) - 1 : self;
                    const uint8_t* slot = algo::broadcast_pointer(token.pointer, source);
                    const float* weights =
                        source == self ? own : reinterpret_cast<const float*>(slot + p.slot.topk_weights.offset);
                    held[i] = rest != 0 && k < p.num_topk ? weights[k] : 0.0f;
                    rest &= rest - 1;
                }
#pragma unroll
                for (int i = 0; i < kBatch; ++i) sum += held[i];
            }
            if (k < p.num_topk) p.combined_topk_weights[static_cast<int64_t>(token.token) * p.num_topk + k] = sum;
        }
    }

    static EP_DEVICE void reduce_staged(const Context& c, int warp, int num_warps, uint8_t* memory) {
        const Params& p = c.p;
        const int num_vecs = static_cast<int>(p.row_bytes / sizeof(Vec16));
        const Source source = make_source(c);
        const algo::Stages stages(memory, {layout::kReduceStages, layout::kReduceStageBytes});
        stages.init();
        Fetch fetch;
        fetch.is_on_next = false;
        int num_taken = 0;
        Token now = open_token(c, source, warp, position_of(c, warp));
        int position_after = position_of(c, warp + num_warps);
        while (now.token < p.num_tokens) {
            if (!now.is_here) {  // then nothing is under way
                if (!wait_for_rows(c, now.token)) return;
                prim::fence_async_global();
                fetch.start(now, false);
            }
            Token next = open_token(c, source, now.token + num_warps, position_after);
            position_after = position_of(c, next.token + num_warps);
            const int64_t token_offset = static_cast<int64_t>(now.token) * p.row_bytes;
            for (int base = 0; base < num_vecs; base += kChunkVecs) {
                Sums<kStagedUnroll> sums = {};
                for (uint32_t rest = now.lanes; rest != 0; rest &= rest - 1) {
                    fetch_more(c, source, stages, fetch, num_taken, now, next);
                    stages.wait(num_taken);
                    add_stage(sums, stages.at(num_taken), num_vecs - base);
                    ++num_taken;
                    __syncwarp();  // every lane's reads of the stage, the leader's next load into it
                }
                for (const uint8_t* bias : p.bias)
                    if (bias != nullptr)
                        add_one_by_one(sums, reinterpret_cast<const Vec16*>(bias + token_offset), base, num_vecs);
                write_sums(sums, reinterpret_cast<Vec16*>(p.combined_x + token_offset), base, num_vecs);
            }
            sum_weights(c, now);
            __syncwarp();  // every lane's reads, each lane's release
            if (now.position >= 0 && !source.is_self) source.port.give_back(now.position, source.num_rows);
            fetch.is_on_next = false;
            now = next;
        }
    }

    // -- The kernel ------------------------------------------------------------------------------------------------------

    static EP_DEVICE void work(const Context& c) {
        const Geometry& geometry = c.p.geometry;
        const int block = static_cast<int>(blockIdx.x);
        const int send_warp = prim::warp_idx();
        const int recv_warp = send_warp - geometry.num_send_warps;
        if (recv_warp < 0) {
            const int warp = send_warp * geometry.num_blocks + block;
            const int num_warps = geometry.num_send_warps * geometry.num_blocks;
            if (prim::has_bulk_copy() && geometry.send.num_stages > 0)
                send_staged(c, warp, num_warps, send_memory(geometry, send_warp));
            else
                send(c, warp, num_warps);
        } else {
            const int warp = recv_warp * geometry.num_blocks + block;
            const int num_warps = geometry.num_recv_warps * geometry.num_blocks;
            if (prim::has_bulk_copy() && geometry.recv.num_stages > 0)
                reduce_staged(c, warp, num_warps, recv_memory(geometry, recv_warp));
            else
                reduce(c, warp, num_warps);
        }
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Watch watch{make_watch_words(p.watch), make_heap(p.heap), layout::Operation::kCombine,
                                algo::current_call(p.watch.local)};
        const algo::Ring ring(watch, p.window);
        const Context context{p, watch, ring, RowMap{p.rank_prefix_matrix, p.heap.num_ranks}};
        if (begin_call(watch, context.rows, true, p.num_rows, &shared.is_ready)) work(context);
        algo::finish_call(watch);
    }
};

void launch(const CombineParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.geometry.num_blocks;
    config.num_threads = kWarpSize * (params.geometry.num_send_warps + params.geometry.num_recv_warps);
    config.dynamic_shared_bytes = staging_bytes(params.geometry);
    config.is_cooperative = true;
    config.name = "deep_ep::combine";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::combine
