// What NVSHMEM's own puts carry between two GPUs that reach each other, and what stores through nvshmem_ptr() carry: the
// ceiling of the rail over the engine `nvshmem`, without any of this project's code. Two processes, both ways at once.
//
//   N=$(python3 -c "import nvidia.nvshmem as n; print(list(n.__path__)[0])")
//   nvcc -std=c++17 -O3 -rdc=true -arch=sm_90 -I$N/include benchmarks/bare/nvshmem_puts.cu -o puts \
//        -L$N/lib -lnvshmem_device -l:libnvshmem_host.so.3 -lcuda -Xlinker -rpath=$N/lib
//   ./puts [SMs] [MiB]
//
// Each way moves the same bytes in chunks, with a flag after each chunk. A warp has 16-byte stores only, so what counts is
// how many of them are under way.
#include <cuda_runtime.h>
#include <nvshmem.h>
#include <nvshmemx.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"

enum Way { kPutWarp, kPutWarpNoFlag, kPutBlock, kStoreWarp, kStoreBlock, kNumWays };
const char* const kNames[] = {"put by a warp", "the same, no flags", "put by a block", "stores by a warp",
                              "stores by a block"};

struct Shape {
    char *src, *dst;
    uint64_t* flags;
    int peer;
    size_t chunk_bytes;
    int num_chunks;
    uint64_t call;
};

template <int kUnroll> __device__ void copy(char* dst, const char* src, size_t bytes, int rank, int size) {
    auto* to = reinterpret_cast<int4*>(dst);
    const auto* from = reinterpret_cast<const int4*>(src);
    const int count = static_cast<int>(bytes / 16);
    int i = rank;
    for (; i + (kUnroll - 1) * size < count; i += kUnroll * size) {
        int4 held[kUnroll];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) held[k] = __ldcs(from + i + k * size);
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) __stcs(to + i + k * size, held[k]);
    }
    for (; i < count; i += size) __stcs(to + i, __ldcs(from + i));
}

template <Way kWay> __global__ void __launch_bounds__(1024) move(Shape s) {
    constexpr bool kByBlock = kWay == kPutBlock || kWay == kStoreBlock;
    const int warps = blockDim.x / 32;
    const int worker = kByBlock ? blockIdx.x : threadIdx.x / 32 * gridDim.x + blockIdx.x;
    const int workers = kByBlock ? gridDim.x : gridDim.x * warps;
    for (int i = worker; i < s.num_chunks; i += workers) {
        char* dst = s.dst + i * s.chunk_bytes;
        const char* src = s.src + i * s.chunk_bytes;
        if constexpr (kWay == kPutWarp)
            nvshmemx_putmem_signal_nbi_warp(dst, src, s.chunk_bytes, s.flags + i, s.call, NVSHMEM_SIGNAL_SET, s.peer);
        if constexpr (kWay == kPutWarpNoFlag) nvshmemx_putmem_nbi_warp(dst, src, s.chunk_bytes, s.peer);
        if constexpr (kWay == kPutBlock)
            nvshmemx_putmem_signal_nbi_block(dst, src, s.chunk_bytes, s.flags + i, s.call, NVSHMEM_SIGNAL_SET, s.peer);
        if constexpr (kWay == kStoreWarp) {
            copy<8>(static_cast<char*>(nvshmem_ptr(dst, s.peer)), src, s.chunk_bytes, threadIdx.x % 32, 32);
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                __threadfence_system();
                nvshmemx_signal_op(s.flags + i, s.call, NVSHMEM_SIGNAL_SET, s.peer);
            }
        }
        if constexpr (kWay == kStoreBlock) {
            copy<4>(static_cast<char*>(nvshmem_ptr(dst, s.peer)), src, s.chunk_bytes, threadIdx.x, blockDim.x);
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence_system();
                nvshmemx_signal_op(s.flags + i, s.call, NVSHMEM_SIGNAL_SET, s.peer);
            }
        }
    }
    if (threadIdx.x == 0 && kWay == kPutWarpNoFlag) nvshmem_quiet();
}

template <Way kWay> double gb_per_s(Shape& s, int blocks, int threads, cudaStream_t stream) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<double> rates;
    for (int i = 0; i < 6; ++i) {
        ++s.call;
        nvshmemx_barrier_all_on_stream(stream);
        CHECK(cudaEventRecord(begin, stream));
        move<kWay><<<blocks, threads, 0, stream>>>(s);
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaStreamSynchronize(stream));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i > 0) rates.push_back(s.chunk_bytes * s.num_chunks / ms / 1e6);
    }
    std::sort(rates.begin(), rates.end());
    return rates[rates.size() / 2];
}

int main(int argc, char** argv) {
    const int blocks = argc > 1 ? std::atoi(argv[1]) : 24;
    const size_t total = size_t(argc > 2 ? std::atoi(argv[2]) : 32) << 20;
    int pipes[2];
    if (pipe(pipes) != 0) return 1;
    const int rank = fork() == 0 ? 1 : 0;
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (rank == 0) {
        nvshmemx_get_uniqueid(&id);
        if (write(pipes[1], &id, sizeof(id)) != sizeof(id)) return 1;
    } else if (read(pipes[0], &id, sizeof(id)) != sizeof(id)) {
        return 1;
    }
    CHECK(cudaSetDevice(rank));
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    nvshmemx_set_attr_uniqueid_args(rank, 2, &id, &attributes);
    nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
    Shape s{};
    s.src = static_cast<char*>(nvshmem_malloc(total));
    s.dst = static_cast<char*>(nvshmem_malloc(total));
    s.flags = static_cast<uint64_t*>(nvshmem_calloc(total / 4096, 8));
    s.peer = 1 - rank;
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    std::vector<unsigned char> noise(total);
    for (size_t i = 0; i < total; ++i) noise[i] = static_cast<unsigned char>((i * 2654435761u) >> 13);
    CHECK(cudaMemcpy(s.src, noise.data(), total, cudaMemcpyHostToDevice));
    if (rank == 0)
        std::printf("%d blocks; GB/s of each way\n%6s %9s %18s %18s %18s %18s %18s\n", blocks, "warps", "chunk",
                    kNames[0], kNames[1], kNames[2], kNames[3], kNames[4]);
    for (const int warps : {8, 12, 24}) {
        for (const size_t kib : {4, 16, 64, 128, 256, 1024}) {
            s.chunk_bytes = kib << 10;
            s.num_chunks = static_cast<int>(total / s.chunk_bytes);
            const double rates[] = {gb_per_s<kPutWarp>(s, blocks, 32 * warps, stream),
                                    gb_per_s<kPutWarpNoFlag>(s, blocks, 32 * warps, stream),
                                    gb_per_s<kPutBlock>(s, blocks, 32 * warps, stream),
                                    gb_per_s<kStoreWarp>(s, blocks, 32 * warps, stream),
                                    gb_per_s<kStoreBlock>(s, blocks, 32 * warps, stream)};
            if (rank != 0) continue;
            std::printf("%6d %5zu KiB", warps, kib);
            for (const double rate : rates) std::printf(" %18.1f", rate);
            std::printf("\n");
            std::fflush(stdout);
        }
    }
    nvshmem_barrier_all();
    if (rank == 0) wait(nullptr);
    std::_Exit(0);
}
