// A launch's part in its call of the high-throughput mode, from its entry to its end.
//
// CallSession<Operation>::run keeps the order that the protocol needs, and nothing else can enter or finish a call:
//
//     enter     one warp of each block: tells the peers that the call has begun, waits until no peer reads this rank's bank,
//               then Operation::open. The other warps meanwhile: Operation::prepare
//     learn     all threads, once the call is entered
//     work      all threads
//     finish    all threads: the block that comes last returns what was borrowed, waits for what is lent, counts the call, and
//               makes the outputs void if anything has failed
//
// The session takes its body as an operation and does not finish in a destructor: the executor reports a mistake by an
// exception, and a destructor that met other threads in a barrier on the way would hang or end the process.
//
// An operation is a kernel's type, derived from CallOperation. It has kOperation and these static functions; those marked * only
// where the default of CallOperation does not serve:
//   * bool is_first_launch(params)                      it announces the call; no kernel before it did
//   * Look look(Warp, params, watch)                    loads that are under way while the call is entered, for open
//     bool open(Warp, params, watch, look)              of each block; banks of peers may be written from here on
//     void prepare(Block, params, watch, shared)        waits for nothing
//   * Begun learn(Block, params, watch, shared)
//     bool work(Block, params, watch, shared)           False: this warp has given up
//   * bool check(Warp, params, shared)                  of each warp, where work was done or not. False: the call fails
//     void void_outputs(Block, params)
//   * void close(Warp, params, watch, has_failed)       of the block that comes last, when loans are settled
// Its Shared begins with a CallState named `call`.
#pragma once

#include "device/algo/group.h"
#include "device/algo/watch.h"
#include "device/launch.h"
#include "kernels/params.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// How a launch stands when one of its blocks has ended: not all have, or this was the last one.
enum class LaunchEnd : uint32_t { kOthersGoOn, kDone, kFailed };

// How a block has begun. kFailed: do nothing but finish the call. kUnfinished: leave it to a later launch.
enum class Begun { kReady, kFailed, kUnfinished };

// What the warps of a block know of their call; shared memory.
struct CallState {
    uint64_t number;
    int is_entered;
    uint32_t has_failed;  // not zero: some warp gave up in the middle of its work
    LaunchEnd end;

    EP_DEVICE void note_failure() { prim::store<prim::Order::kRelaxed, prim::Scope::kCta>(&has_failed, 1u); }
};

// Afterwards peers' banks may be written. `is_first_launch`: of the call, so it announces the call.
EP_DEVICE bool enter_call(algo::Warp warp, const algo::Watch& watch, bool is_first_launch) {
    warp.expect();
    const int self = watch.heap.rank();
    if (is_first_launch && blockIdx.x == 0) algo::announce_start(warp, watch);
    const uint64_t abort_code = algo::abort_code(watch);
    bool is_ok = algo::wait_for_banks(warp, watch);  // its first look is under way together with the load above
    // Some other rank may have given up already: then this one says so as well.
    if (abort_code != 0) is_ok &= algo::may_go_on(watch, {layout::Stage::kStart, self}, prim::clock_ns(), 0, 0);
    return algo::all(warp, is_ok);
}

template <class Operation> class CallSession {
    using Params = typename Operation::Params;
    using Shared = typename Operation::Shared;

public:
    // All threads of all blocks.
    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const algo::Block block;
        const Begun begun = begin(block, p, shared);
        if (begun == Begun::kUnfinished) return;  // the host launches the rest
        // The call's number goes on through shared memory: kept in registers through all this, it would be spilled.
        const algo::Watch watch = watch_of(p, shared.call.number);
        if (begun == Begun::kReady) {
            if (!Operation::work(block, p, watch, shared)) shared.call.note_failure();
        } else {
            shared.call.note_failure();
        }
        if (!Operation::check(algo::Warp{}, p, shared)) shared.call.note_failure();
        finish(block, p, watch, shared.call);
    }

private:
    static EP_DEVICE algo::Watch watch_of(const Params& p, uint64_t call) {
        return {p.watch, p.heap, Operation::kOperation, call};
    }

    static EP_DEVICE Begun begin(algo::Block block, const Params& p, Shared& shared) {
        const algo::Watch watch = watch_of(p, algo::current_call(p.watch.local));
        if (prim::warp_idx() == 0) {
            const algo::Warp warp;
            const auto look = Operation::look(warp, p, watch);
            const bool is_entered =
                enter_call(warp, watch, Operation::is_first_launch(p)) && Operation::open(warp, p, watch, look);
            if (warp.thread_rank() == 0) shared.call = {watch.call, is_entered ? 1 : 0, 0, {}};
        }
        Operation::prepare(block, p, watch, shared);
        block.sync();
        return shared.call.is_entered != 0 ? Operation::learn(block, p, watch, shared) : Begun::kFailed;
    }

    // One warp of each block. What it returns holds on every lane; the block that comes last has then acquired what the
    // others did, and knows whether any failed.
    static EP_DEVICE LaunchEnd count_block(algo::Warp warp, const algo::Watch& watch, bool has_failed) {
        auto end = LaunchEnd::kOthersGoOn;
        if (warp.thread_rank() == 0) {
            const algo::Arrival arrival =
                algo::arrive<prim::Order::kAcqRel, prim::Scope::kGpu>(&watch.words.local->num_done_blocks, has_failed);
            if (arrival.is_last) end = arrival.is_marked ? LaunchEnd::kFailed : LaunchEnd::kDone;
        }
        end = static_cast<LaunchEnd>(__shfl_sync(prim::kFullMask, static_cast<uint32_t>(end), 0));
        warp.sync();  // one lane's acquire, each lane's releases
        return end;
    }

    // One warp of the block that comes last: afterwards no peer touches what this rank lends.
    static EP_DEVICE LaunchEnd settle_loans(algo::Warp warp, const algo::Watch& watch, bool is_lender, LaunchEnd end) {
        algo::return_loans(warp, watch, end == LaunchEnd::kFailed);
        if (end == LaunchEnd::kDone && is_lender && !algo::wait_for_returns(warp, watch)) end = LaunchEnd::kFailed;
        if (end == LaunchEnd::kFailed && is_lender) algo::wait_for_quiet(warp, watch);
        return end;
    }

    static EP_DEVICE void finish(algo::Block block, const Params& p, const algo::Watch& watch, CallState& state) {
        block.sync();  // what all warps did, and whether one failed
        if (prim::warp_idx() == 0) {
            const algo::Warp warp;
            LaunchEnd end = count_block(warp, watch, state.has_failed != 0);
            if (end != LaunchEnd::kOthersGoOn && p.may_lend) end = settle_loans(warp, watch, p.loan.is_any(), end);
            if (end != LaunchEnd::kOthersGoOn) Operation::close(warp, p, watch, end == LaunchEnd::kFailed);
            if (warp.thread_rank() == 0) {
                // Counts the call. Nothing of this launch looks at the count any more, and its end publishes it: no order.
                if (end != LaunchEnd::kOthersGoOn)
                    prim::store<prim::Order::kRelaxed, prim::Scope::kGpu>(&watch.words.local->num_calls, watch.call);
                state.end = end;
            }
        }
        block.sync();
        if (state.end == LaunchEnd::kFailed) Operation::void_outputs(block, p);
    }
};

// The kernel of an operation, with what most operations have in common.
template <class Operation, class P, class S> struct CallOperation {
    using Params = P;
    using Shared = S;
    struct Look {};

    static EP_DEVICE bool is_first_launch(const Params&) { return true; }
    static EP_DEVICE Look look(algo::Warp, const Params&, const algo::Watch&) { return {}; }
    static EP_DEVICE Begun learn(algo::Block, const Params&, const algo::Watch&, Shared&) { return Begun::kReady; }
    static EP_DEVICE bool check(algo::Warp, const Params&, const Shared&) { return true; }
    static EP_DEVICE void close(algo::Warp, const Params&, const algo::Watch&, bool) {}

    static EP_DEVICE void run(const Params& p, Shared& shared) { CallSession<Operation>::run(p, shared); }
};

// -- Which warp of a block does what part of the work, and has which part of its dynamic shared memory ---------------

// Of the warps of a role in all blocks, this is number `idx` of `count`.
struct RoleWarp {
    int idx, count;
};
EP_DEVICE RoleWarp role_warp(const Geometry& geometry, int warp_of_block, int num_of_block) {
    return {warp_of_block * geometry.num_blocks + static_cast<int>(blockIdx.x), num_of_block * geometry.num_blocks};
}

EP_DEVICE uint8_t* send_memory(const Geometry& geometry, int send_warp) {
    return static_cast<uint8_t*>(prim::dynamic_shared()) + send_warp * geometry.send.bytes();
}

EP_DEVICE uint8_t* recv_memory(const Geometry& geometry, int recv_warp) {
    return send_memory(geometry, geometry.num_send_warps) + recv_warp * geometry.recv.bytes();
}

// On the host.
template <class Kernel, class Params>
void launch_call(const char* name, const Params& params, int num_warps, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.geometry.num_blocks;
    config.num_threads = prim::kWarpSize * num_warps;
    config.dynamic_shared_bytes = staging_bytes(params.geometry);
    config.is_cooperative = true;
    config.name = name;
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
