// How the executor's thread-local words are reached.
//
// initial-exec is the quickest, but the loader keeps only some hundred bytes for libraries that come by dlopen, as a
// Python extension does, and then wants all thread-local memory of the library there. The static CUDA runtime has 4 KiB
// of it: an extension with both would not load. (Not TLS descriptors either: glibc before 2.40 may clobber vector
// registers in them.)
#pragma once

#if EP_WITH_CUDA
#define EP_SIMT_TLS __attribute__((tls_model("local-dynamic")))
#else
#define EP_SIMT_TLS __attribute__((tls_model("initial-exec")))
#endif
