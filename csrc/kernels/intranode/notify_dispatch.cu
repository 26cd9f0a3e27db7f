// notify_dispatch: every rank learns all counts before any data moves, so that every token's final row is known.
//
//   block 0            announce; write our counts to every peer; wait for everybody's; prefix sums; tell the host
//   blocks 1 ..        position of each token among those that go to one rank (a scan down the column of that rank)
//
// The two parts do not depend on each other. See docs/protocols/intranode.md.
#include "device/algo/call.h"
#include "device/launch.h"
#include "kernels/context.h"
#include "kernels/intranode/launchers.h"

namespace deep_ep::kernels::notify_dispatch {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::kWarpSize;
using prim::Order;
using prim::Scope;

constexpr int kMaxWarps = kMaxNotifyThreads / kWarpSize;
constexpr int kMaxScanBlocks = 8;
constexpr int kSourceBatch = 8;  // whose counts are under way at once

struct Kernel {
    using Params = NotifyDispatchParams;
    static constexpr int kMaxThreads = kMaxNotifyThreads;
    struct Shared {
        int is_ok[kMaxWarps];
        int warp_totals[kMaxWarps];
    };

    static EP_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
    static EP_DEVICE int num_warps() { return num_threads() / kWarpSize; }

    // Warp by warp, one peer at a time: our whole row of token counts, and the entries for the peer's experts.
    static EP_DEVICE void write_counts(const Params& p, const algo::Watch& watch) {
        const algo::Heap& heap = watch.heap;
        const int bank = algo::bank_of(watch.call);
        const int num_local_experts = p.num_experts / heap.num_ranks();
        for (int peer = prim::warp_idx(); peer < heap.num_ranks(); peer += num_warps()) {
            int* rank_counts = heap.rank_counts(peer, bank, heap.rank());
            for (int i = prim::lane_idx(); i < heap.num_ranks(); i += kWarpSize)
                rank_counts[i] = p.num_tokens_per_rank[i];
            int* expert_counts = heap.expert_counts(peer, bank, heap.rank());
            for (int i = prim::lane_idx(); i < num_local_experts; i += kWarpSize)
                expert_counts[i] = p.num_tokens_per_expert[peer * num_local_experts + i];
            __syncwarp();
            // Release: the counts above. Pairs with: read_counts at the peer.
            if (prim::lane_idx() == 0)
                prim::store<Order::kRelease, Scope::kSys>(heap.count_flag(peer, bank, heap.rank()), watch.call);
        }
    }

    // Each thread waits for some of the sources. True: their counts can be read, by the whole block after a barrier.
    static EP_DEVICE bool wait_for_counts(const algo::Watch& watch) {
        const algo::Heap& heap = watch.heap;
        const int bank = algo::bank_of(watch.call);
        bool is_ok = true;
        for (int source = static_cast<int>(threadIdx.x); source < heap.num_ranks(); source += num_threads())
            is_ok &= algo::wait_at_least(watch, {Stage::kCounts, source}, heap.count_flag(heap.rank(), bank, source),
                                         watch.call);
        return __all_sync(prim::kFullMask, is_ok);
    }

    // The matrix that the caller gets: a thread sums the column of one destination.
    static EP_DEVICE void accumulate_sources(const Params& p, const algo::Heap& heap, int bank) {
        const int num_ranks = heap.num_ranks();
        for (int destination = static_cast<int>(threadIdx.x); destination < num_ranks; destination += num_threads()) {
            int sum = 0;
            for (int first = 0; first < num_ranks; first += kSourceBatch) {
                int counts[kSourceBatch];
#pragma unroll
                for (int i = 0; i < kSourceBatch; ++i)
                    counts[i] = first + i < num_ranks ? heap.rank_counts(heap.rank(), bank, first + i)[destination] : 0;
#pragma unroll
                for (int i = 0; i < kSourceBatch; ++i) {
                    sum += counts[i];
                    if (first + i < num_ranks) p.rank_prefix_matrix[(first + i) * num_ranks + destination] = sum;
                }
            }
        }
    }

    static EP_DEVICE void tell_host(const Params& p, const algo::Watch& watch) {
        const algo::Heap& heap = watch.heap;
        const int bank = algo::bank_of(watch.call);
        for (int e = static_cast<int>(threadIdx.x); e < p.num_experts / heap.num_ranks(); e += num_threads()) {
            int sum = 0;
            for (int source = 0; source < heap.num_ranks(); ++source)
                sum += heap.expert_counts(heap.rank(), bank, source)[e];
            const int aligned = (sum + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
            prim::store<Order::kRelaxed, Scope::kSys>(&p.counts->num_recv_per_expert[e], aligned);
        }
        __syncthreads();  // everybody's counts and prefix sums, one thread's release
        if (threadIdx.x != 0) return;
        const int last_row = (heap.num_ranks() - 1) * heap.num_ranks();
        prim::store<Order::kRelaxed, Scope::kSys>(&p.counts->num_recv_tokens,
                                                  static_cast<int64_t>(p.rank_prefix_matrix[last_row + heap.rank()]));
        // Pairs with: Buffer::wait_counts on the host.
        prim::store<Order::kRelease, Scope::kSys>(&p.counts->ready, p.ticket);
    }

    // All threads: did every warp succeed?
    static EP_DEVICE bool all_warps(bool is_ok, Shared& shared) {
        if (prim::lane_idx() == 0) shared.is_ok[prim::warp_idx()] = is_ok;
        __syncthreads();
        bool all = true;
        for (int warp = 0; warp < num_warps(); ++warp) all &= shared.is_ok[warp] != 0;
        __syncthreads();
        return all;
    }

    static EP_DEVICE void exchange(const Params& p, const algo::Watch& watch, Shared& shared) {
        bool is_ok = true;
        if (prim::warp_idx() == 0) {
            if (p.counts != nullptr && prim::lane_idx() == 0)
                prim::store<Order::kRelaxed, Scope::kSys>(&p.counts->entered, p.ticket);
            algo::announce_start(watch);
            is_ok = algo::wait_for_banks(watch);
        }
        if (!all_warps(is_ok, shared)) return;
        write_counts(p, watch);
        if (!all_warps(wait_for_counts(watch), shared)) return;
        accumulate_sources(p, watch.heap, algo::bank_of(watch.call));
        if (p.counts != nullptr) tell_host(p, watch);
    }

    // The whole block scans one column of is_token_in_rank, a tile of as many tokens as there are threads at a time.
    static EP_DEVICE void scan_column(const Params& p, int num_ranks, int rank, Shared& shared) {
        int num_before = 0;
        for (int tile = 0; tile < p.num_tokens; tile += num_threads()) {
            const int token = tile + static_cast<int>(threadIdx.x);
            const int64_t cell = static_cast<int64_t>(token) * num_ranks + rank;
            const bool is_sent = token < p.num_tokens && p.is_token_in_rank[cell] != 0;
            const uint32_t ballot = __ballot_sync(prim::kFullMask, is_sent);
            if (prim::lane_idx() == 0) shared.warp_totals[prim::warp_idx()] = __popc(ballot);
            __syncthreads();
            int position = num_before + __popc(ballot & ((1u << prim::lane_idx()) - 1));
#pragma unroll
            for (int warp = 0; warp < kMaxWarps; ++warp) {
                if (warp >= num_warps()) break;
                if (warp < prim::warp_idx()) position += shared.warp_totals[warp];
                num_before += shared.warp_totals[warp];
            }
            if (token < p.num_tokens) p.send_head[cell] = is_sent ? position : -1;
            __syncthreads();
        }
    }

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        if (blockIdx.x == 0) {
            const algo::Watch watch{make_watch_words(p.watch), make_heap(p.heap), layout::Operation::kNotifyDispatch,
                                    algo::current_call(p.watch.local)};
            exchange(p, watch, shared);
            return;
        }
        const int num_scan_blocks = static_cast<int>(gridDim.x) - 1;
        for (int rank = static_cast<int>(blockIdx.x) - 1; rank < p.heap.num_ranks; rank += num_scan_blocks)
            scan_column(p, p.heap.num_ranks, rank, shared);
    }
};

void launch(const NotifyDispatchParams& params, dev::Stream stream) {
    const int num_scan_blocks = params.heap.num_ranks < kMaxScanBlocks ? params.heap.num_ranks : kMaxScanBlocks;
    dev::LaunchConfig config;
    config.num_blocks = 1 + num_scan_blocks;
    config.num_threads = params.num_threads;
    config.name = "deep_ep::notify_dispatch";
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::notify_dispatch
