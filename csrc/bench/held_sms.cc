#include "bench/held_sms.h"

#include "bench/hold_sms.h"
#include "core/error.h"

namespace deep_ep::bench {

namespace {

constexpr int kUnusedBytes = 16;  // the kernel's static shared memory; no other block fits in them

}  // namespace

HeldSms::HeldSms(std::shared_ptr<dev::Device> device)
    : device_(std::move(device)),
      memory_(device_, device_->allocate_host_mapped(sizeof(Words))),
      stream_(device_, device_->create_stream()) {}

HeldSms::~HeldSms() {
    release();
    try {
        synchronize();
    } catch (const Error&) {  // of a kernel, not of ours: whoever waits for that one hears of it
    }
}

void HeldSms::hold(int num_sms, double timeout_s, dev::Stream stream) {
    EP_CHECK(num_sms >= 0 && num_sms <= device_->num_sms(), "num_sms must be in [0, ", device_->num_sms(), "], got ",
             num_sms);
    if (num_sms == 0) return;
    num_before_ = words().num_resident.load();
    words().is_released.store(0);
    const int shared_bytes = device_->max_shared_bytes() - kUnusedBytes;
    auto* device_words = static_cast<uint32_t*>(memory_.get().device);
    const HoldSmsParams params{.num_resident = device_words,
                               .is_released = device_words + 1,
                               .timeout_ns = static_cast<uint64_t>(timeout_s * 1e9)};
    if (stream == nullptr) stream = stream_.get();
    const dev::CurrentDevice current(*device_);
#if EP_WITH_CUDA
    if (device_->kind() == dev::DeviceKind::kCuda) return hold_sms_on_cuda(params, num_sms, shared_bytes, stream);
#endif
    hold_sms_on_cpu(params, num_sms, shared_bytes, stream);
}

int HeldSms::num_held() const { return static_cast<int>(words().num_resident.load() - num_before_); }

void HeldSms::release() { words().is_released.store(1); }

}  // namespace deep_ep::bench
