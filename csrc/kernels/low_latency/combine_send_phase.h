// The send phase of combine: our weights to every rank; then, for each token of any source that has experts here, the sum of
// weight x row over those experts, or, where a hook forbids to wait for the weights, the rows.
#pragma once

#include "device/algo/group.h"
#include "kernels/low_latency/combine_receive_phase.h"
#include "kernels/low_latency/combine_weights.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

// A release waits until all stores of the SM have arrived, so a block makes one for several tokens.
constexpr int kTokensPerRelease = 4;
// At weights that are not here, by a block in all of a launch that may not wait: each is a trip to memory.
constexpr int kMostLooks = 6;

template <bool kIsLogfmt, bool kUsesPackets> struct Sender {
    using Weights = WeightSender<kUsesPackets>;

    // What the block sends of a token: nothing, the sum of its rows, or the rows themselves; to a far owner who waits for
    // it all the same: that it gets nothing.
    enum class Sent : int { kNothing, kSum, kRows, kNone };

    // A token that the block has written and not yet published.
    struct Written {
        uint64_t* flag;  // null: nothing is to be published
        uint64_t value;
    };

    // The same for a far rank: what is put to it from staging.
    struct FarPart {
        int owner;  // below zero: nothing
        int token;
        Sent sent;
        uint32_t rows;  // the entries that have one here
        int further;    // see Work
    };

    struct Shared {
        BlockRole role;
        Written written[kTokensPerRelease];
        int are_weights_here[2];  // of the current token; each second one uses the other
        int has_failed;           // some warp has given up waiting: nothing more may be published
        FarPart far[kAcrossNodes ? kTokensPerRelease : 1];
        int further[2];  // as are_weights_here
    };

    // How far the block is.
    struct Progress {
        int num_items;
        int num_written;              // tokens since the last release, those of which nothing was sent included
        int num_looks;                // of warp 0
        int num_answers, num_places;  // across nodes: that the block has asked for, as far as this warp knows
    };

    // What a warp needs to sum one chunk of a token of `source`. Lanes stand for 32 of its top-k entries.
    struct Work {
        int source, token, first_k;
        int row = -1;             // this lane's, of the entry; -1: its expert is not here
        uint32_t rows = 0;        // lanes that have one
        int expert = -1;          // this lane's, as the caller of combine names it
        float weight = 0;         // this lane's
        uint32_t wanted = 0;      // lanes whose entry the caller has kept in this call
        bool is_weighed = false;  // a look has shown this lane's packets
        int further = -1;         // of rows for a far rank: the first place in staging behind that of the first row

        EP_DEVICE int k() const { return first_k + Warp::thread_rank(); }
    };

    // The rows are those of the dispatch, so they are known before the weights.
    static EP_DEVICE Work load_rows(const Params& p, int source, int token, int first_k) {
        Work work = {.source = source, .token = token, .first_k = first_k};
        const int64_t first = (static_cast<int64_t>(source) * p.call.num_max_tokens + token) * p.call.num_topk;
        if (work.k() < p.call.num_topk) work.row = p.row_of_entry[first + work.k()];
        return work;
    }

    static EP_DEVICE void find_rows(Warp warp, const CallContext& c, Work& work) {
        warp.expect();
        // With another handle than that of the dispatch the row is garbage, and must not be an address as well.
        if (work.row >= c.num_local_experts() * c.num_rows_of_expert()) work.row = -1;
        work.rows = __ballot_sync(kFullMask, work.row >= 0);
    }

    // This lane's entry, in two packets.
    static EP_DEVICE const prim::Packet* packets_of(const CallContext& c, const Work& work) {
        return c.entry_packets(work.source, work.token, work.k());
    }

    // Packets may be looked at whenever it is convenient; what is not there yet is waited for in take_weights.
    static EP_DEVICE void look_at_weights(const CallContext& c, Work& work) {
        work.is_weighed = true;
        if (work.k() >= c.call.num_topk) return;
        const prim::Packet* packets = packets_of(c, work);
        int expert = -1, bits = 0;
        const bool has_expert = look_at_packet(c, packets, expert);
        const bool has_weight = look_at_packet(c, packets + 1, bits);
        work.expert = expert;
        work.weight = algo::float_from_bits(static_cast<uint32_t>(bits));
        work.is_weighed = has_expert && has_weight;
    }

    // After look_at_weights.
    static EP_DEVICE void take_weights(const CallContext& c, Work& work, Shared& shared) {
        if (work.is_weighed) return;
        const prim::Packet* packets = packets_of(c, work);
        int expert = -1, bits = 0;  // no part of `work`, which would have to lie in memory
        const bool is_here =
            wait_for_packet(c, work.source, packets, expert) && wait_for_packet(c, work.source, packets + 1, bits);
        work.expert = is_here ? expert : -1;
        work.weight = algo::float_from_bits(static_cast<uint32_t>(bits));
        if (is_here) return;
        // The call is aborted; another warp may have seen its packet just in time. The token must not be published.
        prim::store<Order::kRelaxed, Scope::kCta>(&shared.has_failed, 1);
    }

    // After the source's table.
    static EP_DEVICE void load_weights_of(const CallContext& c, Work& work) {
        if (work.k() >= c.call.num_topk) return;
        const int64_t entry = static_cast<int64_t>(work.token) * c.call.num_topk + work.k();
        work.weight = c.weight_table(work.source)[entry];
        work.expert = c.table(work.source)[entry];
    }

    // After that. Returns whether any of the entries has its expert here.
    static EP_DEVICE bool find_wanted(Warp warp, const CallContext& c, Work& work) {
        warp.expect();
        work.wanted = __ballot_sync(kFullMask, local_expert(c, work.expert) >= 0);
        return work.wanted != 0;
    }

    // Of up to kRowsAhead rows, the pieces of this lane.
    struct Ahead {
        Piece piece[kRowsAhead];
    };

    static EP_DEVICE void load_ahead(Warp warp, const Params& p, const Work& work, uint32_t lanes, int chunk,
                                     Ahead& ahead) {
        warp.expect();
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (lanes == 0) break;
            const int row = __shfl_sync(kFullMask, work.row, __ffs(static_cast<int>(lanes)) - 1);
            const auto* source = reinterpret_cast<const Vec16*>(p.x + static_cast<int64_t>(row) * p.call.hidden * 2);
            ahead.piece[i] = load_chunk(warp, kPieces<kIsLogfmt>, p.call, chunk,
                                        [&](int vec) { return prim::load_input(source + vec); });
            lanes &= lanes - 1;
        }
    }

    // Where a part for a far rank is staged: the first place of each token is its own.
    static EP_DEVICE uint64_t staged_part(const CallContext& c, int owner, int token) {
        return c.staged_slot(static_cast<int>(c.far().index(owner)) * c.call.num_max_tokens + token);
    }
    // Of rows, entry `k` among `rows`.
    static EP_DEVICE uint64_t staged_row(const CallContext& c, int owner, int token, uint32_t rows, int further,
                                         int k) {
        const int place = __popc(rows & ((1u << k) - 1));
        if (place == 0) return staged_part(c, owner, token);
        return c.staged_slot(c.far().count() * c.call.num_max_tokens + further + place - 1);
    }

    // Where the row of an entry is written that is sent as it is.
    static EP_DEVICE uint8_t* row_slot(const CallContext& c, const Work& work, int k) {
        if constexpr (kAcrossNodes)
            if (c.is_far(work.source))
                return c.far().template at<uint8_t>(staged_row(c, work.source, work.token, work.rows, work.further, k));
        return c.entry_slot(work.source, work.token, k);
    }

    // Sends what is ahead, each row to the slot of its entry; returns the lanes that are left.
    static EP_DEVICE uint32_t send_ahead(Warp warp, const CallContext& c, const Work& work, uint32_t lanes, int chunk,
                                         const Ahead& ahead) {
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (lanes == 0) break;
            uint8_t* slot = row_slot(c, work, __ffs(static_cast<int>(lanes)) - 1);
            store_chunk(warp, kPieces<kIsLogfmt>, c.call, chunk, ahead.piece[i], slot);
            lanes &= lanes - 1;
        }
        return lanes;
    }

    // A chunk of all rows of a token whose owner's weights are not here. `ahead`: the first rows, under way.
    static EP_DEVICE void send_rows(Warp warp, const Params& p, const CallContext& c, const Work& work, Ahead& ahead,
                                    int chunk) {
        if (chunk == 0 && work.row >= 0)
            *c.expert_behind(row_slot(c, work, work.k())) = c.first_expert() + work.row / c.num_rows_of_expert();
        uint32_t rest = send_ahead(warp, c, work, work.rows, chunk, ahead);
#pragma unroll 1
        while (rest != 0) {
            load_ahead(warp, p, work, rest, chunk, ahead);
            rest = send_ahead(warp, c, work, rest, chunk, ahead);
        }
    }

    // Adds what is ahead, in order of k; returns the lanes that are left.
    static EP_DEVICE uint32_t add_ahead(Warp warp, const Work& work, uint32_t lanes, const Ahead& ahead,
                                        Sums (&sums)[kVecsOfPiece]) {
        warp.expect();
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (lanes == 0) break;
            const int lane = __ffs(static_cast<int>(lanes)) - 1;
            const float weight = __shfl_sync(kFullMask, work.weight, lane);
            if ((work.wanted >> lane & 1u) != 0)
#pragma unroll
                for (int j = 0; j < kVecsOfPiece; ++j) sums[j].add(ahead.piece[i].vec[j], weight);
            lanes &= lanes - 1;
        }
        return lanes;
    }

    static EP_DEVICE void store_sums(Warp warp, const Params& p, const Sums (&sums)[kVecsOfPiece], int chunk,
                                     uint8_t* slot) {
        if constexpr (kIsLogfmt) {
            const auto row = layout::LogfmtRow::make(static_cast<uint64_t>(p.call.hidden));
            const int unit = chunk * kWarpSize + warp.thread_rank();
            float values[kLogUnit];
            copy_values(sums, values);
            store_logfmt(warp, values, slot, row, unit, unit < static_cast<int>(row.high.count));
        } else {
#pragma unroll
            for (int j = 0; j < kVecsOfPiece; ++j)
                if (const int vec = lane_vec<kIsLogfmt>(warp, chunk, j); vec < num_row_vecs(p.call))
                    prim::store_streaming(reinterpret_cast<Vec16*>(slot) + vec, sums[j].rounded());
        }
    }

    // A chunk of a token's row. `work` and `ahead`: the first rows, which are under way.
    static EP_DEVICE void sum_chunk(Warp warp, const Params& p, const CallContext& c, Work work, Ahead& ahead,
                                    int chunk, Sums (&sums)[kVecsOfPiece]) {
        uint32_t rest = add_ahead(warp, work, work.rows, ahead, sums);
#pragma unroll 1
        for (;;) {
#pragma unroll 1
            while (rest != 0) {
                load_ahead(warp, p, work, rest, chunk, ahead);
                rest = add_ahead(warp, work, rest, ahead, sums);
            }
            if (c.uses_packets || p.call.num_topk <= work.first_k + kWarpSize) return;
            work = load_rows(p, work.source, work.token, work.first_k + kWarpSize);
            load_weights_of(c, work);
            find_rows(warp, c, work);
            find_wanted(warp, c, work);
            rest = work.rows;
        }
    }

    // Does an entry name an expert here whose rows its own row is none of? Then topk_idx or the handle are not those
    // of one dispatch. An entry that combine leaves out (-1) may have a row all the same, and one of a source that was masked
    // in the dispatch has none.
    static EP_DEVICE bool is_foreign(Warp warp, const CallContext& c, const Work& work) {
        warp.expect();
        const int expert = local_expert(c, work.expert);
        const int place = work.row - expert * c.num_rows_of_expert();
        const bool is_its_own = place >= 0 && place < c.num_rows_of_expert();
        const bool may_lack = c.call.is_shrinkable && work.row < 0;
        return __any_sync(kFullMask, expert >= 0 && !is_its_own && !may_lack) != 0;
    }

    // Has the token experts here? `work`: the first of its entries. False as well where the call fails, which all
    // warps of the block find out.
    static EP_DEVICE bool has_work(Warp warp, const Params& p, const CallContext& c, Work& work) {
        bool is_found = find_wanted(warp, c, work), is_wrong = is_foreign(warp, c, work);
        if (!c.uses_packets)
#pragma unroll 1
            for (int first = kWarpSize; first < c.call.num_topk; first += kWarpSize) {
                Work more = load_rows(p, work.source, work.token, first);
                load_weights_of(c, more);
                is_found |= find_wanted(warp, c, more);
                is_wrong |= is_foreign(warp, c, more);
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

    static EP_DEVICE int known_tokens(Warp warp, const Sources& sources, int source) {
        warp.expect();
        return __shfl_sync(kFullMask, sources.num_tokens, source % kWarpSize);
    }

    static EP_DEVICE bool is_beyond(Warp warp, const Sources& sources, int source, int token) {
        return is_known(sources, source) && token >= known_tokens(warp, sources, source);
    }

    // Acquire.
    static EP_DEVICE bool wait_for_weights(Warp warp, const CallContext& c, int source) {
        warp.expect();
        return algo::broadcast(warp, warp.thread_rank() == 0 && wait_for_table(c, source));
    }

    // Does the token exist, and has it experts here? Finds its weights too.
    static EP_DEVICE bool is_wanted(Warp warp, const Params& p, const CallContext& c, Sources& sources, Work& work,
                                    Shared& shared) {
        if (c.uses_packets && !c.is_far(work.source)) {
            take_weights(c, work, shared);
            return has_work(warp, p, c, work);
        }
        int num_tokens = 0;
        if (is_known(sources, work.source)) {
            num_tokens = known_tokens(warp, sources, work.source);
        } else {
            const bool is_here = wait_for_weights(warp, c, work.source);
            if (is_here) {
                num_tokens = c.num_tokens_of(work.source);
                load_weights_of(c, work);
            } else if (!c.call.is_shrinkable) {
                // The call is aborted; another warp may have seen the table just in time.
                prim::store<Order::kRelaxed, Scope::kCta>(&shared.has_failed, 1);
            }
            // In an aborted call warps may disagree, and must still meet at the same barriers: they learn nothing.
            const bool is_settled = is_here || c.call.is_shrinkable;
            if (is_settled && warp.thread_rank() == work.source) sources.num_tokens = num_tokens;
            if (is_settled && work.source < kWarpSize) sources.known |= 1u << work.source;
        }
        return work.token < num_tokens && has_work(warp, p, c, work);
    }

    // Tokens of all sources in turn, so that no link is the last; every rank begins with another source. With a hook a rank
    // begins with its own tokens: the weights of the others come meanwhile, and sums are fewer bytes than rows.
    static EP_DEVICE Work load_item(const Params& p, const CallContext& c, int item) {
        if (item >= num_items(p, c)) return {.source = 0, .token = 0, .first_k = 0};
        const bool has_own = has_own_first(c);
        if (has_own && item < p.call.num_max_tokens) return load_rows(p, c.rank(), item, 0);
        const int other = has_own ? item - p.call.num_max_tokens : item;
        const Divisor& by_sources = has_own ? p.call.by_other_ranks : p.call.by_ranks;
        const int token = by_sources.quotient(other);
        const int source = c.rank() + 1 + other - token * by_sources.value;
        return load_rows(p, source < c.num_ranks() ? source : source - c.num_ranks(), token, 0);
    }

    static EP_DEVICE bool has_own_first(const CallContext& c) { return c.uses_packets && c.phase == Phase::kSend; }

    // The items of a block, as one of its warps goes through them: the numbers of the rows of the item after the current one
    // are under way, and its rows too once those of the current one have been added up.
    struct ItemCursor {
        int item;  // the current one; below zero: none yet
        Work work, next;
        Ahead ahead;
    };

    static EP_DEVICE int num_items(const Params& p, const CallContext& c) {
        return c.num_ranks() * p.call.num_max_tokens;
    }

    // To the next item, and begins the one after it.
    static EP_DEVICE void advance(Warp warp, const Params& p, const CallContext& c, const Sources& sources,
                                  ItemCursor& cursor) {
        const int num_blocks = static_cast<int>(gridDim.x);
        cursor.item += num_blocks;
        cursor.work = cursor.next;
        cursor.next = load_item(p, c, cursor.item + num_blocks);
        if (c.uses_packets && !c.is_far(cursor.work.source))
            look_at_weights(c, cursor.work);
        else if (is_known(sources, cursor.work.source))
            load_weights_of(c, cursor.work);
        find_rows(warp, c, cursor.work);
    }

    static EP_DEVICE void publish_written(Block block, const CallContext& c, int num_written, Shared& shared) {
        block.expect();
        block.sync();  // every warp's part of the rows, one warp's releases
        const int idx = block.thread_rank();
        // Pairs with: wait_for_parts at the owner.
        if (idx < num_written && shared.written[idx].flag != nullptr &&
            prim::load<Order::kRelaxed, Scope::kCta>(&shared.has_failed) == 0)
            prim::store<Order::kRelease, Scope::kSys>(shared.written[idx].flag, shared.written[idx].value);
        Warp::sync();  // the list is read before thread 0 begins the next one
        if constexpr (kAcrossNodes) put_written(block, c, num_written, shared);
    }

    // With a hook: nobody may wait for another rank here, which may be late by any time. A few looks, for the whole of the
    // launch, are less than what rows cost. Warp 0 decides; what it has seen the others see too.
    static EP_DEVICE bool are_weights_here(Block block, const CallContext& c, Work& work, Progress& progress,
                                           Shared& shared) {
        block.expect();
        int* answer = &shared.are_weights_here[(kAcrossNodes ? progress.num_answers++ : progress.num_items) % 2];
        if (prim::warp_idx() == 0) {
            bool is_here = __all_sync(kFullMask, work.is_weighed) != 0;
#pragma unroll 1
            while (!is_here && progress.num_looks < kMostLooks) {
                ++progress.num_looks;
                look_at_weights(c, work);
                is_here = __all_sync(kFullMask, work.is_weighed) != 0;
            }
            if (Warp::thread_rank() == 0) *answer = is_here ? 1 : 0;
        }
        block.sync();
        return *answer != 0;
    }

    // Combine by entry for a far owner.
    static EP_DEVICE bool is_far_by_entry(const CallContext& c, const Work& work) {
        return kUsesPackets && c.is_far(work.source);
    }

    // Places in staging for the rows of a token. False: there are none left.
    static EP_DEVICE bool take_places(Block block, const CallContext& c, Work& work, Progress& progress,
                                      Shared& shared) {
        block.expect();
        const int num_further = __popc(work.rows) - 1;
        if (num_further == 0) return true;
        int* answer = &shared.further[progress.num_places++ % 2];
        if (block.thread_rank() == 0) {
            const auto room = static_cast<int64_t>((c.far().staging_bytes() - c.call.message.slots.offset) /
                                                   c.call.entry_slot_bytes) -
                              int64_t{c.far().count()} * c.call.num_max_tokens;
            const uint32_t taken = prim::fetch_add<Order::kRelaxed, Scope::kGpu>(&shared.role.launch_state->staged_rows,
                                                                                 static_cast<uint32_t>(num_further));
            *answer = int64_t{taken} + num_further <= room ? static_cast<int>(taken) : -1;
        }
        block.sync();
        work.further = *answer;
        return work.further >= 0;
    }

    // May not wait for the weights of `work`, and does without?
    static EP_DEVICE bool sends_rows(Block block, const CallContext& c, Work& work, Progress& progress,
                                     Shared& shared) {
        if (!c.uses_packets || c.phase != Phase::kSend || work.source == c.rank()) return false;
        if constexpr (kAcrossNodes)
            if (c.is_far(work.source)) return work.rows != 0 && take_places(block, c, work, progress, shared);
        return !are_weights_here(block, c, work, progress, shared);
    }

    static EP_DEVICE Sent what_to_send(Block block, const Params& p, const CallContext& c, Sources& sources, Work& work,
                                       Progress& progress, Shared& shared) {
        if (is_far_by_entry(c, work) && work.rows == 0) return Sent::kNothing;
        if (sends_rows(block, c, work, progress, shared)) return Sent::kRows;
        if (is_wanted(Warp{}, p, c, sources, work, shared)) return Sent::kSum;
        return is_far_by_entry(c, work) ? Sent::kNone : Sent::kNothing;
    }

    // Where the part is a sum.
    static EP_DEVICE uint8_t* sum_slot(const CallContext& c, const Work& work) {
        if constexpr (kAcrossNodes)
            if (c.is_far(work.source)) return c.far().template at<uint8_t>(staged_part(c, work.source, work.token));
        if constexpr (kUsesPackets)
            return c.entry_slot(work.source, work.token, __ffs(static_cast<int>(work.wanted)) - 1);
        else
            return c.slot(work.source, c.rank(), work.token);
    }

    static EP_DEVICE Written written_of(const CallContext& c, const Work& work, Sent sent) {
        if (sent == Sent::kNothing || c.is_far(work.source)) return {nullptr, 0};
        uint64_t* flag = c.token_flag_at(work.source, work.token);
        return {flag, sent == Sent::kRows ? EntrySlots::rows_flag(c.watch.call, work.rows) : c.watch.call};
    }

    static EP_DEVICE FarPart far_part_of(const CallContext& c, const Work& work, Sent sent) {
        const bool is_one = sent != Sent::kNothing && c.is_far(work.source);
        return {is_one ? work.source : -1, work.token, sent, work.rows, work.further};
    }

    // A row or a sum, or nothing, to where its far owner looks for it.
    static EP_DEVICE void put_part(Warp warp, const CallContext& c, const FarPart& part, int k) {
        const FarRanks far = c.far();
        const uint64_t row_bytes = kIsLogfmt ? layout::LogfmtRow::make(static_cast<uint64_t>(c.call.hidden)).bytes
                                             : static_cast<uint64_t>(c.call.hidden) * 2;
        // Pairs with: wait_for_parts at the owner.
        if constexpr (!kUsesPackets) {
            far.put(warp, part.owner,
                    {c.far_message(part.owner, c.rank()) + c.call.message.slots.at(part.token),
                     staged_part(c, part.owner, part.token), static_cast<uint32_t>(layout::align_up(row_bytes, 16))},
                    {far.token_full(c.bank, c.rank(), part.token), c.watch.call});
            return;
        }
        const int entry = part.token * c.call.num_topk + k;
        const rail::Flag flag{far.entry_full(c.bank, entry),
                              part.sent == Sent::kRows ? EntrySlots::rows_flag(c.watch.call, part.rows) : c.watch.call};
        if (part.sent == Sent::kNone) {
            if (warp.thread_rank() == 0) far.set(part.owner, flag);
            return;
        }
        const uint64_t bytes =
            part.sent == Sent::kRows ? EntrySlots::expert_offset(static_cast<uint64_t>(c.call.hidden)) + 4 : row_bytes;
        far.put(warp, part.owner,
                {c.far_entry_slot(entry), staged_row(c, part.owner, part.token, part.rows, part.further, k),
                 static_cast<uint32_t>(layout::align_up(bytes, 16))},
                flag);
    }

    // After a barrier: what the block has written for far ranks, a warp for each row.
    static EP_DEVICE void put_written(Block block, const CallContext& c, int num_written, const Shared& shared) {
        const bool has_failed = prim::load<Order::kRelaxed, Scope::kCta>(&shared.has_failed) != 0;
        int turn = 0;
#pragma unroll 1
        for (int i = 0; i < num_written; ++i) {
            const FarPart part = shared.far[i];
            if (part.owner < 0 || has_failed) continue;
            const uint32_t first = kUsesPackets ? part.rows & (~part.rows + 1) : 1u;
#pragma unroll 1
            for (uint32_t rest = part.sent == Sent::kRows ? part.rows : first; rest != 0; rest &= rest - 1, ++turn)
                if (turn % block.num_warps() == prim::warp_idx())
                    put_part(Warp{}, c, part, __ffs(static_cast<int>(rest)) - 1);
        }
        block.sync();  // the list is read before thread 0 begins the next one
    }

    // The current token, and what comes after it is begun.
    static EP_DEVICE void send_token(Block block, const Params& p, const CallContext& c, Sources& sources,
                                     ItemCursor& cursor, Progress& progress, Shared& shared) {
        block.expect();
        const Warp warp;
        const int num_warps = block.num_warps();
        const bool is_one = cursor.item >= 0 && (is_far_by_entry(c, cursor.work) ||
                                                 !is_beyond(warp, sources, cursor.work.source, cursor.work.token));
        const Sent sent = is_one ? what_to_send(block, p, c, sources, cursor.work, progress, shared) : Sent::kNothing;
        uint8_t* slot = sent == Sent::kSum ? sum_slot(c, cursor.work) : nullptr;
        if (block.thread_rank() == 0) {
            shared.written[progress.num_written] = written_of(c, cursor.work, sent);
            if constexpr (kAcrossNodes) shared.far[progress.num_written] = far_part_of(c, cursor.work, sent);
        }
        bool is_last = false;
#pragma unroll 1
        for (int chunk = prim::warp_idx(); !is_last; chunk += num_warps) {
            const bool is_inside = chunk * kChunkVecs < num_row_vecs(p.call);
            Sums sums[kVecsOfPiece] = {};
            if (is_inside && sent == Sent::kSum) sum_chunk(warp, p, c, cursor.work, cursor.ahead, chunk, sums);
            if (is_inside && sent == Sent::kRows) send_rows(warp, p, c, cursor.work, cursor.ahead, chunk);
            is_last = (chunk + num_warps) * kChunkVecs >= num_row_vecs(p.call);
            if (is_last) advance(warp, p, c, sources, cursor);
            load_ahead(warp, p, cursor.work, cursor.work.rows, is_last ? prim::warp_idx() : chunk + num_warps,
                       cursor.ahead);
            if (is_inside && sent == Sent::kSum) store_sums(warp, p, sums, chunk, slot);
        }
        ++progress.num_items;
        if (++progress.num_written < kTokensPerRelease) return;
        publish_written(block, c, progress.num_written, shared);
        progress.num_written = 0;
    }

    static EP_DEVICE void send(Block block, const Params& p, LaunchSession& launch, Shared& shared) {
        const CallContext& c = launch.context;
        const Warp warp;
        const int first = static_cast<int>(blockIdx.x);
        // Most likely the block that begins first; it begins with the weights instead of a token.
        const bool has_weights = first == 0;
        Sources sources = {};
        ItemCursor cursor = {};
        typename Weights::Held weights = {};
        cursor.item = first - static_cast<int>(gridDim.x);
        cursor.next = load_item(p, c, first);
        if (has_weights) weights = Weights::load(block, p, c, 0);
        launch.ask_number();
        const BankLook look = launch.look_at_banks();
        launch.take_number();
        if (!has_weights) {
            advance(warp, p, c, sources, cursor);
            load_ahead(warp, p, cursor.work, cursor.work.rows, prim::warp_idx(), cursor.ahead);
        }
        if (block.thread_rank() == 0) shared.has_failed = 0;
        const SendPhase<Tells::kInside> phase(block, launch, look);
        const bool is_ready = phase.is_ready();
        if (is_ready && phase.is_first()) Weights::send(block, p, c, phase, weights, has_weights);
        Progress progress = {};
#pragma unroll 1
        while (is_ready && cursor.item < num_items(p, c)) send_token(block, p, c, sources, cursor, progress, shared);
        if (progress.num_written > 0) publish_written(block, c, progress.num_written, shared);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
