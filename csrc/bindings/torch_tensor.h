// Tensors of torch, seen and made without a call of Python's: through DLPack's C exchange, which torch offers since 2.10. A
// question to a tensor takes 5 ns this way and 60 ns by its name.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>

#include "bindings/owned.h"
#include "bindings/tensor_check.h"
#include "core/dlpack.h"

namespace deep_ep::bindings {

// A tensor whose elements lie row by row in memory of one device. Borrowed: as long as the object is there, unchanged.
class TensorView {
public:
    // false: it is none, or one that only Python's checks can judge. Sets no exception.
    bool read(PyObject* object, const dlpack::Device& device) {
        if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != TensorClass::get().type) return false;
        if (exchange_api()->describe(object, &tensor_) != 0) {
            PyErr_Clear();
            return false;
        }
        constexpr uint8_t kComplex = 5;  // may be lazily conjugated, which the exchange does not tell
        return tensor_.device.type == device.type && tensor_.device.id == device.id && (has_memory() || is_empty()) &&
               tensor_.dtype.code != kComplex && !is_negated(object);
    }

    // Rows that kernels move in whole units of 16 bytes.
    bool is_rows() const {
        constexpr int64_t kUnit = 16;
        return is_matrix() && extent(1) > 0 && extent(1) * item_bytes() % kUnit == 0 && is_aligned();
    }
    bool is_aligned() const {
        constexpr uintptr_t kUnit = 16;
        return reinterpret_cast<uintptr_t>(tensor_.data) % kUnit == 0;
    }

    // top-k indices of tokens.
    bool read_indices(PyObject* object, const dlpack::Device& device) {
        return read(object, device) && (is(dlpack::kInt64) || is(dlpack::kInt32)) && is_matrix() && extent(1) > 0;
    }

    bool is(const dlpack::DataType& dtype) const { return tensor_.dtype == dtype; }
    bool is_vector() const { return tensor_.num_dims == 1 && is_contiguous(); }
    bool is_matrix() const { return tensor_.num_dims == 2 && is_contiguous(); }
    int num_dims() const { return tensor_.num_dims; }
    int64_t extent(int dim) const { return tensor_.shape[dim]; }
    int64_t stride(int dim) const { return tensor_.strides[dim]; }
    const dlpack::DataType& dtype() const { return tensor_.dtype; }
    int64_t item_bytes() const { return tensor_.dtype.bits * tensor_.dtype.lanes / 8; }
    template <class T> T* address() const {
        return reinterpret_cast<T*>(static_cast<uint8_t*>(tensor_.data) + tensor_.byte_offset);
    }

    // Both are contiguous.
    bool overlaps(const TensorView& other) const {
        const auto *begin = address<uint8_t>(), *other_begin = other.address<uint8_t>();
        return begin < other_begin + other.num_bytes() && other_begin < begin + num_bytes();
    }
    bool is_contiguous() const {
        int64_t expected = 1;
        for (int dim = tensor_.num_dims; dim-- > 0;) {
            if (extent(dim) != 1 && stride(dim) != expected) return is_empty();
            expected *= extent(dim);
        }
        return true;
    }

    int64_t num_bytes() const {
        int64_t count = item_bytes();
        for (int dim = 0; dim < tensor_.num_dims; ++dim) count *= extent(dim);
        return count;
    }

private:
    // Lazily: nor does the exchange tell that.
    static bool is_negated(PyObject* object) {
        static PyObject* const is_neg = interned("is_neg");
        const Owned negated(PyObject_CallMethodNoArgs(object, is_neg));
        PyErr_Clear();
        return negated.get() != Py_False;
    }
    bool has_memory() const { return tensor_.data != nullptr; }
    bool is_empty() const {
        for (int dim = 0; dim < tensor_.num_dims; ++dim)
            if (extent(dim) == 0) return true;
        return false;
    }

    dlpack::Tensor tensor_{};
};

}  // namespace deep_ep::bindings
