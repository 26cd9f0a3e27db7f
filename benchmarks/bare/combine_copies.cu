// Combine between two GPUs by copy engines: the block of rows that returns to the peer is copied in chunks on side streams, a
// flag follows each chunk, and a kernel sums what has come by ordinary loads.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 -o copies benchmarks/bare/combine_copies.cu && ./copies
//
// As intranode_ways.cu: us of a call, of 12 in a row on the slower GPU. All is queued behind a gate, so the host is not in it;
// what the host takes to queue a call is printed beside. What came out: docs/performance/intranode.md.
#include <cuda.h>

#include <chrono>
#include <initializer_list>

#include "intranode_ways.h"

using WriteValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
static WriteValue write_value, wait_value;

static void* driver_function(const char* name) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    CHECK(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status));
#else
    CHECK(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status));
#endif
    return found;
}

constexpr int kMaxSides = 3;
constexpr int kMaxChunks = 64;
// Words of `flags`: one for each chunk, then these.
constexpr int kEntered = kMaxChunks, kTaken = kMaxChunks + 1, kEpoch = kMaxChunks + 2, kDone = kMaxChunks + 3;

struct Chunks {
    int count;
    int end[kMaxChunks];  // row after the last one of each
};

// Opens when the host says so, or after 30 ms.
__global__ void gate(const volatile uint32_t* open, uint32_t epoch) {
    uint64_t begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (*open < epoch && now - begin < 30000000);
}

// No row of this call comes before the peer has ended the one before.
__global__ void enter(Args a) {
    a.flags[kEpoch] = a.epoch;
    publish(a.peer_flags + kEntered, a.epoch);
    while (look(a.flags + kEntered) < a.epoch) {
    }
}

__global__ void tell(uint32_t* flag, uint32_t epoch) { publish(flag, epoch); }

template <int U, int T, bool kWaits> __global__ void __launch_bounds__(T) sum_arrived(Args a, Chunks chunks) {
    const int lane = threadIdx.x % 32;
    int chunk = -1;  // the last one that is known to be here
    const Rows rows = rows_of_grid(threadIdx.x / 32, T / 32);
    for (int t = rows.first; t < kTokens; t += rows.step) {
        while (kWaits && (chunk < 0 || chunks.end[chunk] <= t)) {
            ++chunk;
            if (lane == 0)
                while (look(a.flags + chunk) < a.epoch) __nanosleep(100);
            __syncwarp();
        }
        const int64_t at = static_cast<int64_t>(t) * a.row;
        reduce_row<U>(a.arrived + at, a.x + at, a.result + at, a.row, lane);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(a.flags + kDone, 1) % gridDim.x == gridDim.x - 1) publish(a.peer_flags + kTaken, a.epoch);
}

enum class Flag { kWrite, kCopy, kKernel };
enum class Start { kEnter, kWaitValue };
enum class What { kAll, kCopies, kSums };

struct Way {
    const char* name;
    Chunks chunks;
    int num_sides;
    Flag flag;
    Start start;
    What what;
};

struct Sides {
    cudaStream_t stream[kMaxSides];
    cudaEvent_t begin, end[kMaxSides];
};
static Sides sides[2];
static uint32_t* is_open;

static void queue_copies(const Way& way, int gpu, const Args& args) {
    const Sides& s = sides[gpu];
    CHECK(cudaEventRecord(s.begin, gpus[gpu].stream));
    for (int i = 0; i < way.num_sides; ++i) {
        CHECK(cudaStreamWaitEvent(s.stream[i], s.begin));
        if (way.start == Start::kWaitValue)
            wait_value(s.stream[i], reinterpret_cast<CUdeviceptr>(args.flags + kTaken), epoch - 1,
                       CU_STREAM_WAIT_VALUE_GEQ);
    }
    for (int c = 0; c < way.chunks.count; ++c) {
        const cudaStream_t stream = s.stream[c % way.num_sides];
        const int64_t first = c == 0 ? 0 : way.chunks.end[c - 1];
        const int64_t bytes = (way.chunks.end[c] - first) * args.row;
        CHECK(cudaMemcpyAsync(args.remote + first * args.row, args.x + first * args.row, bytes, cudaMemcpyDefault,
                              stream));
        if (way.flag == Flag::kWrite) {
            if (write_value(stream, reinterpret_cast<CUdeviceptr>(args.peer_flags + c), epoch, 0) != CUDA_SUCCESS) {
                std::printf("cuStreamWriteValue32 failed\n");
                std::exit(1);
            }
        } else if (way.flag == Flag::kCopy) {
            CHECK(cudaMemcpyAsync(args.peer_flags + c, args.flags + kEpoch, 4, cudaMemcpyDefault, stream));
        } else {
            tell<<<1, 1, 0, stream>>>(args.peer_flags + c, epoch);
        }
    }
    for (int i = 0; i < way.num_sides; ++i) CHECK(cudaEventRecord(s.end[i], s.stream[i]));
}

static void queue(const Way& way, int gpu, int num_sms) {
    CHECK(cudaSetDevice(gpu));
    Args args = args_of(gpu, kMaxRow, 0);
    args.remote = gpus[1 - gpu].slots;
    const cudaStream_t stream = gpus[gpu].stream;
    if (way.start == Start::kEnter) enter<<<1, 1, 0, stream>>>(args);
    if (way.what != What::kSums) queue_copies(way, gpu, args);
    if (way.what == What::kAll) sum_arrived<7, 640, true><<<num_sms, 640, 0, stream>>>(args, way.chunks);
    if (way.what == What::kSums) sum_arrived<7, 640, false><<<num_sms, 640, 0, stream>>>(args, way.chunks);
    CHECK(cudaGetLastError());
    if (way.what == What::kSums) return;
    for (int i = 0; i < way.num_sides; ++i) CHECK(cudaStreamWaitEvent(stream, sides[gpu].end[i]));
}

static void synchronize() {
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaSetDevice(gpu));
        CHECK(cudaDeviceSynchronize());
    }
}

// What each launch has to say about slots before its own first one.
static void begin_way() {
    synchronize();
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaMemset(gpus[gpu].flags, 0, (kMaxChunks + 4) * 4));
        CHECK(cudaMemset(gpus[gpu].flags + kTaken, 0x7f, 4));  // of the first call nothing is to be waited for
    }
    synchronize();
}

static double measure_way(const Way& way, int num_sms, double& host_us) {
    constexpr int kCalls = 12;
    begin_way();
    for (int gpu = 0; gpu < 2; ++gpu) {
        const uint32_t taken = epoch;
        CHECK(cudaMemcpy(gpus[gpu].flags + kTaken, &taken, 4, cudaMemcpyHostToDevice));
    }
    synchronize();
    for (int i = 0; i < 2; ++i) {
        ++epoch;
        for (int gpu = 0; gpu < 2; ++gpu) queue(way, gpu, num_sms);
    }
    synchronize();
    *is_open = 0;
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaSetDevice(gpu));
        gate<<<1, 1, 0, gpus[gpu].stream>>>(is_open, 1);
        CHECK(cudaEventRecord(gpus[gpu].begin, gpus[gpu].stream));
    }
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) {
        ++epoch;
        for (int gpu = 0; gpu < 2; ++gpu) queue(way, gpu, num_sms);
    }
    host_us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count() / kCalls / 2;
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaSetDevice(gpu));
        CHECK(cudaEventRecord(gpus[gpu].end, gpus[gpu].stream));
    }
    *reinterpret_cast<volatile uint32_t*>(is_open) = 1;
    return slowest_us() / kCalls;
}

// One call into slots and a result that hold nothing of a call before.
static void check_way(const Way& way, const std::vector<uint8_t>& sums) {
    begin_way();
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaSetDevice(gpu));
        CHECK(cudaMemset(gpus[gpu].slots, 0, sums.size()));
        CHECK(cudaMemset(gpus[gpu].result, 0, sums.size()));
    }
    synchronize();
    ++epoch;
    for (int gpu = 0; gpu < 2; ++gpu) queue(way, gpu, 16);
    synchronize();
    check_rows(way.name, gpus[0].result, sums.data(), sums.size());
}

static void measure_line(const Way& way, std::initializer_list<int> sms, const std::vector<uint8_t>& sums) {
    std::printf("%-36s", way.name);
    double host_us = 0;
    for (int num_sms : sms) {
        std::printf(" %7.1f", measure_way(way, num_sms, host_us));
        std::fflush(stdout);
    }
    std::printf("   host %.1f\n", host_us);
    if (way.what == What::kAll) check_way(way, sums);
}

// `each` rows a chunk; the last chunks hold the half, and the quarter twice, where `tapers`.
static Chunks chunks_of(int each, bool tapers) {
    Chunks chunks{0, {}};
    for (int end = 0; end < kTokens;) {
        int rows = each;
        if (tapers && kTokens - end <= each) rows = kTokens - end > 256 ? (kTokens - end) / 2 : kTokens - end;
        chunks.end[chunks.count++] = end += rows < kTokens - end ? rows : kTokens - end;
    }
    return chunks;
}

static void set_up_sides() {
    write_value = reinterpret_cast<WriteValue>(driver_function("cuStreamWriteValue32"));
    wait_value = reinterpret_cast<WriteValue>(driver_function("cuStreamWaitValue32"));
    CHECK(cudaHostAlloc(&is_open, 4, cudaHostAllocPortable | cudaHostAllocMapped));
    for (int gpu = 0; gpu < 2; ++gpu) {
        CHECK(cudaSetDevice(gpu));
        for (int i = 0; i < kMaxSides; ++i) {
            CHECK(cudaStreamCreateWithFlags(&sides[gpu].stream[i], cudaStreamNonBlocking));
            CHECK(cudaEventCreateWithFlags(&sides[gpu].end[i], cudaEventDisableTiming));
        }
        CHECK(cudaEventCreateWithFlags(&sides[gpu].begin, cudaEventDisableTiming));
        gate<<<1, 1, 0, gpus[gpu].stream>>>(is_open, 0);  // loads what is queued behind a closed gate later
        tell<<<1, 1, 0, gpus[gpu].stream>>>(gpus[gpu].flags, 0);
    }
    synchronize();
}

int main() {
    set_up();
    set_up_sides();
    const std::vector<uint8_t> sums = sums_by_pull({8, 16});

    struct Size {
        const char* name;
        Chunks chunks;
    };
    const Size sizes[] = {{"whole", chunks_of(kTokens, false)},    {"2048", chunks_of(2048, false)},
                          {"1024", chunks_of(1024, false)},        {"512", chunks_of(512, false)},
                          {"256", chunks_of(256, false)},          {"4096, tapered", chunks_of(4096, true)},
                          {"1024, tapered", chunks_of(1024, true)}};
    std::printf("\nsums of two local rows alone             4 SMs       8      12      16      24\n");
    measure_line({"sums", sizes[0].chunks, 0, Flag::kWrite, Start::kEnter, What::kSums}, {4, 8, 12, 16, 24}, sums);
    std::printf("\ncopies alone, both ways; rows of a chunk, side streams, flag\n");
    const char* flags[] = {"write", "copy", "kernel"};
    const auto name_of = [&](const Size& size, int num_sides, Flag flag, Start start) {
        static char name[64];
        std::snprintf(name, sizeof name, "%s, %d, %s%s", size.name, num_sides, flags[static_cast<int>(flag)],
                      start == Start::kEnter ? "" : ", wait");
        return name;
    };
    for (Flag flag : {Flag::kWrite, Flag::kCopy, Flag::kKernel})
        for (const Size& size : sizes)
            for (int num_sides : {1, 2, 3})
                if (num_sides <= size.chunks.count)
                    measure_line({name_of(size, num_sides, flag, Start::kEnter), size.chunks, num_sides, flag,
                                  Start::kEnter, What::kCopies},
                                 {0}, sums);
    std::printf("\nall of it                                4 SMs       8      12      16      20\n");
    for (Start start : {Start::kEnter, Start::kWaitValue})
        for (Flag flag : {Flag::kWrite, Flag::kCopy, Flag::kKernel})
            for (const Size& size : sizes)
                for (int num_sides : {1, 2, 3})
                    if (num_sides <= size.chunks.count && (start == Start::kEnter || flag == Flag::kWrite))
                        measure_line(
                            {name_of(size, num_sides, flag, start), size.chunks, num_sides, flag, start, What::kAll},
                            {4, 8, 12, 16, 20}, sums);
    return 0;
}
