#include "device/cuda/registered_pages.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <utility>

#include "device/cuda/cuda_error.h"

namespace deep_ep::dev::cuda {

RegisteredPages::RegisteredPages(MappedFile memory) : memory_(std::move(memory)) {
    // Where the system lends large pages to shared memory, there are fewer for the GPU to look up.
    static_cast<void>(madvise(memory_.address(), memory_.num_bytes(), MADV_HUGEPAGE));
    const cudaError_t error =
        cudaHostRegister(memory_.address(), memory_.num_bytes(), cudaHostRegisterMapped | cudaHostRegisterPortable);
    if (error != cudaSuccess) {
        ignore(error);
        throw TransportError(concat("cannot pin ", memory_.num_bytes(), " bytes of shared host memory for the GPU: ",
                                    describe(error), ". DEEP_EP_HEAP=device does without"));
    }
    const cudaError_t mapped = cudaHostGetDevicePointer(&device_address_, memory_.address(), 0);
    if (mapped != cudaSuccess) {
        ignore(cudaHostUnregister(memory_.address()));
        check(mapped, "cudaHostGetDevicePointer", __FILE__, __LINE__);
    }
}

// Where this fails, the driver is unloading or the context is broken, and takes the pages back itself.
RegisteredPages::~RegisteredPages() { ignore(cudaHostUnregister(memory_.address())); }

}  // namespace deep_ep::dev::cuda
