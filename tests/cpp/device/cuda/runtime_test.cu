// What only the CUDA half of the runtime facade promises. What both halves promise is in ../conformance_*.cu.
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "core/error.h"
#include "device/cuda/cuda_error.h"
#include "device/cuda/device.h"
#include "device/cuda/guard.h"
#include "device/launch.h"
#include "device/prim.h"
#include "device/test_device.h"
#include "support/complaints.h"
#include "support/testing.h"

namespace deep_ep::testing {
namespace {

// Every block adds its number, plus one, to one word; the sum goes through the last bytes of dynamic shared memory.
struct AddKernel {
    struct Params {
        int* sum;
        int shared_bytes;
    };
    struct Shared {};
    static constexpr int kMaxThreads = 64;

    static EP_DEVICE void run(const Params& params, Shared&) {
        auto* words = static_cast<int*>(prim::dynamic_shared());
        const int last = params.shared_bytes / 4 - 1;
        if (threadIdx.x == 0) words[last] = static_cast<int>(blockIdx.x) + 1;
        __syncthreads();
        if (threadIdx.x == blockDim.x - 1)
            prim::fetch_add<prim::Order::kRelaxed, prim::Scope::kGpu>(params.sum, words[last]);
    }
};

dev::LaunchConfig add_config(int num_blocks, int shared_bytes) {
    dev::LaunchConfig config;
    config.num_blocks = num_blocks;
    config.num_threads = 64;
    config.dynamic_shared_bytes = shared_bytes;
    config.name = "add";
    return config;
}

// Adds 6 to the word, wherever that is, by a kernel of `device`.
void add_from(dev::Device& device, dev::Stream stream, void* word) {
    const dev::CurrentDevice current(device);
    dev::launch<AddKernel>(add_config(3, 16), stream, {static_cast<int*>(word), 16});
    device.synchronize_stream(stream);
}

int read_int(dev::Device& device, const void* address) {
    int value = -1;
    device.copy_now(&value, address, sizeof(value));
    return value;
}

TEST_CASE("a launch may use all the dynamic shared memory that the device gives") {
    const auto device = test_device();
    const auto stream = device->create_stream();
    auto* sum = static_cast<int*>(device->allocate(sizeof(int)));
    for (const int shared_bytes : {16, 48 * 1024, 64 * 1024, device->max_shared_bytes() - 1024}) {
        device->memset_async(sum, 0, sizeof(int), stream);
        dev::launch<AddKernel>(add_config(3, shared_bytes), stream, {sum, shared_bytes});
        device->synchronize_stream(stream);
        CHECK_EQ(read_int(*device, sum), 1 + 2 + 3);
    }
    device->free(sum);
    device->destroy_stream(stream);
}

TEST_CASE("a refused launch says what was asked for, and the next one works") {
    const auto device = test_device();
    const auto stream = device->create_stream();
    auto* sum = static_cast<int*>(device->allocate(sizeof(int)));
    auto config = add_config(1 << 20, 16);
    config.is_cooperative = true;
    const std::string message = error_of([&] { dev::launch<AddKernel>(config, stream, {sum, 16}); });
    CHECK(contains(message, "kernel 'add' with 1048576 blocks of 64 threads"));
    CHECK(contains(message, "cudaErrorCooperativeLaunchTooLarge"));
    config.num_blocks = device->num_sms();
    dev::launch<AddKernel>(config, stream, {sum, 16});
    device->synchronize_stream(stream);
    CHECK_EQ(read_int(*device, sum), device->num_sms() * (device->num_sms() + 1) / 2);
    config.num_threads = 128;  // more than AddKernel::kMaxThreads
    CHECK(contains(error_of([&] { dev::launch<AddKernel>(config, stream, {sum, 16}); }), "at most 64"));
    device->free(sum);
    device->destroy_stream(stream);
}

TEST_CASE("launches, copies and events can be captured, while memory is allocated beside them") {
    const auto device = test_device();
    const auto stream = device->create_stream();
    const auto other = device->create_stream();
    const auto event = device->create_event();
    auto* sum = static_cast<int*>(device->allocate(2 * sizeof(int)));
    cudaGraph_t graph = nullptr;
    EP_CUDA(cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeGlobal));
    dev::launch<AddKernel>(add_config(4, 16), stream, {sum, 16});
    device->record_event(event, stream);
    device->stream_wait_event(other, event);
    device->memcpy_async(sum + 1, sum, sizeof(int), other);
    device->record_event(event, other);
    device->stream_wait_event(stream, event);
    void* const beside = device->allocate(1 << 20);  // not captured
    CHECK_EQ(read_int(*device, sum), 0);
    EP_CUDA(cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph));
    cudaGraphExec_t executable = nullptr;
    EP_CUDA(cudaGraphInstantiate(&executable, graph, 0));
    for (int i = 1; i <= 3; ++i) {
        EP_CUDA(cudaGraphLaunch(executable, static_cast<cudaStream_t>(stream)));
        device->synchronize_stream(stream);
        CHECK_EQ(read_int(*device, sum), i * 10);
        CHECK_EQ(read_int(*device, sum + 1), i * 10);
    }
    EP_CUDA(cudaGraphExecDestroy(executable));
    EP_CUDA(cudaGraphDestroy(graph));
    device->free(beside);
    device->free(sum);
    device->destroy_event(event);
    device->destroy_stream(other);
    device->destroy_stream(stream);
}

TEST_CASE("a handle opened in the process that made it gives the memory itself, as often as asked") {
    const auto device = test_device();
    const auto memory = device->allocate_shareable(1000);
    CHECK(device->open_shared(memory.handle) == memory.address);
    CHECK(device->open_shared(memory.handle) == memory.address);
    device->close_shared(memory.address);
    device->close_shared(memory.address);
    CHECK_THROWS_AS(device->close_shared(memory.address), Error);
    device->free_shareable(memory);
}

TEST_CASE("shareable memory on the host is written by the GPUs of this process, and read in another") {
    const auto device = test_device();
    const auto peer = dev::make_cuda_device(dev::count_cuda_devices() - 1);
    const auto memory = device->allocate_shareable(1000, dev::Placement::kHost);
    CHECK_EQ(read_int(*device, memory.address), 0);
    CHECK(peer->open_shared(memory.handle) == memory.address);
    CHECK(device->holds(memory.handle));
    const auto stream = peer->create_stream();
    add_from(*peer, stream, memory.address);
    CHECK_EQ(read_int(*device, memory.address), 6);
    // With another nonce the handle is that of another process, which this one then maps like any peer.
    std::string other_process = memory.handle;
    other_process[8] = static_cast<char>(other_process[8] + 1);
    void* const mapped = peer->open_shared(other_process);
    CHECK(mapped != memory.address);
    CHECK_EQ(read_int(*peer, mapped), 6);
    device->free_shareable(memory);
    CHECK_EQ(read_int(*peer, mapped), 6);  // the pages live as long as any mapping
    CHECK(contains(error_of([&] { device->open_shared(other_process); }), "shared memory of process"));
    peer->close_shared(mapped);
    peer->close_shared(memory.address);
    peer->destroy_stream(stream);
}

TEST_CASE("bytes that are no handle, or one whose owner is gone, raise TransportError with a reason") {
    const auto device = test_device();
    CHECK_THROWS_AS(device->open_shared(""), TransportError);
    CHECK_THROWS_AS(device->open_shared("something else"), TransportError);
    const auto memory = device->allocate_shareable(1000);
    std::string other_process = memory.handle;
    other_process[8] = static_cast<char>(other_process[8] + 1);  // the process nonce
    // CUDA refuses to open a handle in the process that made it, which stands in for any failure.
    const std::string message = error_of([&] { device->open_shared(other_process); });
    CHECK(contains(message, "cannot map the memory of process"));
    CHECK(contains(message, "cudaError"));
    CHECK(cudaGetLastError() == cudaSuccess);
    device->free_shareable(memory);
}

TEST_CASE("the current device of the caller stays what it was") {
    if (dev::count_cuda_devices() < 2) {
        MESSAGE("skipped: needs two GPUs");
        return;
    }
    EP_CUDA(cudaSetDevice(0));
    const auto second = dev::make_cuda_device(1);
    const auto stream = second->create_stream();
    auto* sum = static_cast<int*>(second->allocate(sizeof(int)));
    add_from(*second, stream, sum);
    CHECK_EQ(read_int(*second, sum), 6);
    int current = -1;
    EP_CUDA(cudaGetDevice(&current));
    CHECK_EQ(current, 0);
    second->free(sum);
    second->destroy_stream(stream);
}

TEST_CASE("memory of one GPU can be opened on another of the same process") {
    if (dev::count_cuda_devices() < 2) {
        MESSAGE("skipped: needs two GPUs");
        return;
    }
    const auto first = test_device();
    const auto second = dev::make_cuda_device(1);
    const auto memory = first->allocate_shareable(1000);
    void* const address = second->open_shared(memory.handle);
    const auto stream = second->create_stream();
    add_from(*second, stream, address);
    CHECK_EQ(read_int(*first, memory.address), 6);
    second->close_shared(address);
    second->destroy_stream(stream);
    first->free_shareable(memory);
}

TEST_CASE("an error is reported once, and does not hit the next call") {
    const auto device = test_device();
    CHECK_THROWS_AS(device->allocate(size_t{1} << 50), CudaError);
    CHECK(cudaGetLastError() == cudaSuccess);
    device->free(device->allocate(1));
    CHECK_THROWS_AS(dev::make_cuda_device(dev::count_cuda_devices()), InvalidArgument);
}

}  // namespace
}  // namespace deep_ep::testing
