#include "runtime/buffer.h"

#include "kernels/nvshmem_kernels.h"
#include "rail/nvshmem/loader.h"

namespace deep_ep::runtime {

namespace {

#if EP_WITH_CUDA
using kernels::NvshmemKernels;

const NvshmemKernels& library_kernels() {
    static const NvshmemKernels& found = []() -> const NvshmemKernels& {
        const auto* kernels = static_cast<const NvshmemKernels*>(rail::nvshmem::loaded_world().library().kernels);
        if (kernels == nullptr || kernels->shape != kernels::kNvshmemKernelShape)
            throw TransportError(
                "the library of the engine nvshmem has the kernels of another version of deep_ep: build it "
                "again with `python -m deep_ep build-nvshmem`");
        return *kernels;
    }();
    return found;
}

template <auto kLaunch, class Params> void launch(const Params& params, dev::Stream stream) {
    rail::nvshmem::Complaint complaint{};
    if (!(library_kernels().*kLaunch)(&params, stream, &complaint)) throw CudaError(complaint.text);
}

// The CUDA kernels of this build, with those across nodes from the library of the engine `nvshmem`. Throws TransportError where
// the library is not loaded, or was made from other kernels.
const kernels::KernelTable& nvshmem_kernel_table() {
    static const kernels::KernelTable table = [] {
        static_cast<void>(library_kernels());
        kernels::KernelTable made = kernels::cuda_kernel_table();
#define EP_ENTRY(name, Params) made.name = &launch<&NvshmemKernels::name>;
        EP_OPERATIONS_ACROSS_NODES(EP_ENTRY)
        EP_LOW_LATENCY_ACROSS_NODES(EP_ENTRY)
#undef EP_ENTRY
        return made;
    }();
    return table;
}
#endif

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
