// Memory of ours as a tensor of anybody's: the DLPack exchange structures, as https://dmlc.github.io/dlpack/latest/c_api.html
// lays them out (version 0.x, which torch.from_dlpack takes as a capsule named "dltensor").
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace deep_ep::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct Device {
    int32_t type;
    int32_t id;
};

struct DataType {
    uint8_t code;  // 0: signed, 1: unsigned, 2: IEEE float, 4: bfloat16
    uint8_t bits;
    uint16_t lanes;
};
constexpr DataType kBytes{1, 8, 1};

struct Tensor {
    void* data;
    Device device;
    int32_t num_dims;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

constexpr DataType kInt32{0, 32, 1}, kInt64{0, 64, 1}, kFloat32{2, 32, 1}, kBFloat16{4, 16, 1}, kBool{6, 8, 1};

constexpr bool operator==(const DataType& a, const DataType& b) {
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

// The same since version 1.
struct Version {
    uint32_t major, minor;
};
struct VersionedTensor {
    Version version;
    void* context;
    void (*deleter)(VersionedTensor*);
    uint64_t flags;
    Tensor tensor;
};

// What a library offers to native code (version 1.3). All return 0, or else a Python exception is set. None synchronises.
struct ExchangeApi {
    Version version;
    const ExchangeApi* previous;
    void* allocate;     // not used here: torch ignores record_stream on what comes from it
    void* from_object;  // nor this, which allocates
    int (*to_object)(VersionedTensor* tensor, void** object);
    int (*describe)(void* object, Tensor* tensor);  // valid as long as the object; absent in some libraries
    int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};
constexpr uint32_t kExchangeMajor = 1;

// A row-major tensor. `on_drop` runs when its last user is gone, on whichever thread that is.
inline ManagedTensor* make_tensor(void* data, Device device, DataType dtype, std::vector<int64_t> shape,
                                  std::function<void()> on_drop) {
    struct Owner {
        ManagedTensor managed;
        std::vector<int64_t> shape, strides;
        std::function<void()> on_drop;
    };
    auto owner = std::make_unique<Owner>();
    owner->strides.assign(shape.size(), 1);
    for (size_t i = shape.size(); i-- > 1;) owner->strides[i - 1] = owner->strides[i] * shape[i];
    owner->shape = std::move(shape);
    owner->on_drop = std::move(on_drop);
    owner->managed.tensor = {
        data, device, static_cast<int32_t>(owner->shape.size()), dtype, owner->shape.data(), owner->strides.data(), 0};
    owner->managed.deleter = [](ManagedTensor* managed) {
        const std::unique_ptr<Owner> dropped(static_cast<Owner*>(managed->context));
        dropped->on_drop();
    };
    owner->managed.context = owner.get();
    return &owner.release()->managed;
}

}  // namespace deep_ep::dlpack
