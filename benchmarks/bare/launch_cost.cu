// What a launch costs the host by the size of its parameters, cooperative or not, through the runtime or the driver; and what it
// costs to ask whose the stream is.
//
//     nvcc -std=c++17 -O2 -arch=sm_90 -o launch_cost benchmarks/bare/launch_cost.cu -lcuda && taskset -c 4 ./launch_cost
//
// Least of 200 rounds of 20 launches, microseconds each. What came out: docs/performance/intranode.md, "The host".
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

constexpr int kBlocks = 132, kThreads = 448, kRounds = 200, kLaunches = 20;

template <int kBytes> struct Params { char bytes[kBytes]; };
template <int kBytes>
__global__ void __launch_bounds__(kThreads) kernel(const __grid_constant__ Params<kBytes> params) {
    if (threadIdx.x > kThreads) printf("%d", params.bytes[kBytes - 1]);
}

template <class Launch> double least_us(const Launch& launch) {
    double least = 1e9;
    for (int round = 0; round < kRounds; ++round) {
        cudaDeviceSynchronize();
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < kLaunches; ++i) launch();
        const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - start;
        least = std::min(least, spent.count() / kLaunches);
    }
    return least;
}

template <int kBytes> void measure() {
    Params<kBytes> params{};
    void* arguments[] = {&params};
    const auto function = reinterpret_cast<const void*>(&kernel<kBytes>);
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = kBlocks;
    config.blockDim = kThreads;
    config.attrs = &cooperative;
    const auto through_runtime = [&](unsigned num_attributes) {
        config.numAttrs = num_attributes;
        return least_us([&] { cudaLaunchKernelExC(&config, function, arguments); });
    };
    cudaFunction_t loaded = nullptr;
    cudaGetFuncBySymbol(&loaded, function);
    CUlaunchConfig driver_config{};
    driver_config.gridDimX = kBlocks;
    driver_config.gridDimY = driver_config.gridDimZ = 1;
    driver_config.blockDimX = kThreads;
    driver_config.blockDimY = driver_config.blockDimZ = 1;
    const double driver_us = least_us([&] { cuLaunchKernelEx(&driver_config, loaded, arguments, nullptr); });
    printf("%5d bytes: %5.2f, cooperative %5.2f, by the driver %5.2f   %s\n", kBytes, through_runtime(0),
           through_runtime(1), driver_us, cudaGetErrorString(cudaGetLastError()));
}

void measure_questions() {
    cudaStream_t stream = nullptr;
    cudaEvent_t event = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    cudaStreamCaptureStatus status;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    int device = 0;
#if CUDART_VERSION >= 12080
    printf("cudaStreamGetDevice %.3f, ", least_us([&] { cudaStreamGetDevice(stream, &device); }));
#endif
    printf("cudaGetDevice %.3f, cudaStreamIsCapturing %.3f, cudaThreadExchangeStreamCaptureMode %.3f, ",
           least_us([&] { cudaGetDevice(&device); }), least_us([&] { cudaStreamIsCapturing(stream, &status); }),
           least_us([&] { cudaThreadExchangeStreamCaptureMode(&mode); }));
    printf("cudaEventRecord %.3f\n", least_us([&] { cudaEventRecord(event, stream); }));
}

int main() {
    measure_questions();
    measure<64>();
    measure<64>();  // once more: the first one warms up
    measure<512>();
    measure<1024>();
    measure<1800>();
    measure<2500>();
    measure<4000>();
}
