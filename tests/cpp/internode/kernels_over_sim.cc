// The kernels across nodes once more, over the engine `sim`. Defined here, they are not taken from the library, whose engine is
// `host`.
#include "kernels/internode/combine.cu"
#include "kernels/internode/dispatch.cu"
#include "kernels/internode/notify.cu"
