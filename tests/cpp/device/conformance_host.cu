// Kernels beside threads of the host: what each releases the other sees, and who sleeps is woken. One source for the CPU
// executor (conformance_test.cc) and a GPU (device_cuda.cmake).
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

#include "device/launch.h"
#include "device/prim.h"
#include "device/test_device.h"
#include "support/testing.h"

namespace deep_ep::testing {
namespace {

using prim::Order;
using prim::Scope;

constexpr int kWords = 1000;

// A word of its own line each.
struct Mailbox {
    alignas(128) uint64_t to_kernel;
    alignas(128) uint64_t to_host;
    alignas(128) uint32_t is_asleep;
    alignas(128) uint32_t words[kWords];
};

// Answers each round with its words, one more each.
struct AnswerKernel {
    struct Params {
        Mailbox* memory;
        int event;
        int num_rounds;
    };
    struct Shared {};

    static EP_DEVICE void run(const Params& p, Shared&) {
        for (uint64_t round = 1; round <= static_cast<uint64_t>(p.num_rounds); ++round) {
            if (threadIdx.x == 0)
                while (prim::load_from_host(&p.memory->to_kernel) < round) prim::pause();
            __syncthreads();
            for (int i = static_cast<int>(threadIdx.x); i < kWords; i += static_cast<int>(blockDim.x))
                ++p.memory->words[i];
            __syncthreads();
            if (threadIdx.x != 0) continue;
            prim::store<Order::kRelease, Scope::kSys>(&p.memory->to_host, round);
            prim::wake_host(&p.memory->is_asleep, p.event);
        }
    }
};

template <class T> std::atomic_ref<T> atomic(T& word) { return std::atomic_ref<T>(word); }

// As the contract of wake_host has it; where nobody wakes this thread its naps are short. False: the answer never came.
bool sleep_until_answer(Mailbox& memory, uint64_t round, int event, int nap_ms) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (std::chrono::steady_clock::now() < deadline) {
        atomic(memory.is_asleep).exchange(1, std::memory_order_acq_rel);
        if (atomic(memory.to_host).load(std::memory_order_acquire) == round) return true;
        pollfd polled{event, POLLIN, 0};
        poll(&polled, 1, nap_ms);
        uint64_t count;
        static_cast<void>(!read(event, &count, sizeof(count)));
    }
    return false;
}

TEST_CASE("a kernel and a thread of the host answer each other, and the thread sleeps in between") {
    constexpr int kRounds = 200;
    const auto device = test_device();
    const bool is_woken = device->kind() == dev::DeviceKind::kCpu;
    const auto stream = device->create_stream();
    const dev::HostMapped mapped = device->allocate_host_mapped(sizeof(Mailbox));
    auto& memory = *static_cast<Mailbox*>(mapped.host);
    const int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    dev::LaunchConfig config;
    config.num_threads = 64;
    config.name = "answer";
    dev::launch<AnswerKernel>(config, stream, {static_cast<Mailbox*>(mapped.device), event, kRounds});
    int num_wrong = 0, num_silent = 0;
    for (uint64_t round = 1; round <= kRounds && num_silent == 0; ++round) {
        for (uint32_t& word : memory.words) word += static_cast<uint32_t>(round);
        atomic(memory.to_kernel).store(round, std::memory_order_release);
        num_silent += !sleep_until_answer(memory, round, event, is_woken ? 60'000 : 1);
        for (const uint32_t word : memory.words)
            num_wrong += word != static_cast<uint32_t>(round * (round + 1) / 2 + round);
    }
    CHECK_EQ(num_wrong, 0);
    CHECK_EQ(num_silent, 0);
    device->synchronize_stream(stream);
    device->free_host_mapped(mapped);
    device->destroy_stream(stream);
    close(event);
}

}  // namespace
}  // namespace deep_ep::testing
