// Which NVIDIA driver a CUDA runtime needs, in words. Versions are CUDA's numbers: 12040 is CUDA 12.4.
#pragma once

#include <string>

#include "core/error.h"

namespace deep_ep {

// What is compiled in, and what the driver of this machine can serve. 0: there is no such thing here.
struct CudaVersions {
    int runtime = 0;
    int driver = 0;
};

inline std::string format_cuda_version(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

// The oldest Linux driver of a runtime: all runtimes of one major version share it (CUDA's minor version compatibility).
inline std::string driver_floor(int runtime) {
    switch (runtime / 1000) {
        case 11: return "450.80.02";
        case 12: return "525.60.13";
        case 13: return "580.65.06";
        default: return "";
    }
}

// Says what is too old and what to do; empty where the driver suffices.
inline std::string describe_old_driver(const CudaVersions& versions) {
    if (versions.runtime / 1000 <= versions.driver / 1000) return "";
    const std::string floor = driver_floor(versions.runtime);
    const std::string driver = versions.driver == 0
                                   ? "this machine has none"
                                   : "this machine's serves CUDA " + format_cuda_version(versions.driver);
    return concat("this build of deep_ep_cpp has the runtime of CUDA ", format_cuda_version(versions.runtime),
                  ", which needs NVIDIA driver ", floor.empty() ? "of the same CUDA" : floor, " or newer, and ", driver,
                  ": update the driver, or build with an older toolkit (docs/packaging.md)");
}

}  // namespace deep_ep
