#include "rail/make_engine.h"

#include "core/error.h"
#include "rail/host/host_engine.h"

namespace deep_ep::rail {

std::unique_ptr<Engine> make_engine(const std::shared_ptr<dev::Device>& device, const EngineOptions& options) {
    const EngineChoice& choice = options.choice;
    EP_CHECK(choice.name == "host", "DEEP_EP_RAIL: expected 'host' or nothing ('host'), got '", choice.name, "'");
    return std::make_unique<host::HostEngine>(device, host::HostOptions{.rank = options.rank,
                                                                        .window_bytes = options.window_bytes,
                                                                        .interface = choice.interface,
                                                                        .reach = choice.reach,
                                                                        .timeout_s = options.timeout_s});
}

}  // namespace deep_ep::rail
