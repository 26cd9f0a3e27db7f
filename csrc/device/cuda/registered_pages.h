// Pages of host memory that the GPUs of this process read and write.
#pragma once

#include "core/mapped_file.h"
#include "core/non_copyable.h"

namespace deep_ep::dev::cuda {

class RegisteredPages : NonCopyable {
public:
    // For all GPUs of this process; the current one makes the call. Throws TransportError.
    explicit RegisteredPages(MappedFile memory);
    ~RegisteredPages();

    void* address() const { return device_address_; }  // for kernels, and for CUDA's copies

private:
    MappedFile memory_;
    void* device_address_ = nullptr;
};

}  // namespace deep_ep::dev::cuda
