// The SIMT half of launch.h.
#pragma once

#include <cstddef>
#include <type_traits>

#include "device/simt/cuda_names.h"

namespace deep_ep::simt {

// A kernel without its type: what the executor needs to run it.
struct KernelCode {
    void (*run)(const void* params, void* shared);
    const void* params;
    size_t params_bytes;
    size_t shared_bytes;
    size_t shared_alignment;
};

void launch_kernel(const dev::LaunchConfig& config, dev::Stream stream, const KernelCode& code);

}  // namespace deep_ep::simt

namespace deep_ep::dev {
inline namespace EP_BACKEND {

template <class K> void launch(const LaunchConfig& config, Stream stream, const typename K::Params& params) {
    using Params = typename K::Params;
    using Shared = typename K::Shared;
    static_assert(std::is_trivially_copyable_v<Params>, "kernel parameters are copied as bytes");
    static_assert(std::is_trivially_default_constructible_v<Shared>, "shared memory is not initialised");
    const simt::KernelCode code{
        .run = [](const void* bytes,
                  void* shared) { K::run(*static_cast<const Params*>(bytes), *static_cast<Shared*>(shared)); },
        .params = &params,
        .params_bytes = sizeof(Params),
        .shared_bytes = std::is_empty_v<Shared> ? 0 : sizeof(Shared),
        .shared_alignment = alignof(Shared),
    };
    simt::launch_kernel(config, stream, code);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::dev
