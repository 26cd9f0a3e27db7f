// What dispatch is made of, inside a node and, for the most part, across nodes: positions of tokens, how a block begins, where rows
// go and what goes along with them, and the receiving role.
#pragma once

#include "device/algo/group.h"
#include "device/algo/ring.h"
#include "device/algo/watch.h"
#include "kernels/intranode/call_session.h"
#include "kernels/intranode/exchange.h"
#include "kernels/params.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// -- Positions of tokens among those that go to one rank -------------------------------------------------------------
// A scan down the column of that rank in is_token_in_rank. (Across nodes: also among those that go to one node.)
//
// Every block scans everything, because waiting for what other blocks have scanned takes longer, and works out the positions
// of the tokens that it sends itself: block b sends those with token % gridDim.x == b.

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

namespace deep_ep::kernels::dispatch {
inline namespace EP_BACKEND {

// -- How a block begins ----------------------------------------------------------------------------------------------
// It learns where rows go and stand, from the matrix that is known already or by the count exchange, and tells the peers what they
// need. Nothing here waits for what a peer does only after waiting for this rank.

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Vec16;

// Of the number of rows that come, as the host has guessed it.
enum class Guess : int { kEnough, kShort, kUnknown };

// Shared memory of a block.
struct DispatchState {
    CallState call;
    uint32_t is_unlearned;  // not zero: where some rank's rows stand is not known, or they have no room
    Guess guess;
    // Input that cannot be, -1: none. Noted where it is found, for refuse_input: calls there would cost registers.
    int bad_column;  // of the prefix matrix
    int bad_token;   // with an expert id out of range
    RowTable rows;
    ScanTile tiles[2];
};
static_assert(sizeof(DispatchState) <= kMaxDispatchState);

// One warp of each block, when the call is entered.
EP_DEVICE bool open_call(algo::Warp warp, const DispatchParams& p, const algo::Watch& watch) {
    if (p.counts != nullptr && blockIdx.x == 0 && warp.thread_rank() == 0)
        prim::store<prim::Order::kRelaxed, prim::Scope::kSys>(&p.counts->entered, p.ticket);
    if (p.may_lend && p.counts == nullptr && blockIdx.x == 0) algo::state_loan(warp, watch, p.loan);
    return true;
}

// One warp of one block, another than that of open_call() where there are two, since its releases take long. The load of the
// counts is under way while it looks at the banks.
EP_DEVICE void tell_rank_counts(algo::Warp warp, const DispatchParams& p, const algo::Watch& watch) {
    const int lane = warp.thread_rank();
    const int count = lane < watch.heap.num_ranks() ? p.num_tokens_per_rank[lane] : 0;
    if (!algo::wait_for_banks(warp, watch)) return;
    if (lane < watch.heap.num_ranks()) write_rank_count(watch, watch.heap.rank(), lane, count);
    for (int rank = lane + kWarpSize; rank < watch.heap.num_ranks(); rank += kWarpSize)
        write_rank_count(watch, watch.heap.rank(), rank, p.num_tokens_per_rank[rank]);
}

constexpr int kUnsound = 0x7fffffff;  // no number of rows is as large

// Where rows from and to `rank` stand, and the total that goes to it; kUnsound where some source has less than
// none, so that its rows would stand among those of others. False: a wait failed.
EP_DEVICE bool learn_rows(const DispatchParams& p, const algo::Watch& watch, int rank, RowTable& rows, int& total) {
    const int num_ranks = watch.heap.num_ranks();
    auto take = [&](int source, int sum) {
        rows.take(watch.heap.rank(), source, rank, sum);
        total = sum >= total ? sum : kUnsound;
    };
    if (p.num_tokens_per_rank == nullptr) {
        for (int source = 0; source < num_ranks; ++source)
            take(source, p.rank_prefix_matrix[source * num_ranks + rank]);
        return true;
    }
    return accumulate_rank_counts(watch, rank, [&](int source, int sum) {
        take(source, sum);
        if (blockIdx.x == 0) p.rank_prefix_matrix[source * num_ranks + rank] = sum;
    });
}

EP_DEVICE bool is_sound(int rank, int total, DispatchState& state) {
    if (total != kUnsound) return true;
    prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(&state.bad_column, rank);
    return false;
}

// A peer lends too little: it finds that out by itself, and the error that it reports ends this wait.
EP_DEVICE_COLD bool wait_for_refusal(algo::Watch watch, uint64_t num_rows_held) {
    return algo::wait_until(watch, {Stage::kCapacity, watch.heap.rank()}, num_rows_held,
                            [](uint64_t&) { return false; });
}

// `rank` has room for its rows. Where peers write into its tensors they have to know before they begin.
EP_DEVICE bool has_room_at(const DispatchParams& p, const algo::Watch& watch, int rank, int num_rows) {
    const int self = watch.heap.rank();
    if (rank == self) return has_room(watch, p.num_recv_rows, num_rows);
    if (!p.may_lend) return true;
    const layout::Loan& loan = algo::loan_of(watch, rank);
    if (loan.x == 0 || static_cast<uint64_t>(num_rows) <= loan.num_rows) return true;
    return wait_for_refusal(watch, loan.num_rows);
}

// Some thread of the block for every rank.
EP_DEVICE bool learn_of(const DispatchParams& p, const algo::Watch& watch, int rank, DispatchState& state) {
    int total = 0;
    // The rows first: they are there already, or come before the loan does.
    return learn_rows(p, watch, rank, state.rows, total) && is_sound(rank, total, state) &&
           (!p.may_lend || algo::wait_for_loan(watch, rank)) && has_room_at(p, watch, rank, total);
}

// Where the host has guessed how many rows come: whether they fit. Only then are the outputs lent; otherwise the host lends
// others in the same call. False: a wait failed.
EP_DEVICE bool check_guess(algo::Block block, const DispatchParams& p, const algo::Watch& watch, DispatchState& state) {
    block.expect();
    if (block.thread_rank() == 0) {
        int num_rows = 0;
        const bool is_known = accumulate_rank_counts(watch, watch.heap.rank(), [&](int, int sum) { num_rows = sum; });
        state.guess = !is_known ? Guess::kUnknown : num_rows > p.num_recv_rows ? Guess::kShort : Guess::kEnough;
    }
    block.sync();
    // Not is_unlearned: threads that go on may set it while others have not looked yet.
    if (state.guess == Guess::kUnknown) return false;
    if (state.guess == Guess::kEnough && p.may_lend && blockIdx.x == 0 && prim::warp_idx() == 0)
        algo::state_loan(algo::Warp{}, watch, p.loan);
    return true;
}

// One warp of one block, where the host waits.
EP_DEVICE void tell_host(algo::Warp warp, const DispatchParams& p, const algo::Watch& watch, const RowTable& rows) {
    const bool is_told = tell_expert_counts(warp, watch, p.counts, p.num_local_experts, p.expert_alignment);
    // All lanes' counts, one lane's release.
    if (algo::all(warp, is_told) && warp.thread_rank() == 0)
        tell_num_rows(p.counts, rows.num_rows(watch.heap.num_ranks()), p.ticket);
}

EP_DEVICE algo::Watch make_watch(const DispatchParams& p, uint64_t call) {
    return {p.watch, p.heap, layout::Operation::kDispatch, call};
}

EP_DEVICE bool is_expert(const DispatchParams& p, int64_t id) { return id >= -1 && id < p.num_experts; }

// The first source that has less than no rows for bad_column.
EP_DEVICE void refuse_column(const DispatchParams& p, const algo::Watch& watch, int rank) {
    const bool exchanges = p.num_tokens_per_rank != nullptr;
    int source = 0, before = 0, sum = 0;
    for (;; ++source) {
        if (exchanges)
            sum = before + layout::count_in(prim::load<prim::Order::kRelaxed, prim::Scope::kSys>(
                               watch.heap.rank_count(p.heap.rank, algo::bank_of(watch.call), source, rank)));
        else
            sum = p.rank_prefix_matrix[source * p.heap.num_ranks + rank];
        if (sum < before) break;
        before = sum;
    }
    refuse_rows(watch, source, rank, before, sum, sum);
}

EP_DEVICE void refuse_expert(const DispatchParams& p, const algo::Watch& watch, int token) {
    int64_t id = -1;
    for (int k = 0; is_expert(p, id); ++k)
        id = algo::load_expert_id(p.topk_idx, p.idx_bytes, static_cast<int64_t>(token) * p.num_topk + k);
    algo::fail(watch, layout::FailureKind::kBadInput, {Stage::kInput, token}, static_cast<uint64_t>(p.num_experts),
               static_cast<uint64_t>(id), 0);
}

// Reports what has been noted.
EP_DEVICE_COLD void refuse_input(const DispatchParams* p, const DispatchState* state) {
    const algo::Watch watch = make_watch(*p, state->call.number);
    if (state->bad_column >= 0)
        refuse_column(*p, watch, state->bad_column);
    else
        refuse_expert(*p, watch, state->bad_token);
}

// After the warp's work, which ends with a barrier of the warp: whether no input was noted that cannot be.
EP_DEVICE bool input_can_be(algo::Warp warp, const DispatchParams& p, const DispatchState& state) {
    using prim::Order;
    using prim::Scope;
    if (prim::load<Order::kRelaxed, Scope::kCta>(&state.bad_column) < 0 &&
        prim::load<Order::kRelaxed, Scope::kCta>(&state.bad_token) < 0)
        return true;
    if (warp.thread_rank() == 0) refuse_input(&p, &state);
    return false;
}

// What needs no answer of a peer, beside the warp that enters the call.
EP_DEVICE void prepare(algo::Block block, const DispatchParams& p, const algo::Watch& watch, DispatchState& state) {
    if (block.thread_rank() == 0) {
        state.is_unlearned = 0;
        state.guess = Guess::kEnough;
        state.bad_column = -1;
        state.bad_token = -1;
    }
    if (p.num_tokens_per_rank != nullptr && blockIdx.x == 0 && prim::warp_idx() == (block.num_warps() > 1 ? 1 : 0))
        tell_rank_counts(algo::Warp{}, p, watch);
    if (p.is_token_in_rank != nullptr)
        scan_columns(block, TokenScan{p.is_token_in_rank, p.send_head, p.num_tokens, watch.heap.num_ranks()},
                     state.tiles);
}

EP_DEVICE Begun learn(algo::Block block, const DispatchParams& p, const algo::Watch& watch, DispatchState& state) {
    // Nobody waits for these here, but the host of a peer may.
    if (p.num_tokens_per_rank != nullptr && blockIdx.x == 0)
        write_expert_counts(block, watch, p.num_tokens_per_expert, p.num_local_experts);
    if (p.counts != nullptr && !check_guess(block, p, watch, state)) return Begun::kFailed;
    const bool is_short = state.guess == Guess::kShort;
    // The last threads: the first ones are still busy with that.
    for (int rank = block.size() - 1 - block.thread_rank(); rank < watch.heap.num_ranks(); rank += block.size()) {
        int total = 0;
        // A peer that is short as well lends only when this kernel has ended.
        if (!(is_short ? learn_rows(p, watch, rank, state.rows, total) && is_sound(rank, total, state)
                       : learn_of(p, watch, rank, state)))
            prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(&state.is_unlearned, 1u);
    }
    block.sync();
    if (state.is_unlearned != 0) return Begun::kFailed;
    if (p.counts != nullptr && blockIdx.x == 0 && prim::warp_idx() == block.num_warps() - 1)
        tell_host(algo::Warp{}, p, make_watch(p, state.call.number), state.rows);
    return is_short ? Begun::kUnfinished : Begun::kReady;
}

// -- Where the rows of a rank go, and what goes along with them -------------------------------------------------------

constexpr int kUnroll = 7;  // 7168 bytes: two rounds; 14336: four

struct DispatchContext {
    const DispatchParams& p;
    const algo::Watch& watch;
    const algo::Ring& ring;
    const RowTable& rows;
    int* bad_token;  // shared memory: see DispatchState
};

// What travels is the expert's global id: the same bytes to every destination. get_dispatch_layout has refused an id
// that is out of range, so one that is found here has changed since.
template <class Context> EP_DEVICE int checked_expert(const Context& c, int token, int64_t id) {
    if (is_expert(c.p, id)) return static_cast<int>(id);
    prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(c.bad_token, token);
    return -1;
}

// The expert as `rank` counts its own, or -1.
EP_DEVICE int local_expert(const DispatchParams& p, int id, int rank) {
    const int local = id - (p.heap.first_rank + rank) * p.num_local_experts;
    return local >= 0 && local < p.num_local_experts ? local : -1;
}

EP_DEVICE int64_t input_expert(const DispatchParams& p, int token, int k) {
    return algo::load_expert_id(p.topk_idx, p.idx_bytes, static_cast<int64_t>(token) * p.num_topk + k);
}

EP_DEVICE float input_weight(const DispatchParams& p, int token, int k) {
    return p.topk_weights[static_cast<int64_t>(token) * p.num_topk + k];
}

EP_DEVICE uint32_t input_scale(const DispatchParams& p, int token, int i) {
    return p.scales[token * p.scale_stride_token + i * p.scale_stride_scale];
}

// The outputs of a rank that are not rows; null: it wants none.
struct MetadataOutputs {
    uint32_t* scales;
    void* topk_idx;
    float* topk_weights;
    int* src_idx;
};

// Our own, or those that `rank` lends us.
template <class Context> EP_DEVICE MetadataOutputs metadata_outputs(const Context& c, int rank) {
    const DispatchParams& p = c.p;
    if (rank == c.watch.heap.rank()) return {p.recv_scales, p.recv_topk_idx, p.recv_topk_weights, p.recv_src_idx};
    const layout::Loan& loan = algo::loan_of(c.watch, rank);
    auto lent = [&](uint64_t offset) { return offset == 0 ? nullptr : c.watch.heap.at(rank, offset); };
    return {reinterpret_cast<uint32_t*>(lent(loan.scales)), lent(loan.topk_idx),
            reinterpret_cast<float*>(lent(loan.topk_weights)), reinterpret_cast<int*>(lent(loan.src_idx))};
}

// Where this lane's rank wants its rows, if they go straight there; null: into slots, or nowhere.
template <class Context> EP_DEVICE uint8_t* direct_rows(const Context& c, int rank) {
    const int self = c.watch.heap.rank();
    if (rank == self) return c.p.recv_x;
    if (!c.p.may_lend || rank >= c.watch.heap.num_ranks()) return nullptr;
    const uint64_t offset = algo::loan_of(c.watch, rank).x;
    return offset == 0 ? nullptr : c.watch.heap.at(rank, offset);
}

// The metadata of a token is a type with src_idx(), expert(k), weight(k) and scale(i): experts as all ranks count them. This is what
// stands in a slot: of the heap's windows, of the rail's, or the image of one in shared memory.
class SlotMetadata {
public:
    EP_DEVICE SlotMetadata(const uint8_t* slot, const layout::SlotLayout& at)
        : experts_(reinterpret_cast<const int*>(slot + at.topk_idx.offset)),
          weights_(reinterpret_cast<const float*>(slot + at.topk_weights.offset)),
          scales_(reinterpret_cast<const uint32_t*>(slot + at.scales.offset)),
          src_idx_(reinterpret_cast<const int*>(slot + at.src_idx.offset)) {}

    EP_DEVICE int src_idx() const { return *src_idx_; }
    EP_DEVICE int expert(int k) const { return experts_[k]; }
    EP_DEVICE float weight(int k) const { return weights_[k]; }
    EP_DEVICE uint32_t scale(int i) const { return scales_[i]; }

private:
    const int* experts_;
    const float* weights_;
    const uint32_t* scales_;
    const int* src_idx_;
};

// That of one of our tokens, where the caller has it. Its ids are yet to be checked.
template <class Context> struct InputMetadata {
    const Context& c;
    int token;

    EP_DEVICE int src_idx() const { return token; }
    EP_DEVICE int64_t id(int k) const { return input_expert(c.p, token, k); }
    EP_DEVICE int checked(int64_t id) const { return checked_expert(c, token, id); }
    EP_DEVICE float weight(int k) const { return input_weight(c.p, token, k); }
    EP_DEVICE uint32_t scale(int i) const { return input_scale(c.p, token, i); }
};

// A lane's first entry and its first two scales.
struct HeldWords {
    int expert;
    float weight;
    uint32_t scale[2];
};

// All loads are under way before the id is looked at.
template <class Source> EP_DEVICE HeldWords load_words(algo::Warp warp, const DispatchParams& p, const Source& source) {
    const int lane = warp.thread_rank();
    const bool has_entry = lane < p.num_topk;
    const auto id = has_entry ? source.id(lane) : -1;
    const float weight = has_entry ? source.weight(lane) : 0.0f;
    const uint32_t first = lane < p.num_scales ? source.scale(lane) : 0;
    const uint32_t second = lane + kWarpSize < p.num_scales ? source.scale(lane + kWarpSize) : 0;
    return {has_entry ? source.checked(id) : -1, weight, {first, second}};
}

// Metadata in registers, as far as they reach: loaded before the row is sent, so that one trip to memory serves both, and every rank
// that gets the token. What is beyond is loaded when it is needed. `k`, `i`: of those that are this lane's in a for_each() of the warp.
template <class Source> class HeldMetadata {
public:
    EP_DEVICE HeldMetadata(const Source& source, const HeldWords& words)
        : source_(source), words_(words), src_idx_(source.src_idx()) {}

    EP_DEVICE int src_idx() const { return src_idx_; }
    EP_DEVICE int expert(int k) const { return k < kWarpSize ? words_.expert : source_.checked(source_.id(k)); }
    EP_DEVICE float weight(int k) const { return k < kWarpSize ? words_.weight : source_.weight(k); }
    EP_DEVICE uint32_t scale(int i) const {
        return i < kWarpSize ? words_.scale[0] : i < 2 * kWarpSize ? words_.scale[1] : source_.scale(i);
    }

private:
    const Source& source_;
    HeldWords words_;
    int src_idx_;
};

// Everything of a slot but its row.
template <class Metadata>
EP_DEVICE void put_metadata(algo::Warp warp, const DispatchParams& p, const layout::SlotLayout& at, uint8_t* slot,
                            const Metadata& metadata) {
    if (warp.thread_rank() == 0) *reinterpret_cast<int*>(slot + at.src_idx.offset) = metadata.src_idx();
    algo::for_each(warp, p.num_topk, [&](int k) {
        *reinterpret_cast<int*>(slot + at.topk_idx.at(k)) = metadata.expert(k);
        *reinterpret_cast<float*>(slot + at.topk_weights.at(k)) = metadata.weight(k);
    });
    algo::for_each(warp, p.num_scales,
                   [&](int i) { *reinterpret_cast<uint32_t*>(slot + at.scales.at(i)) = metadata.scale(i); });
}

// Everything of the final row at `rank` but the row itself.
template <class Context, class Metadata>
EP_DEVICE void deliver_metadata(algo::Warp warp, const Context& c, int rank, int64_t row, const Metadata& metadata) {
    warp.expect();
    const DispatchParams& p = c.p;
    const MetadataOutputs out = metadata_outputs(c, rank);
    const int src_idx = metadata.src_idx();
    if (warp.thread_rank() == 0 && out.src_idx != nullptr) out.src_idx[row] = src_idx;
    for (int k = warp.thread_rank(); k < p.num_topk; k += warp.size()) {
        const int id = local_expert(p, metadata.expert(k), rank);
        algo::store_expert_id(out.topk_idx, p.idx_bytes, row * p.num_topk + k, id);
        out.topk_weights[row * p.num_topk + k] = id >= 0 ? metadata.weight(k) : 0.0f;
    }
    for (int i = warp.thread_rank(); i < p.num_scales; i += warp.size()) {
        out.scales[row * p.num_scales + i] = metadata.scale(i);
    }
}

// -- The receiving role, of a rank that does not lend its outputs: slots to final rows, one stream of rows for each source

// Row `position` of the `num_rows` of a source to final row `row`.
template <class Context>
EP_DEVICE void receive_row(algo::Warp warp, const Context& c, const algo::Port& port, int position, int num_rows,
                           int64_t row) {
    const DispatchParams& p = c.p;
    const uint8_t* slot = port.slot(position);
    algo::copy_row<algo::SourceKind::kFromPeer, kUnroll>(warp, reinterpret_cast<Vec16*>(p.recv_x + row * p.row_bytes),
                                                         reinterpret_cast<const Vec16*>(slot),
                                                         static_cast<int>(p.row_bytes / sizeof(Vec16)));
    deliver_metadata(warp, c, c.watch.heap.rank(), row, SlotMetadata{slot, p.slot});
    warp.sync();  // every lane's reads, one lane's release
    if (warp.thread_rank() == 0) port.give_back(position, num_rows);
}

EP_DEVICE bool receive(algo::Warp warp, const DispatchContext& c, int warp_idx, int num_warps) {
    const int self = c.watch.heap.rank();
    const algo::RowStream stream = algo::deal_stream(warp, warp_idx, num_warps, self, c.watch.heap.num_ranks(),
                                                     [&](int source) { return c.rows.num_rows_from(source); });
    return algo::serve_streams(
        warp, c.watch, Stage::kRow, stream,
        [&](int source, int position) { return c.ring.from(source).row_is_here(position); },
        [&](int source, int position, int count) {
            receive_row(warp, c, c.ring.from(source), position, count, c.rows.first_row_from(source) + position);
        });
}

// -- Outputs that no row has come for --------------------------------------------------------------------------------

// Rows behind the `num_rows` that come must not look like tokens.
EP_DEVICE void mark_unused_rows(algo::Grid grid, const DispatchParams& p, int num_rows) {
    const int64_t begin = static_cast<int64_t>(num_rows) * p.num_topk;
    const int64_t end = static_cast<int64_t>(p.num_recv_rows) * p.num_topk;
    algo::for_each(grid, end - begin, [&](int64_t i) {
        algo::store_expert_id(p.recv_topk_idx, p.idx_bytes, begin + i, -1);
        p.recv_topk_weights[begin + i] = 0.0f;
    });
}

// All of them, of a call that has failed.
EP_DEVICE void void_dispatch(algo::Block block, const DispatchParams& p) {
    const int64_t num_rows = p.num_recv_rows;
    const int64_t num_entries = num_rows * p.num_topk;
    algo::void_output(block, p.recv_x, num_rows * p.row_bytes);
    algo::void_output(block, p.recv_scales, num_rows * p.num_scales * 4);
    algo::void_output(block, p.recv_topk_idx, num_entries * p.idx_bytes);
    algo::void_output(block, p.recv_topk_weights, num_entries * 4);
    algo::void_output(block, p.recv_src_idx, num_rows * 4);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::dispatch
