#include "runtime/nvshmem_table.h"

#include "core/error.h"
#include "kernels/nvshmem_kernels.h"
#include "rail/nvshmem/loader.h"

#if EP_WITH_CUDA
namespace deep_ep::runtime {
namespace {

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

}  // namespace

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

}  // namespace deep_ep::runtime
#endif
