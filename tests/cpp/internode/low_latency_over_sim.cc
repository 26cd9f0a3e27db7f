// The low-latency kernels across nodes once more, over the engine `sim`: see kernels_over_sim.cc.
#include "kernels/internode/low_latency.cu"
