#include "device/cuda/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "device/cuda/cuda_error.h"
#include "device/cuda/guard.h"
#include "device/cuda/probe.h"
#include "device/cuda/registered_pages.h"
#include "device/cuda/shared_handle.h"

namespace deep_ep::dev {
namespace cuda {
namespace {

// cudaMalloc cuts small allocations out of one larger block, and an IPC handle opens the whole block. Whole blocks
// are shared, so that peers see nothing else and the offset into the mapping is zero.
constexpr size_t kShareableGranularity = size_t{2} << 20;

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A failed release is an error, unless the process is ending and the driver has gone first.
void check_release(cudaError_t error, const char* what, int line) {
    if (error == cudaErrorCudartUnloading || error == cudaErrorContextIsDestroyed) return ignore(error);
    check(error, what, __FILE__, line);
}
#define EP_CUDA_RELEASE(call) check_release((call), #call, __LINE__)

// What the runtime gives, until it has an owner outside or for as long as the device lives. The device must be current.
template <class T, auto kRelease> struct Release {
    void operator()(T* object) const noexcept { ignore(kRelease(object)); }
};
cudaError_t free_block(void* block) { return cudaFree(block); }
using OwnedBlock = std::unique_ptr<void, Release<void, free_block>>;
using OwnedHostBlock = std::unique_ptr<void, Release<void, cudaFreeHost>>;
using OwnedMapping = std::unique_ptr<void, Release<void, cudaIpcCloseMemHandle>>;
using ServiceStream = std::unique_ptr<CUstream_st, Release<CUstream_st, cudaStreamDestroy>>;

void relax_cpu() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

class CudaDevice final : public Device {
public:
    explicit CudaDevice(int index);
    ~CudaDevice() override;

    DeviceKind kind() const override { return DeviceKind::kCuda; }
    int num_sms() const override { return num_sms_; }
    int useful_block_threads() const override { return 1024; }
    int max_shared_bytes() const override { return max_shared_bytes_; }
    bool has_bulk_copy() const override { return has_bulk_copy_; }
    std::string unique_id() const override { return format_uuid(uuid_); }

    void* allocate(size_t bytes) override;
    void free(void* ptr) override;
    HostMapped allocate_host_mapped(size_t bytes) override;
    void free_host_mapped(const HostMapped& memory) override;
    ShareableMemory allocate_shareable(size_t bytes, Placement placement) override;
    void free_shareable(const ShareableMemory& memory) override;
    void* open_shared(const std::string& handle) override;
    void close_shared(void* address) override;
    bool holds(const std::string& handle) const override { return SharedHandle::unpack(handle).device_uuid == uuid_; }

    bool enter() override { return enter_device(index_); }
    void leave() noexcept override { leave_device(); }

    Stream create_stream() override;
    void destroy_stream(Stream stream) override;
    void synchronize_stream(Stream stream) override;
    StreamKind stream_kind(Stream stream) override;

    std::shared_ptr<const std::atomic<bool>> watch_graph(Stream stream) override;
    Event create_event() override;
    void destroy_event(Event event) override;
    void record_event(Event event, Stream stream) override;
    void stream_wait_event(Stream stream, Event event) override;
    void synchronize_event(Event event) override;
    bool query_event(Event event) override;

    void memset_async(void* ptr, int value, size_t bytes, Stream stream) override;
    void memcpy_async(void* dst, const void* src, size_t bytes, Stream stream) override;
    void copy_now(void* dst, const void* src, size_t bytes) override;
    bool host_wait(const std::function<bool()>& done, double timeout_s) override;

private:
    // A peer's memory in this process: mapped through IPC, or the owner's own pointer when the owner lives here.
    struct Opened {
        OwnedMapping mapping;                    // what cudaIpcOpenMemHandle gave; null for the owner's own pointer
        std::unique_ptr<RegisteredPages> pages;  // of host memory; null the same way
        int count = 0;
    };
    // Of this device's shareable memory: what lies on the host.
    struct HostRegion {
        std::unique_ptr<RegisteredPages> pages;
        FileDescriptor file;  // for peers to open
    };

    int attribute(cudaDeviceAttr name) const;
    void fill_zero(void* ptr, size_t bytes);
    void* allocate_on_gpu(SharedHandle& handle);
    void* allocate_on_host(SharedHandle& handle);
    Opened open(const SharedHandle& handle, void*& address);
    void enable_peer_access(const SharedHandle& handle);
    OwnedMapping open_mapping(const SharedHandle& handle);

    int index_ = 0;
    int num_sms_ = 0;
    int max_shared_bytes_ = 0;
    bool has_bulk_copy_ = false;
    std::array<unsigned char, 16> uuid_{};
    ServiceStream service_stream_;  // for lifecycle work, so that it waits for nobody's kernels

    std::mutex opened_mutex_;
    std::map<std::string, void*> address_by_handle_;
    std::map<void*, Opened> opened_;
    std::map<void*, HostRegion> host_regions_;
};

CudaDevice::CudaDevice(int index) : index_(index) {
    const RelaxedDeviceGuard guard(index_);
    num_sms_ = attribute(cudaDevAttrMultiProcessorCount);
    max_shared_bytes_ = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    uuid_ = uuid_of(index_);
    const CompiledCode code = find_compiled_code();
    if (!code.exists) {
        const int major = attribute(cudaDevAttrComputeCapabilityMajor);
        const int minor = attribute(cudaDevAttrComputeCapabilityMinor);
        throw CudaError(concat("this build of deep_ep_cpp holds no code for CUDA device ", index_, " (sm_", major,
                               minor, "): build it again with that architecture"));
    }
    has_bulk_copy_ = code.has_bulk_copy;
    cudaStream_t stream = nullptr;
    EP_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    service_stream_.reset(stream);
}

CudaDevice::~CudaDevice() {
    try {
        const DeviceGuard guard(index_);
        const RelaxedCaptureGuard relaxed;
        opened_.clear();
        host_regions_.clear();
        service_stream_.reset();
    } catch (const Error&) {
        // The driver has gone first; it has released everything.
    }
}

int CudaDevice::attribute(cudaDeviceAttr name) const {
    int value = 0;
    EP_CUDA(cudaDeviceGetAttribute(&value, name, index_));
    return value;
}

// ---------------------------------------------------------------------------------------------------------------
// Memory of this process
// ---------------------------------------------------------------------------------------------------------------

void CudaDevice::fill_zero(void* ptr, size_t bytes) {
    EP_CUDA(cudaMemsetAsync(ptr, 0, bytes, service_stream_.get()));
    EP_CUDA(cudaStreamSynchronize(service_stream_.get()));
}

void* CudaDevice::allocate(size_t bytes) {
    const RelaxedDeviceGuard guard(index_);
    void* ptr = nullptr;
    const size_t num_bytes = std::max<size_t>(bytes, 256);  // a null pointer for zero bytes would look like a failure
    const cudaError_t error = cudaMalloc(&ptr, num_bytes);
    if (error != cudaSuccess) {
        throw_cuda_error(error, concat("allocating ", num_bytes, " bytes on CUDA device ", index_), __FILE__, __LINE__);
    }
    OwnedBlock block(ptr);
    fill_zero(ptr, num_bytes);
    return block.release();
}

void CudaDevice::free(void* ptr) {
    if (ptr == nullptr) return;
    const RelaxedDeviceGuard guard(index_);
    EP_CUDA_RELEASE(cudaFree(ptr));
}

HostMapped CudaDevice::allocate_host_mapped(size_t bytes) {
    const RelaxedDeviceGuard guard(index_);
    HostMapped memory;
    const size_t num_bytes = std::max<size_t>(bytes, 1);
    EP_CUDA(cudaHostAlloc(&memory.host, num_bytes, cudaHostAllocMapped | cudaHostAllocPortable));
    OwnedHostBlock block(memory.host);
    std::memset(memory.host, 0, num_bytes);
    EP_CUDA(cudaHostGetDevicePointer(&memory.device, memory.host, 0));
    block.release();
    return memory;
}

void CudaDevice::free_host_mapped(const HostMapped& memory) {
    if (memory.host == nullptr) return;
    const RelaxedDeviceGuard guard(index_);
    EP_CUDA_RELEASE(cudaFreeHost(memory.host));
}

// ---------------------------------------------------------------------------------------------------------------
// Memory between processes
// ---------------------------------------------------------------------------------------------------------------

ShareableMemory CudaDevice::allocate_shareable(size_t bytes, Placement placement) {
    const RelaxedDeviceGuard guard(index_);
    SharedHandle handle;
    handle.owner = ProcessId::of_this_process();
    handle.device_uuid = uuid_;
    handle.num_bytes = round_up(std::max<size_t>(bytes, 1), kShareableGranularity);
    void* const address = placement == Placement::kHost ? allocate_on_host(handle) : allocate_on_gpu(handle);
    return {address, handle.pack()};
}

void* CudaDevice::allocate_on_gpu(SharedHandle& handle) {
    OwnedBlock block(allocate(handle.num_bytes));
    const cudaError_t error = cudaIpcGetMemHandle(&handle.ipc, block.get());
    if (error != cudaSuccess) {
        ignore(error);
        throw TransportError(concat("cannot share memory of CUDA device ", index_,
                                    " with other processes: ", describe(error),
                                    ". CUDA IPC needs Linux and a GPU that is not virtualised; DEEP_EP_HEAP=host does "
                                    "without"));
    }
    handle.address = reinterpret_cast<uint64_t>(block.get());
    return block.release();
}

void* CudaDevice::allocate_on_host(SharedHandle& handle) {
    SharedFile made = make_shared_file(handle.num_bytes);
    auto pages = std::make_unique<RegisteredPages>(std::move(made.memory));
    void* const address = pages->address();
    handle.file = made.handle;
    handle.address = reinterpret_cast<uint64_t>(address);
    const std::lock_guard lock(opened_mutex_);
    host_regions_[address] = {std::move(pages), std::move(made.file)};
    return address;
}

void CudaDevice::free_shareable(const ShareableMemory& memory) {
    const RelaxedDeviceGuard guard(index_);
    HostRegion region;
    {
        const std::lock_guard lock(opened_mutex_);
        if (const auto found = host_regions_.find(memory.address); found != host_regions_.end()) {
            region = std::move(found->second);
            host_regions_.erase(found);
        }
    }
    if (region.pages == nullptr) free(memory.address);
}

void* CudaDevice::open_shared(const std::string& bytes) {
    const std::lock_guard lock(opened_mutex_);
    if (const auto known = address_by_handle_.find(bytes); known != address_by_handle_.end()) {
        ++opened_.at(known->second).count;
        return known->second;
    }
    const SharedHandle handle = SharedHandle::unpack(bytes);
    const RelaxedDeviceGuard guard(index_);
    void* address = nullptr;
    Opened opened = open(handle, address);
    opened_[address] = std::move(opened);
    address_by_handle_[bytes] = address;
    return address;
}

CudaDevice::Opened CudaDevice::open(const SharedHandle& handle, void*& address) {
    Opened opened{.mapping = nullptr, .pages = nullptr, .count = 1};
    if (handle.owner.is_same_process(ProcessId::of_this_process())) {
        if (!handle.is_on_host()) enable_peer_access(handle);
        address = reinterpret_cast<void*>(handle.address);
    } else if (handle.is_on_host()) {
        opened.pages = std::make_unique<RegisteredPages>(map_shared_file(handle.file));
        address = opened.pages->address();
    } else {
        opened.mapping = open_mapping(handle);
        address = static_cast<char*>(opened.mapping.get()) + handle.base_offset;
    }
    return opened;
}

void CudaDevice::close_shared(void* address) {
    const std::lock_guard lock(opened_mutex_);
    const auto found = opened_.find(address);
    EP_ENSURE(found != opened_.end(), "close_shared of an address that open_shared did not give");
    if (--found->second.count > 0) return;
    const RelaxedDeviceGuard guard(index_);
    opened_.erase(found);
    for (auto entry = address_by_handle_.begin(); entry != address_by_handle_.end();) {
        entry = entry->second == address ? address_by_handle_.erase(entry) : std::next(entry);
    }
}

// Memory of another device in this very process: readable once the driver knows that the two devices talk.
void CudaDevice::enable_peer_access(const SharedHandle& handle) {
    if (handle.device_uuid == uuid_) return;
    const int owner = find_device(handle.device_uuid);
    const cudaError_t error = owner < 0 ? cudaErrorInvalidDevice : cudaDeviceEnablePeerAccess(owner, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) return ignore(error);
    if (error != cudaSuccess) throw TransportError(explain_open_failure(handle, index_, error));
}

OwnedMapping CudaDevice::open_mapping(const SharedHandle& handle) {
    void* mapping = nullptr;
    const cudaError_t error = cudaIpcOpenMemHandle(&mapping, handle.ipc, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) throw TransportError(explain_open_failure(handle, index_, error));
    return OwnedMapping(mapping);
}

// ---------------------------------------------------------------------------------------------------------------
// Streams and events. Record and wait may be captured into a graph.
// ---------------------------------------------------------------------------------------------------------------

Stream CudaDevice::create_stream() {
    const RelaxedDeviceGuard guard(index_);
    int lowest_priority = 0;
    int highest_priority = 0;
    EP_CUDA(cudaDeviceGetStreamPriorityRange(&lowest_priority, &highest_priority));
    cudaStream_t stream = nullptr;
    EP_CUDA(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest_priority));
    return stream;
}

void CudaDevice::destroy_stream(Stream stream) {
    const RelaxedDeviceGuard guard(index_);
    EP_CUDA_RELEASE(cudaStreamDestroy(static_cast<cudaStream_t>(stream)));
}

void CudaDevice::synchronize_stream(Stream stream) {
    const DeviceGuard guard(index_);
    EP_CUDA(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

StreamKind CudaDevice::stream_kind(Stream handle) {
    const auto stream = static_cast<cudaStream_t>(handle);
    if (stream == nullptr || stream == cudaStreamLegacy) {
        int current = -1;
        EP_CUDA(cudaGetDevice(&current));
        return current == index_ ? StreamKind::kPlain : StreamKind::kAmbiguous;
    }
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    EP_CUDA(cudaStreamIsCapturing(stream, &status));
    if (status != cudaStreamCaptureStatusNone) return StreamKind::kCaptured;
    return stream == cudaStreamPerThread ? StreamKind::kAmbiguous : StreamKind::kPlain;
}

// A graph owns what it retains, and so does everything that is instantiated from it.
std::shared_ptr<const std::atomic<bool>> CudaDevice::watch_graph(Stream stream) {
    using Flag = std::shared_ptr<std::atomic<bool>>;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
    EP_CUDA(
        cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id, &graph, nullptr, nullptr, nullptr));
#else
    EP_CUDA(cudaStreamGetCaptureInfo_v2(static_cast<cudaStream_t>(stream), &status, &id, &graph, nullptr, nullptr));
#endif
    EP_ENSURE(status == cudaStreamCaptureStatusActive && graph != nullptr, "the stream is not being captured");
    const Flag is_gone = std::make_shared<std::atomic<bool>>(false);
    auto held = std::make_unique<Flag>(is_gone);
    const auto on_destroy = [](void* data) {  // on a thread of the driver, where CUDA must not be called
        const std::unique_ptr<Flag> flag(static_cast<Flag*>(data));
        (*flag)->store(true, std::memory_order_release);
    };
    cudaUserObject_t object = nullptr;
    EP_CUDA(cudaUserObjectCreate(&object, held.get(), on_destroy, 1, cudaUserObjectNoDestructorSync));
    held.release();
    EP_CUDA(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
    return is_gone;
}

Event CudaDevice::create_event() {
    const RelaxedDeviceGuard guard(index_);
    cudaEvent_t event = nullptr;
    EP_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
}

void CudaDevice::destroy_event(Event event) {
    const RelaxedDeviceGuard guard(index_);
    EP_CUDA_RELEASE(cudaEventDestroy(static_cast<cudaEvent_t>(event)));
}

void CudaDevice::record_event(Event event, Stream stream) {
    const DeviceGuard guard(index_);
    EP_CUDA(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
}

void CudaDevice::stream_wait_event(Stream stream, Event event) {
    const DeviceGuard guard(index_);
    EP_CUDA(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0));
}

void CudaDevice::synchronize_event(Event event) {
    const RelaxedDeviceGuard guard(index_);
    EP_CUDA(cudaEventSynchronize(static_cast<cudaEvent_t>(event)));
}

bool CudaDevice::query_event(Event event) {
    const RelaxedDeviceGuard guard(index_);
    const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (error == cudaErrorNotReady) {
        ignore(error);
        return false;
    }
    EP_CUDA(error);
    return true;
}

void CudaDevice::memset_async(void* ptr, int value, size_t bytes, Stream stream) {
    const DeviceGuard guard(index_);
    EP_CUDA(cudaMemsetAsync(ptr, value, bytes, static_cast<cudaStream_t>(stream)));
}

void CudaDevice::memcpy_async(void* dst, const void* src, size_t bytes, Stream stream) {
    const DeviceGuard guard(index_);
    EP_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}

void CudaDevice::copy_now(void* dst, const void* src, size_t bytes) {
    const RelaxedDeviceGuard guard(index_);
    EP_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, service_stream_.get()));
    EP_CUDA(cudaStreamSynchronize(service_stream_.get()));
}

// Spins while an answer is due within the time of one call, then sleeps in short steps, to leave the core to others.
bool CudaDevice::host_wait(const std::function<bool()>& done, double timeout_s) {
    using Clock = std::chrono::steady_clock;
    constexpr auto kSpinTime = std::chrono::milliseconds(2);
    constexpr auto kSleepTime = std::chrono::microseconds(20);
    const auto start = Clock::now();
    const auto deadline = start + std::chrono::duration<double>(timeout_s);
    while (!done()) {
        const auto now = Clock::now();
        if (now >= deadline) return done();
        if (now - start < kSpinTime) {
            relax_cpu();
        } else {
            std::this_thread::sleep_for(kSleepTime);
        }
    }
    return true;
}

}  // namespace
}  // namespace cuda

int count_cuda_devices() noexcept {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    cuda::ignore(error);
    return error == cudaSuccess ? count : 0;
}

std::shared_ptr<Device> make_cuda_device(int index) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorNoDevice) {
        cuda::ignore(error);
    } else if (error != cudaSuccess) {
        cuda::throw_cuda_error(error, "cudaGetDeviceCount", __FILE__, __LINE__);
    }
    EP_CHECK(index >= 0 && index < count, "there is no CUDA device ", index, ": this process sees ", count);
    return std::make_shared<cuda::CudaDevice>(index);
}

}  // namespace deep_ep::dev
