// Which warp of a block has which part of its dynamic shared memory.
#pragma once

#include "device/prim.h"
#include "kernels/params.h"

namespace deep_ep::kernels {

constexpr int staging_bytes(const Geometry& geometry) { return geometry.num_send_warps * geometry.send.bytes(); }

inline namespace EP_BACKEND {

EP_DEVICE uint8_t* send_memory(const Geometry& geometry, int send_warp) {
    return static_cast<uint8_t*>(prim::dynamic_shared()) + send_warp * geometry.send.bytes();
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
