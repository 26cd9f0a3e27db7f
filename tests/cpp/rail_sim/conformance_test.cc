// The conformance suite over the engine `sim`.
#include "rail/conformance.cu"
