// Which warp of a block has which part of its dynamic shared memory.
#pragma once

#include "device/prim.h"
#include "kernels/params.h"

namespace deep_ep::kernels {

constexpr int staging_bytes(const Geometry& geometry) {
    return geometry.num_send_warps * geometry.send.bytes() + geometry.num_recv_warps * geometry.recv.bytes();
}

inline namespace EP_BACKEND {

EP_DEVICE uint8_t* send_memory(const Geometry& geometry, int send_warp) {
    return static_cast<uint8_t*>(prim::dynamic_shared()) + send_warp * geometry.send.bytes();
}

EP_DEVICE uint8_t* recv_memory(const Geometry& geometry, int recv_warp) {
    return send_memory(geometry, geometry.num_send_warps) + recv_warp * geometry.recv.bytes();
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
