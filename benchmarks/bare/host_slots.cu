// Rows between two GPUs through slots in pinned host memory, with a flag for each row and one back for each slot: what limits
// the heap in host memory (DEEP_EP_HEAP=host), without any of this project's code.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 benchmarks/bare/host_slots.cu -o host_slots && ./host_slots
//
// One process, both ways at once; 4096 rows a way, 16 blocks of send and receive warps, as dispatch has them. Prints
// microseconds and GB/s of each way.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.h"

constexpr int kRows = 4096, kBlocks = 16;

struct Shape {
    const char* x;    // rows to send, in GPU memory
    char *out, *own;  // rows received, and kept, in GPU memory
    int* words;
    char *to_slots, *my_slots;  // host
    char *to_full, *my_full;    // flags, host: at the receiver
    char *my_empty, *to_empty;  // flags, host: at the sender
    int row_bytes, window, flag_stride, send_warps, recv_warps;
    int sleep_ns;        // between polls
    int batch;           // rows to a flag
    int metadata_words;  // written and read word by word behind each row, as dispatch's scales and ids are
    bool keeps_own;      // each row also goes to this GPU's own memory, as in dispatch
    unsigned long long call;
};

__device__ unsigned long long look(const char* flag) {
    unsigned long long value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
    return value;
}
__device__ void mark(char* flag, unsigned long long value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ void wait_for(const char* flag, unsigned long long value, int sleep_ns) {
    if (threadIdx.x % 32 == 0) {
        while (look(flag) < value) __nanosleep(sleep_ns);
        asm volatile("fence.acq_rel.sys;" ::: "memory");
    }
    __syncwarp();
}
__device__ void copy_row(char* to, const char* from, int bytes) {
    auto* t = reinterpret_cast<int4*>(to);
    const auto* f = reinterpret_cast<const int4*>(from);
    const int count = bytes / 16, lane = threadIdx.x % 32;
    int i = lane;
    for (; i + 6 * 32 < count; i += 7 * 32) {
        int4 held[7];
#pragma unroll
        for (int k = 0; k < 7; ++k) held[k] = __ldcv(f + i + k * 32);
#pragma unroll
        for (int k = 0; k < 7; ++k) __stcs(t + i + k * 32, held[k]);
    }
    for (; i < count; i += 32) __stcs(t + i, __ldcv(f + i));
}

__device__ void write_words(char* to, int count) {
    for (int i = threadIdx.x % 32; i < count; i += 32) reinterpret_cast<volatile int*>(to)[i] = i;
}
__device__ void read_words(int* to, const char* from, int count) {
    for (int i = threadIdx.x % 32; i < count; i += 32) to[i] = reinterpret_cast<const int*>(from)[i];
}

__global__ void __launch_bounds__(1024) exchange(Shape s) {
    const int warp = threadIdx.x / 32;
    const bool is_sender = warp < s.send_warps;
    const int worker = (is_sender ? warp : warp - s.send_warps) * gridDim.x + blockIdx.x;
    const int workers = (is_sender ? s.send_warps : s.recv_warps) * gridDim.x;
    const unsigned long long base = s.call << 24;
    const int stride = s.row_bytes + (s.metadata_words > 0 ? 384 : 0);
    for (int first = worker * s.batch; first < kRows; first += workers * s.batch) {
        const int slot = first % s.window, last = first + s.batch - 1;
        const int flag = slot / s.batch;
        if (is_sender) {
            if (first >= s.window)
                wait_for(s.my_empty + int64_t(flag) * s.flag_stride, base + first - s.window + 1, s.sleep_ns);
            for (int i = 0; i < s.batch; ++i) {
                char* to = s.to_slots + int64_t(slot + i) * stride;
                copy_row(to, s.x + int64_t(first + i) * s.row_bytes, s.row_bytes);
                if (s.keeps_own)
                    copy_row(s.own + int64_t(first + i) * s.row_bytes, s.x + int64_t(first + i) * s.row_bytes,
                             s.row_bytes);
                write_words(to + s.row_bytes, s.metadata_words);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) mark(s.to_full + int64_t(flag) * s.flag_stride, base + first + 1);
        } else {
            wait_for(s.my_full + int64_t(flag) * s.flag_stride, base + first + 1, s.sleep_ns);
            for (int i = 0; i < s.batch; ++i) {
                const char* from = s.my_slots + int64_t(slot + i) * stride;
                copy_row(s.out + int64_t(first + i) * s.row_bytes, from, s.row_bytes);
                read_words(s.words + int64_t(first + i) * 96, from + s.row_bytes, s.metadata_words);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0 && last + s.window < kRows)
                mark(s.to_empty + int64_t(flag) * s.flag_stride, base + first + 1);
        }
    }
}

char* pinned(size_t bytes, bool huge) {
    const int file = memfd_create("slots", 0);
    if (ftruncate(file, bytes) != 0) std::exit(1);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (huge) madvise(memory, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < bytes; i += 4096) static_cast<volatile char*>(memory)[i] = 0;
    CHECK(cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped));
    return static_cast<char*>(memory);
}

int main() {
    const size_t slots = size_t(72) << 20, flags = size_t(4) << 20;
    Shape s[2]{};
    cudaStream_t stream[2];
    cudaEvent_t begin[2], end[2];
    for (int g = 0; g < 2; ++g) {
        CHECK(cudaSetDevice(g));
        CHECK(cudaFree(nullptr));
        CHECK(cudaStreamCreate(&stream[g]));
        CHECK(cudaEventCreate(&begin[g]));
        CHECK(cudaEventCreate(&end[g]));
        CHECK(cudaMalloc(const_cast<char**>(&s[g].x), kRows * 14336));
        CHECK(cudaMalloc(&s[g].out, kRows * 14336));
        CHECK(cudaMalloc(&s[g].own, kRows * 14336));
        CHECK(cudaMalloc(&s[g].words, kRows * 96 * 4));
    }
    char* memory[2];
    for (int g = 0; g < 2; ++g) memory[g] = pinned(slots + 2 * flags, false);
    for (int g = 0; g < 2; ++g) {
        s[g].my_slots = memory[g], s[g].my_full = memory[g] + slots, s[g].my_empty = memory[g] + slots + flags;
        s[g].to_slots = memory[1 - g], s[g].to_full = memory[1 - g] + slots,
        s[g].to_empty = memory[1 - g] + slots + flags;
    }
    unsigned long long call = 0;
    auto run = [&](const char* name, int row_bytes, int window, int stride, int send, int recv, int sleep, int batch,
                   int words = 0, bool keeps_own = false) {
        std::vector<float> times;
        for (int i = 0; i < 4; ++i) {
            ++call;
            for (int g = 0; g < 2; ++g) {
                s[g].row_bytes = row_bytes, s[g].window = window, s[g].flag_stride = stride;
                s[g].send_warps = send, s[g].recv_warps = recv, s[g].sleep_ns = sleep, s[g].batch = batch,
                s[g].call = call;
                s[g].metadata_words = words, s[g].keeps_own = keeps_own;
                CHECK(cudaSetDevice(g));
                CHECK(cudaEventRecord(begin[g], stream[g]));
                exchange<<<kBlocks, 32 * (send + recv), 0, stream[g]>>>(s[g]);
                CHECK(cudaEventRecord(end[g], stream[g]));
            }
            float worst = 0;
            for (int g = 0; g < 2; ++g) {
                CHECK(cudaSetDevice(g));
                CHECK(cudaStreamSynchronize(stream[g]));
                float ms = 0;
                CHECK(cudaEventElapsedTime(&ms, begin[g], end[g]));
                worst = std::max(worst, ms);
            }
            if (i > 0) times.push_back(worst);
        }
        std::sort(times.begin(), times.end());
        std::printf("%-28s row %5d window %4d stride %3d warps %2d+%2d sleep %4d batch %2d: %7.0f us %5.1f GB/s\n",
                    name, row_bytes, window, stride, send, recv, sleep, batch, times[1] * 1e3,
                    kRows * double(row_bytes) / times[1] / 1e6);
        std::fflush(stdout);
    };
    for (const int row : {7168, 14336}) {
        run("as dispatch", row, 256, 8, 12, 12, 20, 1);
        run("poll less", row, 256, 8, 12, 12, 2000, 1);
        run("flags apart", row, 256, 64, 12, 12, 20, 1);
        run("no wrap", row, 4096, 8, 12, 12, 20, 1);
        run("no wrap, apart", row, 4096, 64, 12, 12, 20, 1);
        run("more warps", row, 4096, 8, 16, 16, 20, 1);
        run("one word along", row, 4096, 8, 16, 16, 20, 1, 1);
        run("scales along", row, 4096, 8, 16, 16, 20, 1, 73);
        run("scales along, apart", row, 4096, 64, 16, 16, 20, 1, 73);
        run("own rows too", row, 4096, 8, 16, 16, 20, 1, 0, true);
        run("all of it", row, 4096, 8, 16, 16, 20, 1, 73, true);
        run("all of it, apart", row, 4096, 64, 16, 16, 20, 1, 73, true);
        run("rows to a flag, apart", row, 1024, 64, 12, 12, 20, 4);
    }
}
