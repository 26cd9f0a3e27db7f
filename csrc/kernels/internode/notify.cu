// The count exchange across nodes, the first launch of every call whose routing is new. One block.
//
// To the ranks of its node a rank tells its counts as inside a node. To the rail peer in each other node it puts one block with all
// counts for that node, and the peer passes them on to its neighbours as if they were its own: so every rank learns what
// comes from all ranks to those of its own node, and nothing leaves its rail. See docs/protocols/internode.md.
#include "device/algo/watch.h"
#include "device/launch.h"
#include "kernels/internode/stated_rows.h"
#include "kernels/intranode/exchange.h"
#include "kernels/params.h"

namespace deep_ep::kernels::internode::notify {
inline namespace EP_BACKEND {

// What must be equal on every rank, or rows would be read that nobody wrote.
EP_DEVICE uint64_t hash_shapes(const InternodeNotifyParams& p) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const uint64_t word :
         {static_cast<uint64_t>(p.row_bytes), static_cast<uint64_t>(p.num_topk), static_cast<uint64_t>(p.num_scales),
          static_cast<uint64_t>(p.num_experts), static_cast<uint64_t>(p.rail.window.chunk_tokens),
          static_cast<uint64_t>(p.rail.window.num_chunks)})
        hash = (hash ^ word) * 0x100000001b3u;
    return hash;
}

struct NotifyContext {
    const InternodeNotifyParams& p;
    const algo::Watch& watch;
    const RailLink& link;
    layout::CountsBlock block;

    EP_DEVICE int num_ranks() const { return watch.heap.num_ranks(); }
    EP_DEVICE int first_rank_of(int node) const { return node * num_ranks(); }
    EP_DEVICE uint64_t rank_place(int rank) const { return block.rank_counts.at(static_cast<uint64_t>(rank)); }
    EP_DEVICE uint64_t expert_place(int expert) const { return block.expert_counts.at(static_cast<uint64_t>(expert)); }
};

struct Kernel {
    using Params = InternodeNotifyParams;
    static constexpr int kMaxThreads = kMaxNotifyThreads;
    static constexpr int kMinBlocks = 1;
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        const algo::Block block;
        const algo::Watch watch = {p.watch, p.heap, layout::Operation::kNotifyDispatch,
                                   algo::current_call(p.watch.local)};
        const RailLink link(p.rail, watch);
        const NotifyContext c{p, watch, link,
                              layout::CountsBlock::make(static_cast<uint64_t>(p.heap.num_ranks),
                                                        static_cast<uint64_t>(p.num_local_experts))};
        // It ends with a barrier: whoever failed has written the abort word.
        if (!exchange(block, c) && prim::warp_idx() == 0) link.tell_failure(algo::Warp{});
    }

private:
    // False, on all threads: some wait failed, or what was told cannot be.
    static EP_DEVICE bool exchange(algo::Block block, const NotifyContext& c) {
        bool is_ok = can_be(block, c);
        if (prim::warp_idx() == 0) is_ok &= enter(algo::Warp{}, c);
        if (algo::any(block, !is_ok)) return false;
        tell_neighbours(block, c);
        stage_blocks(block, c);
        block.sync();  // all threads' staging, each poster's release
        // All blocks of this warp are posted before it waits for one of another rank.
        is_ok = post_blocks(c) && pass_blocks_on(c);
        if (algo::any(block, !is_ok)) return false;
        is_ok = fill_tables(block, c);
        if (c.p.counts == nullptr) return !algo::any(block, !is_ok);
        is_ok &= tell_expert_counts(block, c.watch, c.p.counts, c.p.num_local_experts, c.p.expert_alignment);
        // Everybody's counts and sums, one thread's release.
        if (algo::any(block, !is_ok)) return false;
        if (block.thread_rank() == 0) tell_host(c);
        return true;
    }

    // Tokens for a node are at least those for any of its ranks, and at most all of those.
    static EP_DEVICE bool can_be(algo::Block block, const NotifyContext& c) {
        bool is_ok = true;
        algo::for_each(block, c.link.num_nodes(), [&](int node) {
            if (node == c.link.node()) return;
            const int count = c.p.num_tokens_per_node[node];
            int64_t most = 0, all = 0;
            for (int i = 0; i < c.num_ranks(); ++i) {
                const int of_rank = c.p.num_tokens_per_rank[c.first_rank_of(node) + i];
                most = of_rank > most ? of_rank : most;
                all += of_rank;
            }
            if (count < most || count > all || count > c.p.num_tokens)
                is_ok = refuse_rail(c.watch, Stage::kRailRows, c.link.peer(node), static_cast<int>(most), count);
        });
        return is_ok;
    }

    static EP_DEVICE bool enter(algo::Warp warp, const NotifyContext& c) {
        if (warp.thread_rank() == 0 && c.p.counts != nullptr)
            prim::store<Order::kRelaxed, Scope::kSys>(&c.p.counts->entered, c.p.ticket);
        algo::announce_start(warp, c.watch);
        if (!c.link.announce(warp)) return false;
        if (!algo::wait_for_banks(warp, c.watch)) return false;
        return c.link.wait_for_banks(warp);
    }

    static EP_DEVICE void tell_neighbours(algo::Block block, const NotifyContext& c) {
        const int self = c.watch.heap.first_rank() + c.watch.heap.rank();
        algo::for_each(block, c.num_ranks(), [&](int rank) {
            write_rank_count(c.watch, self, rank, c.p.num_tokens_per_rank[c.watch.heap.first_rank() + rank]);
        });
        algo::for_each(block, c.num_ranks() * c.p.num_local_experts, [&](int expert) {
            write_expert_count(c.watch, self, c.p.num_local_experts, expert,
                               c.p.num_tokens_per_expert[c.watch.heap.first_rank() * c.p.num_local_experts + expert]);
        });
    }

    static EP_DEVICE void stage_blocks(algo::Block block, const NotifyContext& c) {
        const int num_experts = c.num_ranks() * c.p.num_local_experts;
        const auto word = [](uint8_t* at) { return reinterpret_cast<int*>(at); };
        c.link.for_each_peer(block, [&](int node) {
            uint8_t* at = c.link.counts_staging(node);
            *reinterpret_cast<uint64_t*>(at + c.block.shapes.offset) = hash_shapes(c.p);
            *word(at + c.block.num_tokens.offset) = c.p.num_tokens_per_node[node];
            *word(at + c.block.chunk_tokens.offset) = c.p.rail.window.chunk_tokens;
        });
        algo::for_each(block, c.link.num_nodes() * c.num_ranks(), [&](int rank) {
            const int node = rank / c.num_ranks();
            if (node != c.link.node())
                *word(c.link.counts_staging(node) + c.rank_place(rank % c.num_ranks())) = c.p.num_tokens_per_rank[rank];
        });
        algo::for_each(block, c.link.num_nodes() * num_experts, [&](int expert) {
            const int node = expert / num_experts;
            if (node != c.link.node())
                *word(c.link.counts_staging(node) + c.expert_place(expert % num_experts)) =
                    c.p.num_tokens_per_expert[expert];
        });
    }

    // A warp for each node.
    template <class Work> static EP_DEVICE bool by_warps(const NotifyContext& c, const Work& work) {
        bool is_ok = true;
        for (int node = prim::warp_idx(); node < c.link.num_nodes(); node += algo::Block::num_warps())
            if (node != c.link.node()) is_ok &= work(algo::Warp{}, node);
        return is_ok;
    }

    static EP_DEVICE bool post_blocks(const NotifyContext& c) {
        return by_warps(c, [&](algo::Warp warp, int node) { return c.link.post_counts(warp, node, c.block.bytes); });
    }

    static EP_DEVICE bool pass_blocks_on(const NotifyContext& c) {
        return by_warps(c, [&](algo::Warp warp, int node) { return pass_on(warp, c, node); });
    }

    static EP_DEVICE bool pass_on(algo::Warp warp, const NotifyContext& c, int node) {
        const bool is_here = warp.thread_rank() != 0 || c.link.wait(Stage::kRailCounts, node, c.link.counts_flag(node));
        if (!algo::all(warp, is_here)) return false;
        const uint8_t* at = c.link.counts(node);
        const auto word = [&](uint64_t place) { return *reinterpret_cast<const int*>(at + place); };
        const uint64_t shapes = *reinterpret_cast<const uint64_t*>(at + c.block.shapes.offset);
        if (shapes != hash_shapes(c.p)) {
            if (warp.thread_rank() == 0)
                algo::fail(c.watch, layout::FailureKind::kBadInput, c.link.site(Stage::kRailShapes, node),
                           hash_shapes(c.p), shapes, 0);
            return false;
        }
        const int source = c.link.peer(node);
        algo::for_each(warp, c.num_ranks(),
                       [&](int rank) { write_rank_count(c.watch, source, rank, word(c.rank_place(rank))); });
        algo::for_each(warp, c.num_ranks() * c.p.num_local_experts, [&](int expert) {
            write_expert_count(c.watch, source, c.p.num_local_experts, expert, word(c.expert_place(expert)));
        });
        return true;
    }

    static EP_DEVICE bool fill_tables(algo::Block block, const NotifyContext& c) {
        const int self = c.watch.heap.rank();
        bool is_ok = true;
        algo::for_each(block, c.num_ranks(), [&](int rank) {
            is_ok &= accumulate_rank_counts(c.watch, rank, [&](int source, int sum) {
                c.p.rank_prefix_matrix[source * c.num_ranks() + rank] = sum;
                if (rank == self) c.p.recv_rank_prefix[source] = sum;
            });
        });
        if (block.thread_rank() == 0) {
            int sum = 0;
            for (int node = 0; node < c.link.num_nodes(); ++node) {
                if (node != c.link.node())
                    sum += *reinterpret_cast<const int*>(c.link.counts(node) + c.block.num_tokens.offset);
                c.p.rail_prefix[node] = sum;
            }
        }
        return is_ok;
    }

    static EP_DEVICE void tell_host(const NotifyContext& c) {
        prim::store<Order::kRelaxed, Scope::kSys>(&c.p.counts->num_rail_tokens,
                                                  static_cast<int64_t>(c.p.rail_prefix[c.link.num_nodes() - 1]));
        tell_num_rows(c.p.counts, c.p.recv_rank_prefix[c.watch.heap.num_sources() - 1], c.p.ticket);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode::notify

void deep_ep::kernels::launch(const InternodeNotifyParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_threads = params.num_threads;
    config.name = "deep_ep::notify_dispatch_internode";
    dev::launch<internode::notify::Kernel>(config, stream, params);
}
