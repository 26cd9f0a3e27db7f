// hold_sms: see hold_sms.h.
#include "bench/hold_sms.h"

#include "device/launch.h"
#include "device/prim.h"

namespace deep_ep::bench {
inline namespace EP_BACKEND {

constexpr int kNumHoldingThreads = 32;

struct HoldSms {
    using Params = HoldSmsParams;
    struct Shared {};
    static constexpr int kMaxThreads = kNumHoldingThreads;

    static EP_DEVICE void run(const Params& p, Shared&) {
        using prim::Order;
        using prim::Scope;
        if (threadIdx.x != 0) return;
        prim::fetch_add<Order::kRelaxed, Scope::kSys>(p.num_resident, 1u);
        const uint64_t begin = prim::clock_ns();
        while (prim::load_from_host(p.is_released) == 0 && prim::clock_ns() - begin < p.timeout_ns) prim::pause();
    }
};

}  // namespace EP_BACKEND

#if defined(EP_IS_CUDA_BACKEND)
void hold_sms_on_cuda(const HoldSmsParams& params, int num_sms, int shared_bytes, dev::Stream stream) {
#else
void hold_sms_on_cpu(const HoldSmsParams& params, int num_sms, int shared_bytes, dev::Stream stream) {
#endif
    dev::LaunchConfig config;
    config.num_blocks = num_sms;
    config.num_threads = kNumHoldingThreads;
    config.dynamic_shared_bytes = shared_bytes;
    config.name = "deep_ep::hold_sms";
    dev::launch<HoldSms>(config, stream, params);
}

}  // namespace deep_ep::bench
