// clean_low_latency_buffer: a barrier of the group. No flag or slot needs cleaning, but callers count on it that every rank
// has ended its earlier calls, and that with enable_shrink whoever does not come is masked.
#include "device/algo/watch.h"
#include "device/launch.h"
#include "kernels/low_latency/bank.h"
#include "kernels/params.h"

namespace deep_ep::kernels::low_latency::clean {
inline namespace EP_BACKEND {

// Which comes before any wait.
EP_DEVICE void tell_far_clean(Warp warp, const LowLatencyCall& call, const algo::Watch& watch, uint64_t number) {
    const FarRanks far(call, watch);
    tell_far(warp, call, far, LowLatencyRail::kToldCleans, far.cleaned(first_near(watch) + watch.heap.rank()), number);
}

EP_DEVICE void wait_for_far(Warp warp, const LowLatencyCall& call, const algo::Watch& watch, uint64_t number) {
    const FarRanks far(call, watch);
    algo::for_each(warp, far.count(), [&](int idx) {
        const int peer = far.rank(idx);
        wait_for_peer(&call, watch, Stage::kClean, peer, far.at<const uint64_t>(far.cleaned(peer)), number,
                      ~uint64_t{0});
    });
    warp.sync();
    far.tell_failure(warp);
}

// A warp is the whole launch, a lane for each peer. Not a call: it takes no number of theirs, and no bank.
struct Kernel {
    using Params = LowLatencyCall;
    static constexpr int kMaxThreads = kWarpSize;
    static constexpr int kMinBlocks = 1;
    struct Shared {};

    static EP_DEVICE void run(const Params& call, Shared&) {
        const Warp warp;
        uint64_t* num_cleans = &call.watch.local->num_low_latency_cleans;
        uint64_t number = 0;
        if (warp.thread_rank() == 0) number = prim::load<Order::kRelaxed, Scope::kGpu>(num_cleans) + 1;
        number = __shfl_sync(kFullMask, number, 0);
        const algo::Watch watch = {call.watch, call.heap, layout::Operation::kLowLatencyClean, number};
        const int num_near = watch.heap.num_ranks(), self = watch.heap.rank(), first = first_near(watch);
        // Release: all that this rank's earlier launches did. Pairs with: wait_for_peer below, at the peer.
        algo::publish<Order::kRelease, Scope::kSys>(
            warp, num_near, [&](int idx) { return !is_masked(call, first + idx); },
            [&](int idx) { return watch.heap.cleaned(idx, self); }, number);
        if constexpr (kAcrossNodes) tell_far_clean(warp, call, watch, number);
        // A peer may be in its next clean already.
        algo::for_each(warp, num_near, [&](int idx) {
            wait_for_peer(&call, watch, Stage::kClean, first + idx, watch.heap.cleaned(self, idx), number,
                          ~uint64_t{0});
        });
        if constexpr (kAcrossNodes) wait_for_far(warp, call, watch, number);
        if (warp.thread_rank() == 0) prim::store<Order::kRelaxed, Scope::kGpu>(num_cleans, number);
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::clean

void deep_ep::kernels::launch(const LowLatencyCall& call, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_threads = prim::kWarpSize;
    config.name = "deep_ep::low_latency::clean";
    dev::launch<low_latency::clean::Kernel>(config, stream, call);
}
