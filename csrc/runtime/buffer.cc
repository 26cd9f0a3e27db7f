#include "runtime/buffer.h"

#include "core/error.h"
#include "runtime/nvshmem_table.h"

namespace deep_ep::runtime {

namespace {

const kernels::KernelTable& table_for(dev::DeviceKind kind, const BufferOptions& options) {
#if EP_WITH_CUDA
    const bool is_nvshmem = options.rail.name == "nvshmem" && options.topology().num_nodes() > 1;
    if (kind == dev::DeviceKind::kCuda) return is_nvshmem ? nvshmem_kernel_table() : kernels::cuda_kernel_table();
#else
    static_cast<void>(options);
#endif
    EP_ENSURE(kind == dev::DeviceKind::kCpu, "this build has no CUDA kernels");
    return kernels::simt_kernel_table();
}

}  // namespace

Buffer::Buffer(std::shared_ptr<dev::Device> device, const BufferOptions& options)
    : kernels_(table_for(device->kind(), options)),
      connection_(std::move(device), options),
      high_throughput_(connection_, kernels_),
      low_latency_(connection_, kernels_) {}

uint8_t* Buffer::data() const {
    connection_.require_usable();
    return connection_.local(connection_.plan().control.bytes);
}

std::unique_ptr<LentMemory> Buffer::lend(int64_t num_bytes) {
    std::vector<std::unique_ptr<LentMemory>> lent = high_throughput_.loans().lend({num_bytes}, nullptr, false);
    return lent.empty() ? nullptr : std::move(lent.front());
}

void Buffer::destroy(double timeout_s) noexcept {
    if (!connection_.is_open()) return;
    connection_.destroy(timeout_s);
    high_throughput_.release();
    low_latency_.release();
}

}  // namespace deep_ep::runtime
