// low_latency_combine: each token's owner gets one row back from each rank that worked on it, and sums them.
//
//   send     our top-k weights to every rank; then, for each token of any source that has experts here: sum of
//            weight x row over those experts in FP32, rounded once, into the token's slot at its owner, one flag
//   receive  each token is shared by several warps: wait for the flags of its ranks, sum in FP32 in rank order, write
//
// Messages, buffer map and orderings: docs/protocols/low_latency.md.
#include "device/launch.h"
#include "kernels/low_latency/combine_receive.h"
#include "kernels/low_latency/combine_send.h"
#include "kernels/low_latency/launchers.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

// One kernel for each phase and format: the packing of the logarithmic one costs registers.
template <Phase kPhase, bool kIsLogfmt> struct Kernel {
    using Params = LowLatencyCombineParams;
    static constexpr int kMaxThreads = kMaxLowLatencyThreads;
    static constexpr int kMinBlocks = 1;
    struct Shared {
        Block block;
    };

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        const Context context = make_context(p.call, layout::Operation::kLowLatencyCombine, kPhase);
        if constexpr (kPhase == Phase::kReceive)
            begin_receive(context);
        else
            send<kIsLogfmt>(p, context, &shared.block);
        if constexpr (kPhase != Phase::kSend)
            if (kPhase == Phase::kReceive || shared.block.receives != 0) receive<kIsLogfmt>(p, context, &shared.block);
        add_statistics(context, &shared.block);
    }
};

template <bool kIsLogfmt>
void launch_phase(dev::LaunchConfig config, dev::Stream stream, const LowLatencyCombineParams& params) {
    if (params.call.phase == Phase::kReceive)
        return dev::launch<Kernel<Phase::kReceive, kIsLogfmt>>(config, stream, params);
    config.dynamic_shared_bytes = params.batch.bytes;
    if (params.call.phase == Phase::kSend) return dev::launch<Kernel<Phase::kSend, kIsLogfmt>>(config, stream, params);
    dev::launch<Kernel<Phase::kBoth, kIsLogfmt>>(config, stream, params);
}

void launch(const LowLatencyCombineParams& params, dev::Stream stream) {
    dev::LaunchConfig config;
    config.num_blocks = params.call.num_blocks;
    config.num_threads = kWarpSize * params.call.num_warps;
    config.name = "deep_ep::low_latency::combine";
    if (params.uses_logfmt)
        launch_phase<true>(config, stream, params);
    else
        launch_phase<false>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine
