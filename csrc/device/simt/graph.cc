#include "device/simt/graph.h"

#include "device/simt/core.h"

namespace deep_ep::simt {

void Graph::begin_capture(dev::Stream stream) {
    captured_ = stream;
    static_cast<StreamState*>(stream)->graph = this;
}

void Graph::end_capture() {
    static_cast<StreamState*>(captured_)->graph = nullptr;
    captured_ = nullptr;
}

void Graph::add(const dev::LaunchConfig& config, const KernelCode& code) {
    const auto* params = static_cast<const unsigned char*>(code.params);
    launches_.push_back({config, config.name, code, {params, params + code.params_bytes}});
}

void Graph::replay(dev::Stream stream) const {
    for (const Launch& launch : launches_) {
        dev::LaunchConfig config = launch.config;
        KernelCode code = launch.code;
        config.name = launch.name.c_str();
        code.params = launch.params.data();
        launch_kernel(config, stream, code);
    }
}

}  // namespace deep_ep::simt
