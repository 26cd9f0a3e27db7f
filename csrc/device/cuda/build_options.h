// Build switches of the CUDA half, under the names the build gives them and the names that callers who compile these
// sources themselves have always used.
#pragma once

#if defined(DISABLE_SM90_FEATURES) || (defined(EP_DISABLE_SM90_FEATURES) && EP_DISABLE_SM90_FEATURES)
#define EP_HAS_SM90_FEATURES 0
#else
#define EP_HAS_SM90_FEATURES 1
#endif

#if defined(DISABLE_AGGRESSIVE_PTX_INSTRS) || (defined(EP_DISABLE_AGGRESSIVE_PTX) && EP_DISABLE_AGGRESSIVE_PTX)
#define EP_HAS_CACHE_HINTS 0
#else
#define EP_HAS_CACHE_HINTS 1
#endif
