// low_latency_combine: each token's owner gets one row back from each rank that worked on it, and sums them.
//
//   send     our top-k weights to every rank; then, for each token of any source that has experts here: sum of
//            weight x row over those experts in FP32, rounded once, into a slot at its owner, one flag. With a hook, and
//            without the owner's weights: the rows instead, which the owner sums in the same way
//   receive  each token is shared by several warps: wait for the flags of its ranks, sum in FP32 in rank order, write
//
// Messages, buffer map and orderings: docs/protocols/low_latency.md.
#include "device/launch.h"
#include "kernels/low_latency/combine_send_phase.h"
#include "kernels/params.h"

namespace deep_ep::kernels::low_latency::combine {
inline namespace EP_BACKEND {

// One kernel for each format: the packing of the logarithmic one costs registers.
template <Launches kLaunches, bool kIsLogfmt, bool kUsesPackets> struct Kernel {
    using Params = LowLatencyCombineParams;
    using Send = Sender<kIsLogfmt, kUsesPackets>;
    using Receive = Receiver<kIsLogfmt, kUsesPackets>;
    using Shared = typename Send::Shared;
    static constexpr int kMaxThreads = kMaxLowLatencyThreads;
    static constexpr int kMinBlocks = 1;

    static EP_DEVICE void run(const Params& p, Shared& shared) {
        run_launch<kLaunches, kUsesPackets>(
            p.call, layout::Operation::kLowLatencyCombine, shared.role,
            [&](LaunchSession& launch) { Send::send(Block{}, p, launch, shared); },
            [&](const CallContext& c) { return Receive::look_early(Warp{}, p, c); },
            [&](const LaunchSession& launch, const typename Receive::EarlyToken& early) {
                Receive::receive(Block{}, p, launch, early);
            });
    }
};

template <bool kIsLogfmt, bool kUsesPackets>
void launch_with(const dev::LaunchConfig& config, dev::Stream stream, const LowLatencyCombineParams& params) {
    if (params.call.phase == Phase::kBoth)
        dev::launch<Kernel<Launches::kWhole, kIsLogfmt, kUsesPackets>>(config, stream, params);
    else
        dev::launch<Kernel<Launches::kPhases, kIsLogfmt, kUsesPackets>>(config, stream, params);
}

template <bool kIsLogfmt>
void launch_format(const dev::LaunchConfig& config, dev::Stream stream, const LowLatencyCombineParams& params) {
    if (params.call.uses_packets)
        launch_with<kIsLogfmt, true>(config, stream, params);
    else
        launch_with<kIsLogfmt, false>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::low_latency::combine

void deep_ep::kernels::launch(const LowLatencyCombineParams& params, dev::Stream stream) {
    using namespace low_latency;
    using namespace low_latency::combine;
    dev::LaunchConfig config;
    config.num_blocks = params.call.num_blocks;
    config.num_threads = kWarpSize * params.call.num_warps;
    config.name = "deep_ep::low_latency::combine";
    if (params.uses_logfmt)
        launch_format<true>(config, stream, params);
    else
        launch_format<false>(config, stream, params);
}
