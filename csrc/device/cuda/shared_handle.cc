#include "device/cuda/shared_handle.h"

#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <type_traits>

#include "device/cuda/cuda_error.h"
#include "device/cuda/device.h"

namespace deep_ep::dev::cuda {

static_assert(std::is_trivially_copyable_v<SharedHandle>);

ProcessId ProcessId::of_this_process() {
    static const uint64_t nonce = [] {
        uint64_t random = 0;
        if (getrandom(&random, sizeof(random), 0) != static_cast<ssize_t>(sizeof(random))) {
            throw TransportError(concat("getrandom: ", std::strerror(errno)));
        }
        return random;
    }();
    ProcessId id;
    id.nonce = nonce;
    id.pid = getpid();
    std::string boot_id;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> boot_id;
    boot_id.copy(id.boot_id.data(), id.boot_id.size() - 1);
    return id;
}

bool ProcessId::may_be_same_host(const ProcessId& other) const {
    return boot_id[0] == 0 || other.boot_id[0] == 0 || boot_id == other.boot_id;
}

std::string SharedHandle::pack() const { return std::string(reinterpret_cast<const char*>(this), sizeof(*this)); }

SharedHandle SharedHandle::unpack(const std::string& bytes) {
    SharedHandle handle;
    const bool has_size = bytes.size() == sizeof(handle);
    if (has_size) std::memcpy(&handle, bytes.data(), sizeof(handle));
    if (!has_size || handle.magic != kMagic) {
        throw TransportError(concat("not a handle of CUDA memory: expected ", sizeof(handle), " bytes, got ",
                                    bytes.size(), ". Do all ranks run the same version on the same kind of device?"));
    }
    return handle;
}

std::string format_uuid(const std::array<unsigned char, 16>& uuid) {
    std::string text = "GPU-";
    for (size_t i = 0; i < uuid.size(); ++i) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
        char digits[3];
        std::snprintf(digits, sizeof(digits), "%02x", uuid[i]);
        text += digits;
    }
    return text;
}

std::array<unsigned char, 16> uuid_of(int device) {
    cudaDeviceProp properties{};
    EP_CUDA(cudaGetDeviceProperties(&properties, device));
    std::array<unsigned char, 16> uuid;
    static_assert(sizeof(properties.uuid) == sizeof(uuid));
    std::memcpy(uuid.data(), &properties.uuid, sizeof(uuid));
    return uuid;
}

int find_device(const std::array<unsigned char, 16>& uuid) {
    for (int i = 0; i < count_cuda_devices(); ++i) {
        if (uuid_of(i) == uuid) return i;
    }
    return -1;
}

std::string explain_open_failure(const SharedHandle& handle, int device, cudaError_t error) {
    static_cast<void>(cudaGetLastError());
    std::string text =
        concat("cannot map the memory of process ", handle.owner.pid, " on ", format_uuid(handle.device_uuid),
               " into process ", ProcessId::of_this_process().pid, " on CUDA device ", device, " (",
               format_uuid(uuid_of(device)), "): ", describe(error), ". ");
    if (!handle.owner.may_be_same_host(ProcessId::of_this_process())) {
        return text + "The two processes run on different hosts, where this kind of memory cannot be shared";
    }
    const int owner = find_device(handle.device_uuid);
    int can_access = 0;
    if (owner >= 0 && owner != device) ignore(cudaDeviceCanAccessPeer(&can_access, device, owner));
    if (owner >= 0 && owner != device && can_access == 0) {
        return text + concat("Devices ", device, " and ", owner,
                             " of this process cannot access each other's memory: no NVLink, and no peer access over "
                             "PCIe (see `nvidia-smi topo -p2p r`). DEEP_EP_HEAP=host does without");
    }
    if (owner < 0)
        text += "That GPU is not visible to this process (CUDA_VISIBLE_DEVICES); DEEP_EP_HEAP=host does without. ";
    return text + "Processes in different containers must share their IPC and PID namespaces, and the owner must live";
}

}  // namespace deep_ep::dev::cuda
