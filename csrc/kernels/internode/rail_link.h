// The rail as the kernels of one call use it: this rank's window, its peers in other nodes, and the chunks of tokens that go to
// and fro. Waits here have the deadlines and records of all others, and give up when the peer has given up.
//
// Messages, flags and orderings: docs/protocols/internode.md.
#pragma once

#include "device/algo/watch.h"
#include "kernels/params_internode.h"
#include "rail/rail.h"

namespace deep_ep::kernels::internode {
inline namespace EP_BACKEND {

using layout::Stage;
using prim::kFullMask;
using prim::kWarpSize;
using prim::Order;
using prim::Scope;

// What ends a wait on a rank of another node beside what it waits for: one look at a word of ours.
struct RailWord {
    uint64_t offset;
    uint64_t expected;
};

class RailLink {
public:
    EP_DEVICE RailLink(const RailPlan& plan, const algo::Watch& watch)
        : plan_(plan),
          watch_(watch),
          rail_(plan.params),
          node_(plan.topology.node()),
          bank_(algo::bank_of(watch.call)) {}

    EP_DEVICE const algo::Watch& watch() const { return watch_; }
    EP_DEVICE int node() const { return node_; }
    EP_DEVICE int num_nodes() const { return plan_.topology.num_nodes(); }
    EP_DEVICE int peer(int node) const { return plan_.topology.rail_peer(node); }
    EP_DEVICE bool is_peer(int node) const { return node != node_ && node < num_nodes(); }
    EP_DEVICE algo::WaitSite site(Stage stage, int node) const { return {stage, peer(node)}; }

    // -- Words that the peer in `node` writes here; what we write there has our own node in its place ------------------------

    EP_DEVICE RailWord ended(int node, uint64_t num_calls) const { return {control().ended.at(node), num_calls}; }
    EP_DEVICE RailWord counts_flag(int node) const { return {control().counts_flags.at(of_bank(node)), watch_.call}; }
    EP_DEVICE RailWord arrived(int node, int chunk) const {
        return {control().arrived.at(chunk_word(node, chunk)), tag(chunk)};
    }
    EP_DEVICE RailWord taken(int node, int chunk) const {
        return {control().taken.at(chunk_word(node, chunk)), tag(chunk)};
    }

    // One thread. It has come: what it guards may be read, by other lanes after a sync().
    EP_DEVICE bool is_here(const RailWord& word, uint64_t& seen) const {
        seen = prim::load<Order::kRelaxed, Scope::kSys>(rail::at<const uint64_t>(rail_, word.offset));
        const bool has_come = seen >= word.expected;
        if (!has_come) return false;
        rail::confirm(rail_, {word.offset, seen});
        return true;
    }
    // One thread waits for that. False: the wait failed.
    EP_DEVICE bool wait(Stage stage, int node, const RailWord& word) const {
        uint64_t code = 0;
        uint32_t polls = 0;
        const bool has_ended = algo::wait_until(watch_, site(stage, node), word.expected, [&](uint64_t& seen) {
            if (is_here(word, seen)) return true;
            if (++polls % prim::polls_per_check() == 0) code = abort_code(node);
            return code != 0;
        });
        return has_ended && (code == 0 || give_up(site(stage, node), word.expected, code));
    }
    // Of a group that polls itself, now and then. False: it must stop.
    EP_DEVICE bool may_go_on(const algo::WaitSite& site, uint64_t start_ns, uint64_t expected, uint64_t seen) const {
        const uint64_t code = layout::is_rail_stage(site.stage) ? abort_code(plan_.topology.node_of(site.peer)) : 0;
        if (code != 0) return give_up(site, expected, code);
        return algo::may_go_on(watch_, site, start_ns, expected, seen);
    }

    // -- Chunks -------------------------------------------------------------------------------------------------------------

    EP_DEVICE int chunk_of(int position) const { return position / window().chunk_tokens; }
    // Of a stream of `count` tokens.
    EP_DEVICE int num_tokens_of(int chunk, int count) const {
        const int rest = count - chunk * window().chunk_tokens;
        return rest < window().chunk_tokens ? rest : window().chunk_tokens;
    }
    // Where a token for the peer is written: into staging, or at once where the chunk goes if stores reach it.
    EP_DEVICE uint8_t* staging(int node, int position) const {
        uint8_t* const there = rail::reach(rail_, peer(node));
        const uint64_t slot = slot_of(position);
        return there != nullptr ? there + place_there(node, slot) : rail::at<uint8_t>(rail_, staging_place(node, slot));
    }
    EP_DEVICE const uint8_t* received(int node, int position) const {
        return rail::at<const uint8_t>(
            rail_, control().bytes + window().receive_offset(static_cast<uint64_t>(bank_), static_cast<uint64_t>(node_),
                                                             static_cast<uint64_t>(node), slot_of(position)));
    }

    // Must the place of this token in staging, which is the peer's too, be given back before it is filled?
    EP_DEVICE bool is_reused(int position) const { return chunk_of(position) >= window().num_chunks; }
    EP_DEVICE RailWord taken_before(int node, int position) const {
        return taken(node, chunk_of(position) - window().num_chunks);
    }
    // One thread; others of its warp may fill the slot after a sync().
    EP_DEVICE bool wait_for_staging(int node, int position) const {
        return !is_reused(position) || wait(Stage::kRailTaken, node, taken_before(node, position));
    }
    // One thread, when its warp has filled the slot and met in a sync(). True: it was the last of its chunk, which the warp may
    // post after another sync().
    EP_DEVICE bool count_staged(int node, int position, int count) const {
        return count_in_chunk(layout::RailCounters::make(static_cast<uint64_t>(num_nodes())).staged, node, position,
                              count);
    }
    // One warp. False: a wait failed.
    EP_DEVICE bool post_chunk(algo::Warp warp, int node, int chunk, int count) const {
        warp.expect();
        const uint64_t slot = slot_of(chunk * window().chunk_tokens);
        const auto bytes =
            static_cast<uint32_t>(static_cast<uint64_t>(num_tokens_of(chunk, count)) * window().slot_bytes);
        const rail::Flag flag{control().arrived.at(chunk_word(node_, chunk)), tag(chunk)};
        if (rail::reach(rail_, peer(node)) == nullptr)
            return rail::put(rail_, peer(node), {place_there(node, slot), staging_place(node, slot), bytes}, flag,
                             Room{*this, node});
        bool is_told = true;
        // The lane that has acquired what others stored, or one that a barrier orders after it.
        warp.sync();
        if (warp.thread_rank() == 0) is_told = rail::tell(rail_, peer(node), bytes, flag, Room{*this, node});
        return __all_sync(kFullMask, is_told);
    }
    // One thread, when its warp has read the token and met in a sync(): the last one of a chunk gives it back, where its place is
    // used again in this call. False: a wait failed.
    EP_DEVICE bool give_back(int node, int position, int count) const {
        const int chunk = chunk_of(position);
        if ((chunk + window().num_chunks) * window().chunk_tokens >= count) return true;
        if (!count_in_chunk(layout::RailCounters::make(static_cast<uint64_t>(num_nodes())).taken, node, position,
                            count))
            return true;
        return rail::set(rail_, peer(node), {control().taken.at(chunk_word(node_, chunk)), tag(chunk)},
                         Room{*this, node});
    }

    // -- Counts -------------------------------------------------------------------------------------------------------------

    EP_DEVICE uint8_t* counts_staging(int node) const {
        return rail::at<uint8_t>(rail_, control().counts_staging.at(of_bank(node)));
    }
    EP_DEVICE const uint8_t* counts(int node) const {
        return rail::at<const uint8_t>(rail_, control().counts.at(of_bank(node)));
    }
    // One warp. False: a wait failed.
    EP_DEVICE bool post_counts(algo::Warp warp, int node, uint64_t bytes) const {
        warp.expect();
        return rail::put(rail_, peer(node),
                         {control().counts.at(of_bank(node_)), control().counts_staging.at(of_bank(node)),
                          static_cast<uint32_t>(bytes)},
                         {control().counts_flags.at(of_bank(node_)), watch_.call}, Room{*this, node});
    }

    // -- Begin and end of a call ----------------------------------------------------------------------------------------------

    // One warp of one block of a call's first launch.
    EP_DEVICE bool announce(algo::Warp warp) const { return add_at_peers(warp, control().entered); }
    // One warp. Afterwards the peers' banks may be written, and our own staging: they have read what was there two calls ago.
    EP_DEVICE bool wait_for_banks(algo::Warp warp) const {
        bool is_ok = true;
        for_each_peer(warp, [&](int node) {
            const uint64_t code = abort_code(node);
            if (code != 0)
                is_ok = give_up(site(Stage::kRailBank, node), 0, code);
            else if (watch_.call > layout::kNumBanks)
                is_ok &= wait(Stage::kRailBank, node, ended(node, watch_.call - layout::kNumBanks));
        });
        return algo::all(warp, is_ok);
    }
    // One warp, when all of this rank's reads of the bank have ended, and have been acquired.
    EP_DEVICE bool tell_end(algo::Warp warp) const { return add_at_peers(warp, control().ended); }
    // One warp, when this rank's abort word says who gave up.
    EP_DEVICE void tell_failure(algo::Warp warp) const {
        const uint64_t code = algo::claim_failure(warp, watch_);
        if (code == 0) return;
        for_each_peer(warp, [&](int node) {
            static_cast<void>(rail::set(rail_, peer(node), {control().abort.at(node_), code}, algo::Patience{}));
        });
    }

    template <class Group, class Work> EP_DEVICE void for_each_peer(const Group& group, const Work& work) const {
        algo::for_each(group, num_nodes(), [&](int node) {
            if (node != node_) work(node);
        });
    }

private:
    // What the engine waits with for room.
    struct Room {
        const RailLink& link;
        int node;

        template <class Look> EP_DEVICE bool operator()(uint64_t expected, const Look& look) const {
            return algo::wait_until(link.watch_, link.site(Stage::kRailRoom, node), expected, look);
        }
    };

    EP_DEVICE const layout::RailControl& control() const { return plan_.control; }
    EP_DEVICE const layout::RailWindow& window() const { return plan_.window; }
    EP_DEVICE uint64_t tag(int chunk) const { return layout::make_tag(watch_.call, static_cast<uint64_t>(chunk)); }
    EP_DEVICE uint64_t of_bank(int node) const { return static_cast<uint64_t>(bank_) * num_nodes() + node; }
    EP_DEVICE uint64_t chunk_word(int node, int chunk) const {
        return of_bank(node) * layout::kMaxRailChunks + chunk % window().num_chunks;
    }
    EP_DEVICE uint64_t slot_of(int position) const {
        return static_cast<uint64_t>(position % (window().num_chunks * window().chunk_tokens));
    }
    EP_DEVICE uint64_t staging_place(int node, uint64_t slot) const {
        return control().bytes + window().staging_offset(static_cast<uint64_t>(bank_), static_cast<uint64_t>(node_),
                                                         static_cast<uint64_t>(node), slot);
    }

    // Where the peer receives it.
    EP_DEVICE uint64_t place_there(int node, uint64_t slot) const {
        return control().bytes + window().receive_offset(static_cast<uint64_t>(bank_), static_cast<uint64_t>(node),
                                                         static_cast<uint64_t>(node_), slot);
    }

    // What the peer's kernels or its host have set when it gave up, 0: nothing.
    EP_DEVICE uint64_t abort_code(int node) const {
        const auto look = [&](int who) {
            return prim::load<Order::kRelaxed, Scope::kSys>(
                rail::at<const uint64_t>(rail_, control().abort.at(static_cast<uint64_t>(who) * num_nodes() + node)));
        };
        const uint64_t code = look(0);
        return code != 0 ? code : look(1);
    }
    EP_DEVICE bool give_up(const algo::WaitSite& site, uint64_t expected, uint64_t code) const {
        algo::fail(watch_, layout::FailureKind::kAborted, site, expected, code, 0);
        return false;
    }

    EP_DEVICE bool add_at_peers(algo::Warp warp, const layout::Field& counters) const {
        bool is_ok = true;
        for_each_peer(warp, [&](int node) {
            is_ok &= rail::add(rail_, peer(node), counters.at(node_), 1, Room{*this, node});
        });
        return algo::all(warp, is_ok);
    }

    // True: with this token all of its chunk are counted, and what those that counted had done is acquired.
    EP_DEVICE bool count_in_chunk(const layout::Field& counters, int node, int position, int count) const {
        const int chunk = chunk_of(position);
        const uint64_t index = static_cast<uint64_t>(node) * layout::kMaxRailChunks + chunk % window().num_chunks;
        auto* counter = reinterpret_cast<uint32_t*>(plan_.counters + counters.at(index));
        const uint32_t num_done = prim::fetch_add<Order::kAcqRel, Scope::kGpu>(counter, 1u) + 1;
        if (num_done != static_cast<uint32_t>(num_tokens_of(chunk, count))) return false;
        prim::store<Order::kRelaxed, Scope::kGpu>(counter, 0u);
        return true;
    }

    const RailPlan& plan_;
    const algo::Watch& watch_;
    rail::Rail rail_;
    int node_;
    int bank_;
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode
