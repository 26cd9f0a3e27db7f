// What a process tells its peers about a piece of memory that they may map: of its GPU, or of the host for its GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

#include "core/shared_file.h"

namespace deep_ep::dev::cuda {

// Names one process on one host, also between containers (where process ids repeat) and after a fork.
struct ProcessId {
    uint64_t nonce = 0;
    int64_t pid = 0;
    std::array<char, 40> boot_id{};  // which boot of which host; empty where the system does not tell

    static ProcessId of_this_process();
    bool is_same_process(const ProcessId& other) const { return nonce == other.nonce && pid == other.pid; }
    // False only when both hosts are known and differ.
    bool may_be_same_host(const ProcessId& other) const;
};

struct SharedHandle {
    uint64_t magic = kMagic;
    ProcessId owner;
    std::array<unsigned char, 16> device_uuid{};
    uint64_t address = 0;      // in the owner's address space
    uint64_t base_offset = 0;  // of `address` in the mapping that opening `ipc` gives
    uint64_t num_bytes = 0;
    cudaIpcMemHandle_t ipc{};  // of GPU memory
    SharedFileHandle file{};   // of host memory

    static constexpr uint64_t kMagic = 0x3242'4853'5045'4544;  // "DEEPSHB2"

    bool is_on_host() const { return file.num_bytes != 0; }

    std::string pack() const;
    // Throws TransportError when `bytes` is not such a handle.
    static SharedHandle unpack(const std::string& bytes);
};

// "GPU-xxxxxxxx-xxxx-…", as nvidia-smi prints it.
std::string format_uuid(const std::array<unsigned char, 16>& uuid);

// The UUID of a device of this process.
std::array<unsigned char, 16> uuid_of(int device);

// The device with that UUID; -1: this process does not see it.
int find_device(const std::array<unsigned char, 16>& uuid);

// A sentence: why `device` of this process could not map GPU memory. Clears CUDA's last error.
std::string explain_open_failure(const SharedHandle& handle, int device, cudaError_t error);

}  // namespace deep_ep::dev::cuda
