// Far ranks: those of other nodes, as a low-latency kernel reaches them, through the rail window. In a kernel of one node there are
// none, and all of this is left out.
//
// Messages, window and orderings: docs/protocols/low_latency_nodes.md.
#pragma once

#include "device/algo/group.h"
#include "device/algo/watch.h"
#include "kernels/low_latency/reach.h"
#include "kernels/params_low_latency.h"
#include "rail/rail.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::Order;
using prim::Scope;

// Ranks are those of the group everywhere in these kernels. The heap counts those of its node.
EP_DEVICE int first_near(const algo::Watch& watch) { return kAcrossNodes ? watch.heap.first_rank() : 0; }
EP_DEVICE bool is_far(const algo::Watch& watch, int rank) {
    return kAcrossNodes &&
           static_cast<uint32_t>(rank - watch.heap.first_rank()) >= static_cast<uint32_t>(watch.heap.num_ranks());
}
// Of a wait for any rank: the failure record adds the first of the node.
EP_DEVICE algo::WaitSite site_of(const algo::Watch& watch, Stage stage, int rank) {
    return {stage, rank - first_near(watch)};
}

class FarRanks {
public:
    EP_DEVICE FarRanks(const LowLatencyCall& call, const algo::Watch& watch)
        : plan_(call.rail), watch_(watch), rail_(call.rail.params) {}

    EP_DEVICE int count() const { return watch_.heap.num_sources() - watch_.heap.num_ranks(); }
    EP_DEVICE int rank(int idx) const { return idx < watch_.heap.first_rank() ? idx : idx + watch_.heap.num_ranks(); }
    // Its place among the far ranks of `owner`.
    EP_DEVICE uint64_t index(int rank, int owner) const {
        const int num_near = watch_.heap.num_ranks();
        return static_cast<uint64_t>(rank < plan_.topology.node_of(owner) * num_near ? rank : rank - num_near);
    }
    EP_DEVICE uint64_t index(int rank) const { return index(rank, self()); }

    template <class T> EP_DEVICE T* at(uint64_t offset) const { return rail::at<T>(rail_, offset); }

    // Does one copy of a row serve all ranks of a node?
    EP_DEVICE bool shares_rows() const { return plan_.node_windows != nullptr; }
    // To whom a row for the far `rank` is put.
    EP_DEVICE int holder(int rank) const {
        return shares_rows() ? plan_.topology.rail_peer(plan_.topology.node_of(rank)) : rank;
    }
    // A place in the window to which the far `source` puts rows for this rank.
    template <class T> EP_DEVICE T* at_holder(int source, uint64_t offset) const {
        if (!shares_rows()) return at<T>(offset);
        return reinterpret_cast<T*>(plan_.node_windows[plan_.topology.index_of(source)] + offset);
    }

    // Words that `source` writes in the window of whoever it writes to.
    EP_DEVICE uint64_t received(int bank, int source) const { return plan_.control.received.at(of_bank(bank, source)); }
    EP_DEVICE uint64_t table_full(int bank, int source) const {
        return plan_.control.table_full.at(of_bank(bank, source));
    }
    EP_DEVICE uint64_t cleaned(int source) const { return plan_.control.cleaned.at(static_cast<uint64_t>(source)); }
    EP_DEVICE uint64_t entered(int source) const { return plan_.control.entered.at(static_cast<uint64_t>(source)); }
    EP_DEVICE uint64_t token_full(int bank, int source, int token) const {
        return plan_.control.token_full.at(of_bank(bank, source) * layout::kMaxLowLatencyTokens +
                                           static_cast<uint64_t>(token));
    }
    EP_DEVICE uint64_t entry_full(int bank, int entry) const {
        return plan_.control.entry_full.at(static_cast<uint64_t>(bank) * (layout::kMaxLowLatencyPackets / 2) +
                                           static_cast<uint64_t>(entry));
    }
    // `row`: a bank, or one of LowLatencyRail's others.
    EP_DEVICE uint64_t* told(int row, int peer) const { return &plan_.told[of_bank(row, peer)]; }

    EP_DEVICE uint64_t receive(int bank) const { return plan_.region.receive(static_cast<uint64_t>(bank)); }
    EP_DEVICE uint64_t staging(int bank) const { return plan_.region.staging(static_cast<uint64_t>(bank)); }
    EP_DEVICE uint64_t source_bytes() const { return plan_.region.source_bytes; }
    EP_DEVICE uint64_t staging_bytes() const { return plan_.region.staging_bytes; }

    // False: the call is aborted.
    EP_DEVICE bool put(algo::Warp warp, int peer, const rail::Copy& copy, const rail::Flag& flag) const {
        warp.expect();
        return rail::put(rail_, peer, copy, flag, Room{watch_, peer});
    }
    // One thread.
    EP_DEVICE bool set(int peer, const rail::Flag& flag) const {
        return rail::set(rail_, peer, flag, Room{watch_, peer});
    }
    EP_DEVICE bool add(int peer, uint64_t counter, uint64_t n) const {
        return rail::add(rail_, peer, counter, n, Room{watch_, peer});
    }
    // One thread that has seen the value, in a window of this node; see rail.h.
    EP_DEVICE void confirm(const uint64_t* word, uint64_t value) const {
        const auto offset = static_cast<uint64_t>(reinterpret_cast<const uint8_t*>(word) - at<const uint8_t>(0));
        if (offset < plan_.control.end)
            rail::confirm(rail_, {offset, value});
        else
            rail::confirm_at(rail_, word, value);
    }

    // What a rail peer's kernels or host have set when it gave up; 0: nobody has.
    EP_DEVICE uint64_t abort_code() const {
        const int num_nodes = plan_.topology.num_nodes();
        uint64_t code = 0;
#pragma unroll 1
        for (int i = 0; i < 2 * num_nodes && code == 0; ++i)
            code =
                prim::load<Order::kRelaxed, Scope::kSys>(at<const uint64_t>(plan_.abort.at(static_cast<uint64_t>(i))));
        return code;
    }
    // One warp: tells the rail peers, if this rank has given up and nobody has told them.
    EP_DEVICE void tell_failure(algo::Warp warp) const {
        const uint64_t code = algo::claim_failure(warp, watch_);
        if (code == 0) return;
        algo::for_each(warp, plan_.topology.num_nodes(), [&](int node) {
            if (node == plan_.topology.node()) return;
            const uint64_t flag = plan_.abort.at(static_cast<uint64_t>(plan_.topology.node()));
            static_cast<void>(rail::set(rail_, plan_.topology.rail_peer(node), {flag, code}, algo::Patience{}));
        });
    }

private:
    // What the engine waits with for room.
    struct Room {
        const algo::Watch& watch;
        int peer;

        template <class Look> EP_DEVICE bool operator()(uint64_t expected, const Look& look) const {
            return algo::wait_until(watch, {Stage::kRailRoom, peer}, expected, look);
        }
    };

    EP_DEVICE int self() const { return plan_.topology.rank; }
    EP_DEVICE uint64_t of_bank(int bank, int source) const {
        return static_cast<uint64_t>(bank * watch_.heap.num_sources() + source);
    }

    const LowLatencyRail& plan_;
    const algo::Watch& watch_;
    const rail::Rail rail_;
};

// One thread that has seen `value` in a word that `peer` writes here, by an acquire.
EP_DEVICE void confirm_far(const LowLatencyCall& call, const algo::Watch& watch, int peer, const uint64_t* word,
                           uint64_t value) {
    if constexpr (kAcrossNodes)
        if (is_far(watch, peer)) FarRanks(call, watch).confirm(word, value);
}

// Beside what a thread waits for from a far rank: now and then a look at whether a rank of another node has given up.
struct FarAbort {
    uint64_t code = 0;
    uint32_t polls = 0;

    EP_DEVICE bool look(const LowLatencyCall& call, const algo::Watch& watch, int peer) {
        if constexpr (kAcrossNodes)
            if (is_far(watch, peer) && ++polls % prim::polls_per_check() == 0)
                code = FarRanks(call, watch).abort_code();
        return code != 0;
    }
    // After the wait. True: that is why it has ended, and the call fails.
    EP_DEVICE bool has_ended(const algo::Watch& watch, const algo::WaitSite& site, uint64_t expected) const {
        if (!kAcrossNodes || code == 0) return false;
        algo::fail(watch, layout::FailureKind::kAborted, site, expected, code, 0);
        return true;
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
