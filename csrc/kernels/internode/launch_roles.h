// How a kernel of three roles is launched: send, forward and receive (or reduce) warps side by side in every block.
#pragma once

#include "core/error.h"
#include "device/launch.h"
#include "device/prim.h"
#include "kernels/params_internode.h"

namespace deep_ep::kernels::internode {
inline namespace EP_BACKEND {

// `num_stream_warps`: of the role that serves streams inside the node, see can_serve().
template <class Kernel>
void launch_roles(const char* operation, const char* name, const typename Kernel::Params& params, int num_stream_warps,
                  dev::Stream stream) {
    const Geometry& geometry = params.geometry;
    EP_ENSURE(can_serve(params.heap, geometry, params.rail, num_stream_warps, params.loan.x != 0), operation,
              " across nodes has too few warps for its streams");
    dev::LaunchConfig config;
    config.num_blocks = geometry.num_blocks;
    config.num_threads =
        prim::kWarpSize * (geometry.num_send_warps + params.rail.num_forward_warps + geometry.num_recv_warps);
    config.is_cooperative = true;
    config.name = name;
    dev::launch<Kernel>(config, stream, params);
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels::internode
