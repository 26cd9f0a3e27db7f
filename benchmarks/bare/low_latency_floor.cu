// What a phase of low latency cannot be faster than, one GPU: a launch of 132 blocks of 14 warps, a trip for the rows of a
// token, and rows placed (or summed) in outputs as large as the real ones; and launches that are set up early.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 low_latency_floor.cu && ./a.out
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "check.h"

constexpr int kBlocks = 132, kWarps = 14, kTokens = 256, kTopk = 8, kParts = 7, kExperts = 144, kRowsOfExpert = 256;
constexpr int kRowVecs = 448;  // 7168 bytes
constexpr int kScaleWords = 56;

enum Work {
    kEmpty,
    kTrip,
    kTwoTrips,
    kPlace,
    kPlaceCompact,
    kPlaceScales,
    kPlaceTwoTrips,
    kPlacePrefetch,
    kSum,
    kSumCompact,
    kSumPrefetch
};
enum Begin { kNormal, kWaits, kTriggers };

struct Params {
    const int* rows;  // [tokens][topk], of this call; -1: not here
    const int* counts;
    uint4* out;
    uint4* in;
    float* scales;
    int* sink;
    char further[1700];
};

__device__ uint4 add(uint4 a, uint4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

template <int kWork> __device__ void place(const Params& p) {
    const int lane = threadIdx.x % 32, unit = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    const int token = unit / kParts, part = unit % kParts;
    if (token >= kTokens) return;
    int row = lane < kTopk ? p.rows[token * kTopk + lane] : -1;
    if (kWork == kTrip) {
        if (row == 1 << 30) p.sink[0] = row;
        return;
    }
    if (kWork == kPlacePrefetch && row >= 0)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.out + int64_t{row} * kRowVecs + part * 64));
    if (kWork == kTwoTrips || kWork == kPlaceTwoTrips || kWork == kPlacePrefetch) row += row >= 0 ? p.counts[row] : 0;
    if (kWork == kTwoTrips) {
        if (row == 1 << 30) p.sink[0] = row;
        return;
    }
    if (kWork == kPlaceCompact && row >= 0) row = row % 1024;
    uint4 held[2];
    for (int i = 0; i < 2; ++i) held[i] = {uint32_t(lane), uint32_t(part), uint32_t(token), 7u};
    const uint32_t lanes = __ballot_sync(~0u, row >= 0);
    if (kWork == kPlaceScales)
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
            const int target = __shfl_sync(~0u, row, __ffs(rest) - 1), expert = target / kRowsOfExpert;
            if (lane < 8)
                p.scales[(int64_t{expert} * kScaleWords + part * 8 + lane) * kRowsOfExpert + target % kRowsOfExpert] =
                    1.0f;
        }
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int target = __shfl_sync(~0u, row, __ffs(rest) - 1);
        for (int i = 0; i < 2; ++i) __stcs(p.out + int64_t{target} * kRowVecs + part * 64 + i * 32 + lane, held[i]);
    }
}

// Two tokens a block; bfloat16 rows of 896 vectors: 14 warps of two vectors a lane.
template <int kWork> __device__ void sum(const Params& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.x, second = first + gridDim.x;
    const int row[2] = {lane < kTopk ? p.rows[first * kTopk + lane] : -1,
                        lane < kTopk && second < kTokens ? p.rows[second * kTopk + lane] : -1};
    if (kWork == kSumPrefetch) {  // of the second token, a line each of this warp's chunk
        for (uint32_t rest = __ballot_sync(~0u, row[1] >= 0); rest != 0; rest &= rest - 1) {
            const int source = __shfl_sync(~0u, row[1], __ffs(rest) - 1);
            if (lane < 8)
                asm volatile(
                    "prefetch.global.L2 [%0];" ::"l"(p.in + int64_t{source} * 2 * kRowVecs + warp * 64 + lane * 8));
        }
    }
    for (int turn = 0; turn < 2; ++turn) {
        const int token = turn == 0 ? first : second;
        if (token >= kTokens) break;
        const int mine = kWork == kSumCompact && row[turn] >= 0 ? row[turn] % 1024 : row[turn];
        uint32_t rest = __ballot_sync(~0u, mine >= 0);
        uint4 sums[2] = {};
        while (rest != 0) {
            uint4 held[4][2];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (rest != 0) {
                    const int source = __shfl_sync(~0u, mine, __ffs(rest) - 1);
                    for (int j = 0; j < 2; ++j)
                        held[i][j] = __ldcs(p.in + int64_t{source} * 2 * kRowVecs + warp * 64 + j * 32 + lane);
                    rest &= rest - 1;
                } else {
                    held[i][0] = held[i][1] = {};
                }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 2; ++j) sums[j] = add(sums[j], held[i][j]);
        }
        for (int j = 0; j < 2; ++j) __stcs(p.out + int64_t{token} * 2 * kRowVecs + warp * 64 + j * 32 + lane, sums[j]);
    }
}

template <int kWork, int kBegin>
__global__ void __launch_bounds__(kWarps * 32, 1) run(const __grid_constant__ Params p) {
#if __CUDA_ARCH__ >= 900
    if (kBegin != kNormal) asm volatile("griddepcontrol.wait;" ::: "memory");
    if (kBegin == kTriggers) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    if (kWork == kEmpty) return;
    if (kWork >= kSum)
        sum<kWork>(p);
    else
        place<kWork>(p);
}

constexpr int kBuffers = 4, kLaunches = 40;

struct Data {
    Params params[kBuffers];
};

Data make_data() {
    Data data{};
    std::mt19937 random(1);
    int* sink;
    CHECK(cudaMalloc(&sink, 4));
    for (Params& p : data.params) {
        std::vector<int> rows(kTokens * kTopk, -1), used(kExperts, 0);
        for (int token = 0; token < kTokens; ++token)
            for (int k = 0; k < kTopk; ++k) {
                const int expert = int(random() % (2 * kExperts));
                if (expert < kExperts) rows[token * kTopk + k] = expert * kRowsOfExpert + used[expert]++;
            }
        int *device_rows, *counts;
        CHECK(cudaMalloc(&device_rows, rows.size() * 4));
        CHECK(cudaMemcpy(device_rows, rows.data(), rows.size() * 4, cudaMemcpyHostToDevice));
        CHECK(cudaMalloc(&counts, size_t{kExperts} * kRowsOfExpert * 4));
        CHECK(cudaMemset(counts, 0, size_t{kExperts} * kRowsOfExpert * 4));
        CHECK(cudaMalloc(&p.out, size_t{kExperts} * kRowsOfExpert * kRowVecs * 16));
        CHECK(cudaMalloc(&p.in, size_t{kExperts} * kRowsOfExpert * kRowVecs * 32));
        CHECK(cudaMalloc(&p.scales, size_t{kExperts} * kRowsOfExpert * kScaleWords * 4));
        p.rows = device_rows, p.counts = counts, p.sink = sink;
    }
    return data;
}

template <int kWork, int kBegin> void launch(cudaStream_t stream, const Params& params) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kBlocks), config.blockDim = dim3(kWarps * 32), config.stream = stream;
    config.attrs = &early, config.numAttrs = kBegin == kNormal ? 0 : 1;
    CHECK(cudaLaunchKernelEx(&config, run<kWork, kBegin>, params));
}

template <class Launch> float time_graph(cudaStream_t stream, const Launch& launch_all) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    launch_all();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 30; ++i) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaStreamSynchronize(stream));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        times.push_back(ms * 1000);
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

template <int kWork, int kBegin> void measure(const char* name, cudaStream_t stream, const Data& data) {
    const auto of = [&](int count) {
        return time_graph(stream, [&] {
            for (int i = 0; i < count; ++i) launch<kWork, kBegin>(stream, data.params[i % kBuffers]);
        });
    };
    const float few = of(4), many = of(4 + kLaunches);
    std::printf("%-34s %6.2f us each\n", name, (many - few) / kLaunches);
}

// Captures of a launch that is set up early, behind what is no kernel, or is of two streams.
void check_captures(cudaStream_t stream, const Data& data) {
    cudaStream_t other;
    cudaEvent_t forked, joined;
    CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&forked, cudaEventDisableTiming));
    CHECK(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming));
    const Params& p = data.params[0];
    time_graph(stream, [&] { launch<kTrip, kWaits>(stream, p); });
    std::printf("captured first: fine\n");
    time_graph(stream, [&] {
        CHECK(cudaMemsetAsync(p.sink, 0, 4, stream));
        launch<kTrip, kWaits>(stream, p);
    });
    std::printf("captured behind a memset: fine\n");
    time_graph(stream, [&] {
        launch<kTrip, kWaits>(stream, p);
        CHECK(cudaEventRecord(forked, stream));
        CHECK(cudaStreamWaitEvent(other, forked, 0));
        launch<kTrip, kWaits>(other, p);
        launch<kTrip, kWaits>(stream, p);
        CHECK(cudaEventRecord(joined, other));
        CHECK(cudaStreamWaitEvent(stream, joined, 0));
        launch<kTrip, kWaits>(stream, p);
    });
    std::printf("captured behind two streams: fine\n");
    for (int i = 0; i < 4; ++i) launch<kPlace, kWaits>(stream, p);
    CHECK(cudaMemsetAsync(p.sink, 0, 4, stream));
    for (int i = 0; i < 4; ++i) launch<kPlace, kWaits>(i % 2 == 0 ? stream : other, p);
    launch<kPlace, kWaits>(nullptr, p);
    launch<kPlace, kWaits>(cudaStreamPerThread, p);
    CHECK(cudaDeviceSynchronize());
    std::printf("streams: fine\n");
}

int main() {
    CHECK(cudaSetDevice(0));
    cudaFuncAttributes attributes{};
    CHECK(cudaFuncGetAttributes(&attributes, run<kPlace, kWaits>));
    std::printf("code of %d, from PTX of %d, %d registers\n", attributes.binaryVersion, attributes.ptxVersion,
                attributes.numRegs);
    if (std::getenv("ONLY_VERSIONS")) return 0;
    const Data data = make_data();
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int turn = 0; turn < 2; ++turn) {
        measure<kEmpty, kNormal>("empty", stream, data);
        measure<kEmpty, kWaits>("empty, waits", stream, data);
        measure<kEmpty, kTriggers>("empty, triggers", stream, data);
        measure<kTrip, kNormal>("a trip", stream, data);
        measure<kTwoTrips, kNormal>("two trips", stream, data);
        measure<kPlace, kNormal>("a trip, rows placed", stream, data);
        measure<kPlaceCompact, kNormal>("  in 7 MB", stream, data);
        measure<kPlaceScales, kNormal>("  with scales", stream, data);
        measure<kPlace, kWaits>("  waits", stream, data);
        measure<kPlace, kTriggers>("  triggers", stream, data);
        measure<kPlaceTwoTrips, kNormal>("two trips, rows placed", stream, data);
        measure<kPlacePrefetch, kNormal>("  prefetched in the first", stream, data);
        measure<kSum, kNormal>("rows summed", stream, data);
        measure<kSumCompact, kNormal>("  of 14 MB", stream, data);
        measure<kSumPrefetch, kNormal>("  second token's prefetched", stream, data);
        measure<kSum, kWaits>("  waits", stream, data);
        measure<kSum, kTriggers>("  triggers", stream, data);
    }
    check_captures(stream, data);
    return 0;
}
