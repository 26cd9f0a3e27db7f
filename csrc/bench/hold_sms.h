// Other work on the device, as a kernel of this library meets it: blocks that have SMs to themselves until they are told.
#pragma once

#include <cstdint>

#include "device/runtime.h"

namespace deep_ep::bench {

struct HoldSmsParams {
    uint32_t* num_resident;       // blocks that have begun; counts on over launches
    const uint32_t* is_released;  // not 0: all blocks end
    uint64_t timeout_ns;          // and after so long in any case
};

// Each block takes all the shared memory that a block may have: nothing else fits on its SM.
void hold_sms_on_cpu(const HoldSmsParams& params, int num_sms, int shared_bytes, dev::Stream stream);
void hold_sms_on_cuda(const HoldSmsParams& params, int num_sms, int shared_bytes, dev::Stream stream);  // EP_WITH_CUDA

}  // namespace deep_ep::bench
