#include "rail/make_engine.h"

#include "core/error.h"
#include "rail/host/host_engine.h"
#include "rail/nvshmem/loader.h"
#include "rail/nvshmem/nvshmem_engine.h"

namespace deep_ep::rail {

std::unique_ptr<Engine> make_engine(const std::shared_ptr<dev::Device>& device, const EngineOptions& options) {
    const EngineChoice& choice = options.choice;
    if (choice.name == "nvshmem") {
        EP_CHECK(device->kind() == dev::DeviceKind::kCuda, "the engine nvshmem works on GPUs only");
        return std::make_unique<nvshmem::NvshmemEngine>(
            device, nvshmem::loaded_world(),
            nvshmem::NvshmemOptions{.rank = options.rank, .window_bytes = options.window_bytes});
    }
    EP_CHECK(choice.name == "host", "rail: expected 'host' or 'nvshmem', got '", choice.name, "'");
    return std::make_unique<host::HostEngine>(device, host::HostOptions{.rank = options.rank,
                                                                        .window_bytes = options.window_bytes,
                                                                        .interface = choice.interface,
                                                                        .reach = choice.reach,
                                                                        .timeout_s = options.timeout_s,
                                                                        .shares_window = options.shares_window});
}

}  // namespace deep_ep::rail
