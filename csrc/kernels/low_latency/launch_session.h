// A launch of a low-latency kernel, as one block takes part in it: LaunchSession from its begin to its end, and in that
// SendPhase, ReceivePhase or one after the other. What each owes to the other blocks, to the peers and to the next launch it
// does when it ends.
#pragma once

#include "device/algo/group.h"
#include "kernels/low_latency/bank.h"

namespace deep_ep::kernels::low_latency {
inline namespace EP_BACKEND {

// What the block knows of its part in the launch; shared memory.
struct BlockRole {
    int is_ready;  // zero: some rank has given up, do nothing
    int is_first;  // this block began before all others of its grid
    int receives;  // it takes part in the receive phase
    int share;     // its current part of that
    // Of a dispatch in a launch that has sent: warp 0 waits for no table any more. Looked at without a barrier, by atomics alone:
    // compute-sanitizer's racecheck takes other strong accesses of shared memory for plain ones.
    int knows_tables;
    // Of this launch, after a barrier. CallContext::launch_state is right only in a warp that has begun before the launch was counted:
    // in a receive phase of its own another warp than the last may be later.
    layout::LowLatencyLaunchState* launch_state;
    // A bit for each rank: masked when this block had waited for the bank. Nothing is sent to it: it may still read.
    uint32_t left_out[(layout::kMaxRanks + 31) / 32];
};

EP_DEVICE bool is_last_warp(Block block) { return prim::warp_idx() == block.num_warps() - 1; }

class LaunchSession {
public:
    EP_DEVICE LaunchSession(const LowLatencyCall& call, layout::Operation operation, Phase phase, bool uses_packets,
                            BlockRole& block_role)
        : context(make_context(call, operation, phase, uses_packets)), role(block_role) {}
    EP_DEVICE ~LaunchSession() {
        add_statistics(Block{});
        if constexpr (kAcrossNodes)
            if (is_last_warp(Block{})) context.far().tell_failure(Warp{});
    }
    LaunchSession(const LaunchSession&) = delete;
    LaunchSession& operator=(const LaunchSession&) = delete;

    // The number of the call is a trip to memory, in two steps, both to be made before anything else is asked of the session.
    // The compiler waits for it at once, so loads that do not depend on it come before ask_number, and work before take_number.
    EP_DEVICE void ask_number() { words_ = load_launch_words(Warp{}, context.call, context.phase); }
    // By warp 0 of a block that sends, between the two.
    EP_DEVICE BankLook look_at_banks() const {
        return prim::warp_idx() == 0 ? low_latency::look_at_banks(Warp{}, context) : BankLook{};
    }
    EP_DEVICE void take_number() { low_latency::take_number(Warp{}, context, words_); }

    // The place of this block among those of the grid, in the order in which they begin.
    EP_DEVICE uint32_t begin_block() const {
        return prim::fetch_increment<Order::kRelaxed, Scope::kGpu>(&context.launch_state->begun_blocks);
    }

    EP_DEVICE uint32_t claim_share() const {
        return prim::fetch_increment<Order::kRelaxed, Scope::kGpu>(&context.launch_state->next_share);
    }

    // Have all blocks of this launch begun? A block with little to send asks early, so it asks a few times: whoever leaves
    // makes another block do two shares, one after the other.
    EP_DEVICE bool have_all_begun() const {
        constexpr int kMostLooks = 8;
#pragma unroll 1
        for (int looks = 0; looks < kMostLooks; ++looks)
            if (prim::load<Order::kRelaxed, Scope::kGpu>(&context.launch_state->begun_blocks) == gridDim.x) return true;
        return false;
    }

    // The block, by its last warp, will not look at the counters that count_launch changes again. Nothing of this launch
    // looks at what the last block to settle changes, and the end of the launch publishes it, so no order is needed.
    EP_DEVICE void settle(Warp warp) const {
        warp.expect();
        warp.sync();  // every lane has looked at them
        if (warp.thread_rank() == 0 &&
            algo::arrive<Order::kRelaxed, Scope::kGpu>(&context.launch_state->settled_blocks).is_last)
            count_launch(num_launches());
    }

    // The same in two steps, by one thread of a block, for a launch in which nobody has to wait for the trip. It takes the number
    // of launches along, which is a trip too.
    struct Settling {
        uint32_t order;
        uint64_t num_launches;
    };
    EP_DEVICE Settling begin_to_settle() const {
        return {prim::fetch_increment<Order::kRelaxed, Scope::kGpu>(&context.launch_state->settled_blocks),
                num_launches()};
    }
    EP_DEVICE void settle(const Settling& settling) const {
        if (settling.order + 1 != gridDim.x) return;
        prim::store<Order::kRelaxed, Scope::kGpu>(&context.launch_state->settled_blocks, 0u);
        count_launch(settling.num_launches);
    }

    CallContext context;
    BlockRole& role;

private:
    LaunchWords words_;

    EP_DEVICE uint64_t num_launches() const {
        return prim::load<Order::kRelaxed, Scope::kGpu>(&context.watch.words.local->num_low_latency_launches);
    }

    // For the next launch. `launches`: those before this one.
    EP_DEVICE void count_launch(uint64_t launches) const {
        const CallContext& c = context;
        layout::LocalState* local = c.watch.words.local;
        layout::LowLatencyLaunchState* next =
            &local->low_latency_launch_states[c.launch_state == &local->low_latency_launch_states[0] ? 1 : 0];
        prim::store<Order::kRelaxed, Scope::kGpu>(&next->begun_blocks, 0u);
        prim::store<Order::kRelaxed, Scope::kGpu>(&next->next_share, 0u);
        prim::store<Order::kRelaxed, Scope::kGpu>(&next->void_pieces, 0u);
        prim::store<Order::kRelaxed, Scope::kGpu>(&next->lists, 0u);
        if (kAcrossNodes) prim::store<Order::kRelaxed, Scope::kGpu>(&next->staged_rows, 0u);
        if (c.sends()) prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_sends, c.watch.call);
        if (c.phase == Phase::kSend) prim::store<Order::kRelaxed, Scope::kGpu>(c.call.number, c.watch.call);
        if (c.receives()) prim::store<Order::kRelaxed, Scope::kGpu>(&local->low_latency_ended[c.bank], c.watch.call);
        prim::store<Order::kRelaxed, Scope::kGpu>(&local->num_low_latency_launches, launches + 1);
    }

    // The block that ends last adds the longest waits to the caller's statistics. Every block's atomics have returned when it
    // counts itself, so no order is needed.
    EP_DEVICE void add_statistics(Block block) const {
        const CallContext& c = context;
        if (!c.receives() || c.call.wait_stats == nullptr) return;
        uint32_t* counter = &c.watch.words.local->low_latency_done_blocks;
        if (!algo::is_last_block<Order::kRelaxed, Scope::kGpu>(block, counter, role.share)) return;
        algo::for_each(block, c.num_ranks(), [&](int peer) {
            c.call.wait_stats[peer] +=
                static_cast<int64_t>(prim::load<Order::kRelaxed, Scope::kGpu>(&c.call.wait_ns[peer]));
            prim::store<Order::kRelaxed, Scope::kGpu>(&c.call.wait_ns[peer], uint64_t{0});
        });
    }
};

// When the block that began first tells the peers what this rank has received: when the phase ends; or within the phase, before
// the block waits for a peer there. Which block that is takes a trip to memory to learn, which a phase that tells at its end does
// not wait for.
enum class Tells { kAtEnd, kInside };

// All blocks of a launch that sends. It begins when no peer reads the bank any more: what was loaded by then is under way all
// the while. It ends with the choice of the blocks that receive, where the launch does.
template <Tells kTells> class SendPhase {
public:
    // `look`: of warp 0, see look_at_banks.
    EP_DEVICE SendPhase(Block block, const LaunchSession& launch, const BankLook& look) : launch_(launch) {
        block.expect();
        if (is_last_warp(block)) begin(Warp{});
        if (prim::warp_idx() == 0) take_look(Warp{}, look);
        block.sync();  // each lane's acquire, the block's stores
        if (!is_ready()) wait(block);
    }

    // In a launch of both phases a block may wait for rows of its own rank only when all blocks have begun: one that has not
    // may never get an SM otherwise. Blocks that come too early leave, and whoever is there later does their part. In a call
    // that has failed no wait lasts, and what does not come is void.
    EP_DEVICE ~SendPhase() {
        const Block block;
        block.expect();
        if (is_last_warp(block)) {
            if (kTells == Tells::kAtEnd && began_first(Warp{})) tell_peers(Warp{});
            launch_.settle(Warp{});
        }
        // Another warp than that, and than warp 0, which is busy with releases; a block may have but one.
        if (block.thread_rank() == (block.num_warps() > 1 ? kWarpSize : 0)) {
            const bool receives = launch_.context.receives() && (!is_ready() || launch_.have_all_begun());
            role().receives = receives ? 1 : 0;
            if (receives) role().share = static_cast<int>(launch_.claim_share());
        }
        block.sync();
    }
    SendPhase(const SendPhase&) = delete;
    SendPhase& operator=(const SendPhase&) = delete;

    // False: some rank has given up, and nothing is to be sent.
    EP_DEVICE bool is_ready() const { return role().is_ready != 0; }
    // This block began before all others of its grid.
    EP_DEVICE bool is_first() const {
        static_assert(kTells == Tells::kInside);
        return role().is_first != 0;
    }
    // Nothing is sent to the rank.
    EP_DEVICE bool leaves_out(int rank) const {
        return launch_.context.call.is_shrinkable && (role().left_out[rank / 32] >> rank % 32 & 1u) != 0;
    }

    // The block that began first: tells the peers what this rank has received.
    EP_DEVICE void tell_ended(Block block) const {
        static_assert(kTells == Tells::kInside);
        if (is_last_warp(block)) tell_peers(Warp{});
    }

    // `work(message)` for each table that this rank writes: at near ranks, and one for all far ranks.
    template <class Work> EP_DEVICE void for_tables(const Work& work) const {
        const CallContext& c = launch_.context;
        for (int i = 0; i < c.num_near(); ++i)
            if (const int peer = c.near_rank(i); !leaves_out(peer)) work(c.message(peer, c.rank()));
        if constexpr (kAcrossNodes) work(c.far().template at<uint8_t>(c.staged_table()));
    }

    // The block that has written our table into the messages to all ranks: they may read it.
    EP_DEVICE void publish_table(Block block, int num_tokens) const {
        const CallContext& c = launch_.context;
        const auto is_meant = [&](int idx) { return !leaves_out(c.near_rank(idx)); };
        algo::for_each(block, c.num_near(), [&](int idx) {
            if (is_meant(idx))
                *reinterpret_cast<int*>(c.message(c.near_rank(idx), c.rank()) + c.call.message.num_tokens.offset) =
                    num_tokens;
        });
        if constexpr (kAcrossNodes) state_tokens(block, num_tokens);
        block.sync();
        // Release: the tables. Pairs with: wait_for_table at the peer.
        algo::publish<Order::kRelease, Scope::kSys>(
            block, c.num_near(), is_meant,
            [&](int idx) { return c.watch.heap.table_full(idx, c.bank, c.watch.heap.rank()); }, c.watch.call);
        if constexpr (kAcrossNodes) put_table(block, num_tokens);
    }

    // The same to far ranks alone.
    EP_DEVICE void publish_far_table(Block block, int num_tokens) const {
        state_tokens(block, num_tokens);
        block.sync();
        put_table(block, num_tokens);
    }

private:
    EP_DEVICE BlockRole& role() const { return launch_.role; }

    EP_DEVICE void state_tokens(Block block, int num_tokens) const {
        const CallContext& c = launch_.context;
        if (block.thread_rank() == 0)
            *c.far().template at<int>(c.staged_table() + c.call.message.num_tokens.offset) = num_tokens;
    }

    // After a barrier: the staged table, a warp for each far rank.
    EP_DEVICE void put_table(Block block, int num_tokens) const {
        const CallContext& c = launch_.context;
        const FarRanks far = c.far();
        const layout::LowLatencyMessage& message = c.call.message;
        const auto num_entries = static_cast<uint64_t>(num_tokens) * c.call.num_topk;
        const uint64_t bytes = c.watch.operation == layout::Operation::kLowLatencyCombine
                                   ? message.topk_weights.at(num_entries)
                                   : message.topk_idx.at(num_entries);
#pragma unroll 1
        for (int idx = prim::warp_idx(); idx < far.count(); idx += block.num_warps())
            if (const int peer = far.rank(idx); !leaves_out(peer))
                // Pairs with: wait_for_table at the peer.
                far.put(Warp{}, peer,
                        {c.far_message(peer, c.rank()), c.staged_table(),
                         static_cast<uint32_t>(layout::align_up(bytes, 16))},
                        {far.table_full(c.bank, c.rank()), c.watch.call});
    }

    // The last warp's part.
    EP_DEVICE void begin(Warp warp) {
        if (warp.thread_rank() == 0) order_ = launch_.begin_block();
        if (kTells == Tells::kAtEnd) return;
        const bool is_first = began_first(warp);
        if (warp.thread_rank() == 0) role().is_first = is_first ? 1 : 0;
    }

    // What the last warp knows.
    EP_DEVICE bool began_first(Warp warp) const {
        warp.expect();
        return __shfl_sync(kFullMask, order_, 0) == 0;
    }

    // Says nothing new when it is done again.
    EP_DEVICE void tell_peers(Warp warp) const {
        const CallContext& c = launch_.context;
        algo::publish<Order::kRelaxed, Scope::kSys>(
            warp, c.num_near(), [&](int idx) { return !is_masked(c.call, c.near_rank(idx)); },
            [&](int idx) { return c.watch.heap.low_latency_started(idx, c.watch.heap.rank()); }, c.watch.call);
        publish_ended(warp, c);
    }

    EP_DEVICE void take_look(Warp warp, const BankLook& look) const {
        warp.expect();
        const CallContext& c = launch_.context;
        const bool is_ready = is_bank_free(warp, c, look) && look.abort_code == 0;
        if (is_ready && c.call.is_shrinkable) note_masks(warp);
        if (warp.thread_rank() == 0) {
            role().is_ready = is_ready ? 1 : 0;
            role().launch_state = c.launch_state;
            role().knows_tables = 0;
        }
    }

    // The bank is not free yet, or the call has failed. The peers are told what this rank has received before anybody waits.
    EP_DEVICE void wait(Block block) const {
        block.sync();  // every warp has come to know it
        if (is_last_warp(block) && began_first(Warp{})) {
            tell_peers(Warp{});
            if constexpr (kAcrossNodes) tell_far_entered(Warp{}, launch_.context);
        }
        if (prim::warp_idx() == 0) {
            const Warp warp;
            const bool is_ready = wait_for_bank(warp, launch_.context);
            if (launch_.context.call.is_shrinkable) note_masks(warp);
            if (warp.thread_rank() == 0) role().is_ready = is_ready ? 1 : 0;
        }
        block.sync();
    }

    EP_DEVICE void note_masks(Warp warp) const {
        const CallContext& c = launch_.context;
#pragma unroll 1
        for (int first = 0; first < c.num_ranks(); first += kWarpSize) {
            const int peer = first + warp.thread_rank();
            const uint32_t masks = __ballot_sync(kFullMask, peer < c.num_ranks() && is_masked(c.call, peer));
            if (warp.thread_rank() == 0) role().left_out[first / kWarpSize] = masks;
        }
    }

    const LaunchSession& launch_;
    uint32_t order_ = 0;  // of the block, in lane 0 of its last warp
};

// All blocks of a launch that only receives. It tells the peers nothing when it begins: what was received before it, the send
// phase of this call or of a later one has told, or such a launch itself.
class ReceivePhase {
public:
    // The last warp is the least likely to have a unit, and no other one depends on a counter that this changes. It waits for
    // none of them here, since the block would wait for it in its first barrier.
    EP_DEVICE ReceivePhase(Block block, const LaunchSession& launch) : launch_(launch) {
        block.expect();
        // Only send phases count calls, and they come before or after the whole launch. Compared when the phase ends: here it
        // would be waited for.
        num_sends_ = prim::load<Order::kRelaxed, Scope::kGpu>(&launch.context.watch.words.local->num_low_latency_sends);
        if (!is_last_warp(block) || Warp::thread_rank() != 0) return;
        launch_.role.launch_state = launch_.context.launch_state;
        settling_ = launch_.begin_to_settle();
    }

    // Where a later call has begun already, the next one takes this bank: its send phase would wait until the peers have begun
    // it too, were they told of this one's end only then. So the block that ends last tells them now; of the other bank too,
    // whose call may have been received before this one.
    EP_DEVICE ~ReceivePhase() {
        const Block block;
        const CallContext& c = launch_.context;
        if (is_last_warp(block) && Warp::thread_rank() == 0) launch_.settle(settling_);
        if (num_sends_ == c.watch.call) return;
        // Every block's reads, the last one's release.
        uint32_t* counter = &c.watch.words.local->low_latency_read_blocks;
        if (!algo::is_last_block<Order::kAcqRel, Scope::kGpu>(block, counter, launch_.role.share)) return;
#pragma unroll 1
        for (int bank = 0; bank < layout::kNumLowLatencyBanks; ++bank) {
            const uint64_t ended = bank == c.bank ? c.watch.call : ended_before(c, bank);
            // Pairs with: is_bank_free at the peer.
            algo::publish<Order::kRelease, Scope::kSys>(
                block, c.num_near(), [&](int idx) { return !is_masked(c.call, c.near_rank(idx)); },
                [&](int idx) { return c.watch.heap.received(idx, bank, c.watch.heap.rank()); }, ended);
            if constexpr (kAcrossNodes) tell_far_ended(block, c, bank, ended);
        }
    }
    ReceivePhase(const ReceivePhase&) = delete;
    ReceivePhase& operator=(const ReceivePhase&) = delete;

private:
    const LaunchSession& launch_;
    uint64_t num_sends_;
    LaunchSession::Settling settling_ = {};  // of lane 0 of the last warp
};

// The kernels of an operation. With a hook its two launches are of the same one, so that a profiler has one name for the
// call; registers and instructions of a phase are its own all the same.
enum class Launches { kPhases, kWhole };

// What a launch does: `send(launch)`, which takes the number of the call and has a SendPhase, and `receive(launch, early)`.
// `early`: in a launch that only receives, what `look_early(context)` has loaded beside the number of the call, and so without
// it: flags are those of both banks.
template <Launches kLaunches, bool kUsesPackets = false, class Send, class LookEarly, class Receive>
EP_DEVICE void run_launch(const LowLatencyCall& call, layout::Operation operation, BlockRole& role, const Send& send,
                          const LookEarly& look_early, const Receive& receive) {
    if (kLaunches == Launches::kWhole) {
        LaunchSession launch(call, operation, Phase::kBoth, kUsesPackets, role);
        send(launch);
        if (role.receives != 0) receive(launch, decltype(look_early(launch.context)){});
    } else if (call.phase == Phase::kSend) {
        LaunchSession launch(call, operation, Phase::kSend, kUsesPackets, role);
        send(launch);
    } else {
        LaunchSession launch(call, operation, Phase::kReceive, kUsesPackets, role);
        launch.ask_number();
        const auto early = look_early(launch.context);
        launch.take_number();
        const ReceivePhase phase(Block{}, launch);
        receive(launch, early);
    }
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency
