// Launches that are recorded and run again without the host code that made them, as a CUDA graph does: for tests of what
// must not depend on the host.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "device/launch.h"

namespace deep_ep::simt {

class Graph {
public:
    // Kernels launched on `stream` go into this graph instead of running, until end_capture(). Nothing else may be
    // submitted to it meanwhile.
    void begin_capture(dev::Stream stream);
    void end_capture();
    void replay(dev::Stream stream) const;

    void add(const dev::LaunchConfig& config, const KernelCode& code);

private:
    struct Launch {
        dev::LaunchConfig config;
        std::string name;
        KernelCode code;
        std::vector<unsigned char> params;
    };

    std::vector<Launch> launches_;
    dev::Stream captured_ = nullptr;
};

}  // namespace deep_ep::simt
