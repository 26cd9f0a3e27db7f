// Which device this translation unit is compiled for, and what handles of either device look like. The only place that asks the
// compiler.
//
// Every kernel source is compiled twice: by nvcc (the CUDA half) and by the host compiler (the SIMT executor). Both
// sets of objects end up in one extension, so whatever is compiled for a device lives in the inline namespace
// EP_BACKEND: equal source, different mangled names. The low-latency kernels are compiled once more for groups of several nodes
// (EP_ACROSS_NODES, in the source that does it), and for the same reason all of that unit lives in EP_NODES_BACKEND.
#pragma once

#if defined(__CUDACC__)
#define EP_IS_CUDA_BACKEND 1
#define EP_NODES_BACKEND cuda_nodes_backend
#if defined(EP_ACROSS_NODES)
#define EP_BACKEND EP_NODES_BACKEND
#else
#define EP_BACKEND cuda_backend
#endif
#define EP_DEVICE __device__ __forceinline__
#define EP_HOST_DEVICE __host__ __device__ __forceinline__
// What is hardly ever called: one copy, outside the caller's registers. Arguments by value.
#define EP_DEVICE_COLD inline __device__ __noinline__
#else
#define EP_NODES_BACKEND simt_nodes_backend
#if defined(EP_ACROSS_NODES)
#define EP_BACKEND EP_NODES_BACKEND
#else
#define EP_BACKEND simt_backend
#endif
#define EP_DEVICE inline
#define EP_HOST_DEVICE inline
#define EP_DEVICE_COLD __attribute__((noinline, cold)) inline
#endif

namespace deep_ep::dev {
// Opaque: cudaStream_t / cudaEvent_t on CUDA (torch's own may be passed in), pointers to the executor's objects on the CPU.
using Stream = void*;
using Event = void*;
}  // namespace deep_ep::dev
