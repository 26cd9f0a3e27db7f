// The low-latency kernels once more, for groups of several nodes: see kernels/low_latency/reach.h. All of this unit lives in
// EP_NODES_BACKEND.
#define EP_ACROSS_NODES 1

#include "kernels/low_latency/clean.cu"
#include "kernels/low_latency/combine.cu"
#include "kernels/low_latency/dispatch.cu"
