// CHECK(call): ends the program where the CUDA runtime refuses something.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define CHECK(call) check_call((call), #call, __FILE__, __LINE__)

inline void check_call(cudaError_t error, const char* call, const char* file, int line) {
    if (error == cudaSuccess) return;
    std::fflush(stdout);
    std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, call, cudaGetErrorString(error));
    std::_Exit(1);  // no destructors: those of NVSHMEM wait for the other process
}
