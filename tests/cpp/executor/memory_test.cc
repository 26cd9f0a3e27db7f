// Memory that processes share, and processes that fork.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "device/launch.h"
#include "device/prim.h"
#include "device/simt/context.h"
#include "device/simt/device.h"
#include "executor/faults.h"

#if defined(EP_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

using namespace deep_ep;
using prim::Order;
using prim::Scope;

namespace {

// A child process that is told a handle later. Its exit status says whether `body` returned true.
class Child {
public:
    explicit Child(const std::function<bool(const std::string& handle)>& body) {
        REQUIRE(pipe(ends_) == 0);
        pid_ = fork();
        REQUIRE(pid_ >= 0);
        if (pid_ != 0) return;
        char bytes[4096];
        close(ends_[1]);
        const ssize_t length = read(ends_[0], bytes, sizeof(bytes));
        bool is_right = false;
        try {
            is_right = body(std::string(bytes, static_cast<size_t>(length < 0 ? 0 : length)));
        } catch (const std::exception& error) {
            std::fprintf(stderr, "child: %s\n", error.what());
        }
        _exit(is_right ? 0 : 1);
    }
    ~Child() {
        for (int end : ends_) close(end);
    }
    void tell(const std::string& handle) {
        REQUIRE(write(ends_[1], handle.data(), handle.size()) == static_cast<ssize_t>(handle.size()));
    }
    bool is_right() {
        int status = 0;
        waitpid(pid_, &status, 0);
        return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }

private:
    int ends_[2];
    pid_t pid_;
};

std::string error_of(const std::string& handle) {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);  // of the process that calls
    try {
        device.open_shared(handle);
    } catch (const TransportError& error) {
        return error.what();
    }
    return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("in its own process a handle opens as the owner's address") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0), peer(scheduler, 1);
    const auto memory = device.allocate_shareable(100 << 20);  // more than the 64 MB that containers give /dev/shm
    auto* words = static_cast<uint32_t*>(memory.address);
    CHECK(words[0] == 0);
    CHECK(words[(24 << 20) + 17] == 0);
    CHECK(peer.open_shared(memory.handle) == memory.address);
    peer.close_shared(memory.address);
    device.free_shareable(memory);
    CHECK(contains(error_of(memory.handle), "has been freed"));
    peer.close_shared(memory.address);  // late, after the owner: nothing happens
}

#if defined(EP_SIMT_ASAN)
TEST_CASE("memory is not what a stack was that lay there before, as AddressSanitizer has it in mind") {
    constexpr size_t kBytes = 1 << 20;
    // Somewhere, where the kernel maps next.
    void* const before = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(before != MAP_FAILED);
    ASAN_POISON_MEMORY_REGION(before, kBytes);
    munmap(before, kBytes);
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    const auto memory = device.allocate_shareable(kBytes);
    WARN(memory.address == before);  // else this shows nothing
    CHECK(__asan_region_is_poisoned(memory.address, kBytes) == nullptr);
    device.free_shareable(memory);
    ASAN_UNPOISON_MEMORY_REGION(before, kBytes);
}
#endif

TEST_CASE("kernels of two processes pass a message through shared memory") {
    Child child([](const std::string& handle) {
        const auto device = simt::make_cpu_device();
        auto* words = static_cast<uint32_t*>(device->open_shared(handle));
        const auto stream = device->create_stream();
        dev::launch<faults::ReceiveKernel<faults::Receive::kAcquire>>({.name = "receive"}, stream,
                                                                      {words, words + 64, words + 65});
        device->synchronize_stream(stream);
        prim::store<Order::kRelease, Scope::kSys>(words + 66, 1u);
        device->close_shared(words);
        return true;
    });
    const auto device = simt::make_cpu_device();
    const auto memory = device->allocate_shareable(4096);
    auto* words = static_cast<uint32_t*>(memory.address);
    child.tell(memory.handle);
    usleep(20'000);  // the child's kernel polls for a while
    const auto stream = device->create_stream();
    dev::launch<faults::SendKernel<faults::Send::kRelease>>({.name = "send"}, stream, {words, words + 64, nullptr});
    const auto is_done = [&] { return prim::load<Order::kAcquire, Scope::kSys>(words + 66) != 0; };
    CHECK(device->host_wait(is_done, 30.0));
    CHECK(child.is_right());
    CHECK(words[65] == 0);
    device->destroy_stream(stream);
    device->free_shareable(memory);
}

TEST_CASE("handles that lead nowhere say why") {
    simt::Scheduler scheduler;
    simt::SimtDevice device(scheduler, 0);
    CHECK(contains(error_of("nonsense"), "not a handle of CPU shared memory (8 bytes)"));

    const auto memory = device.allocate_shareable(4096);
    std::string other_host = memory.handle;
    other_host[other_host.size() - 96] ^= 1;
    CHECK(contains(error_of(other_host), "belongs to another host"));
    std::string other_namespace = memory.handle;
    other_namespace[other_namespace.size() - 32 + sizeof("pid:[") - 1] ^= 1;
    CHECK(contains(error_of(other_namespace), "in another pid namespace (pid:["));

    Child child([](const std::string& handle) {
        return contains(error_of(handle), "has it ended, freed the memory, or another pid namespace?");
    });
    const auto freed = device.allocate_shareable(4096);
    const int next_fd = dup(0);
    close(next_fd);
    device.free_shareable(freed);
    child.tell(freed.handle);
    CHECK(child.is_right());

    // The descriptor's number now belongs to other memory: the name inside tells.
    Child second([](const std::string& handle) { return contains(error_of(handle), " is gone: its descriptor"); });
    const auto first_life = device.allocate_shareable(4096);
    device.free_shareable(first_life);
    const auto second_life = device.allocate_shareable(4096);
    second.tell(first_life.handle);
    CHECK(second.is_right());
    device.free_shareable(second_life);
    device.free_shareable(memory);
}

TEST_CASE("a forked child makes its own device; the parent's is refused there") {
    const auto device = simt::make_cpu_device();
    Child child([&](const std::string&) {
        bool is_refused = false;
        try {
            device->create_stream();
        } catch (const Error& error) {
            is_refused = contains(error.what(), "made before fork()");
        }
        const auto own = simt::make_cpu_device();
        auto* words = static_cast<uint32_t*>(own->allocate(4096));
        const auto stream = own->create_stream();
        dev::launch<faults::SendKernel<faults::Send::kRelease>>({.name = "send"}, stream, {words, words + 64, nullptr});
        own->synchronize_stream(stream);
        return is_refused && words[64] == 1;
    });
    child.tell("go");
    CHECK(child.is_right());
}
