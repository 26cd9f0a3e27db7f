#include "runtime/buffer.h"

#include <algorithm>

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
      intranode_(connection_, kernels_),
      low_latency_(connection_, kernels_) {}

uint8_t* Buffer::data() const {
    connection_.require_usable();
    return connection_.local(connection_.plan().control.bytes);
}

std::unique_ptr<LentMemory> Buffer::lend(int64_t num_bytes) {
    std::vector<std::unique_ptr<LentMemory>> lent = intranode_.lend({num_bytes}, nullptr, false);
    return lent.empty() ? nullptr : std::move(lent.front());
}

void Buffer::bench_push(int64_t bytes_per_peer, int num_sms, dev::Stream stream) {
    connection_.check();
    const BufferOptions& options = connection_.options();
    EP_CHECK(bytes_per_peer >= 0 && bytes_per_peer % 16 == 0, "bytes_per_peer must be a multiple of 16, got ",
             bytes_per_peer);
    EP_CHECK(bytes_per_peer <= options.num_data_bytes / options.num_ranks, "bytes_per_peer must be at most ",
             options.num_data_bytes / options.num_ranks, ", got ", bytes_per_peer);
    kernels_.push_all({.heap = connection_.heap_params(), .bytes_per_peer = static_cast<uint64_t>(bytes_per_peer)},
                      std::clamp(num_sms, 1, connection_.machine().num_sms), stream);
}

void Buffer::destroy(double timeout_s) noexcept {
    if (!connection_.is_open()) return;
    connection_.destroy(timeout_s);
    intranode_.release();
    low_latency_.release();
}

}  // namespace deep_ep::runtime
