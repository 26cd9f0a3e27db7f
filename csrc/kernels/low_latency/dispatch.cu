// low_latency_dispatch: few tokens, fixed slots, no host, no counts in advance.
//
//   send     block: one token at a time: cast, one copy into the token's slot at each destination rank, one flag each;
//            the last block: the routing table to every rank
//   receive  each token that has come is shared by several warps; its table entries say which rows it becomes: wait for
//            the token's flag, slot -> rows
//
// Messages, buffer map and orderings: docs/protocols/low_latency.md.
#include "device/launch.h"
#include "kernels/low_latency/dispatch_receive_phase.h"
#include "kernels/low_latency/dispatch_send_phase.h"
#include "kernels/params.h"

namespace deep_ep::kernels::low_latency::dispatch {
inline namespace EP_BACKEND {

template <Launches kLaunches> struct Kernel {
    using Params = LowLatencyDispatchParams;
    static constexpr int kMaxThreads = kMaxLowLatencyThreads;
    static constexpr int kMinBlocks = 1;
    struct Shared {
        BlockRole role;
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        run_launch<kLaunches>(
            p.call, layout::Operation::kLowLatencyDispatch, shared.role,
            [&](LaunchSession& launch) { send(Block{}, p, launch); },
            [&](const CallContext& c) { return look_early(Warp{}, c, unit_of(c, first_unit())); },
            [&](const LaunchSession& launch, EarlyLook early) { receive(Block{}, p, launch, early); });
    }
};

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::dispatch

void deep_ep::kernels::launch(const LowLatencyDispatchParams& params, dev::Stream stream) {
    using namespace low_latency;
    using namespace low_latency::dispatch;
    const auto table_bytes = TokenSets::bytes(params.call.num_experts, params.num_set_words, params.call.num_topk);
    const auto count_bytes = Counts::bytes(params.call);
    dev::LaunchConfig config;
    config.num_blocks = params.call.num_blocks;
    config.num_threads = kWarpSize * params.call.num_warps;
    config.name = "deep_ep::low_latency::dispatch";
    switch (params.call.phase) {
        case Phase::kSend: config.dynamic_shared_bytes = table_bytes; break;
        case Phase::kReceive: config.dynamic_shared_bytes = count_bytes; break;
        case Phase::kBoth: config.dynamic_shared_bytes = table_bytes > count_bytes ? table_bytes : count_bytes; break;
    }
    if (params.call.phase == Phase::kBoth)
        dev::launch<Kernel<Launches::kWhole>>(config, stream, params);
    else
        dev::launch<Kernel<Launches::kPhases>>(config, stream, params);
}
