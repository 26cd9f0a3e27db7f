// NVSHMEM's world for programs that the engine's library is linked into, kernels of the tests beside it.
#pragma once

#include "rail/nvshmem/world.h"

extern "C" {
const deep_ep::rail::nvshmem::Library* deep_ep_nvshmem_library();
void nvshmemx_vendor_get_version_info(int* major, int* minor, int* patch);
}

namespace deep_ep::testing {

inline rail::nvshmem::World& linked_world() {
    static rail::nvshmem::World world(
        *deep_ep_nvshmem_library(),
        [] {
            rail::nvshmem::Version loaded{};
            nvshmemx_vendor_get_version_info(&loaded.major, &loaded.minor, &loaded.patch);
            return loaded;
        }(),
        rail::nvshmem::Transport::kProxy);
    return world;
}

}  // namespace deep_ep::testing
