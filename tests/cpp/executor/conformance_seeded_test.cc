// The conformance tests again, in a random order of execution and with bulk copies that finish at random times.
#include "device/conformance_prim.cu"
#include "device/conformance_warp.cu"
#include "device/simt/device.h"

namespace deep_ep::testing {

std::shared_ptr<dev::Device> test_device() {
    struct Seeded {
        simt::Scheduler scheduler{{.seed = 20250117, .bulk = simt::BulkMode::kRandom}};
        simt::SimtDevice device{scheduler, 0};
    };
    static const auto seeded = std::make_shared<Seeded>();
    return {seeded, &seeded->device};
}

}  // namespace deep_ep::testing
