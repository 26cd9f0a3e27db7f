#include "runtime/buffer.h"

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
    : Connection(std::move(device), options),
      kernels_(table_for(this->device()->kind(), options)),
      high_throughput_(*this, kernels_),
      internode_(*this, kernels_, high_throughput_),
      low_latency_(*this, kernels_) {}

void Buffer::destroy(double timeout_s) noexcept {
    if (!is_open()) return;
    Connection::destroy(timeout_s);
    high_throughput_.release();
    internode_.release();
    low_latency_.release();
}

}  // namespace deep_ep::runtime
