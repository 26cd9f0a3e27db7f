#include "runtime/buffer.h"

#include "core/error.h"

namespace deep_ep::runtime {

namespace {

const kernels::KernelTable& table_for(dev::DeviceKind kind) {
#if EP_WITH_CUDA
    if (kind == dev::DeviceKind::kCuda) return kernels::cuda_kernel_table();
#endif
    EP_ENSURE(kind == dev::DeviceKind::kCpu, "this build has no CUDA kernels");
    return kernels::simt_kernel_table();
}

}  // namespace

Buffer::Buffer(std::shared_ptr<dev::Device> device, const BufferOptions& options)
    : kernels_(table_for(device->kind())),
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
