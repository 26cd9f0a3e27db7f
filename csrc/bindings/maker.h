// Ordinary tensors of torch, made natively as Python makes them; and small helpers for what Python gives.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/record.h"
#include "bindings/tensor_maker.h"

namespace deep_ep::bindings {

namespace py = pybind11;

// The result of a call of Python's, whose exception is thrown.
inline py::object result(PyObject* made) {
    if (made == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
}

// Nothing: it is no int of that range.
inline std::optional<int64_t> read_int(PyObject* value, int64_t least, int64_t most) {
    if (!PyLong_CheckExact(value)) return std::nullopt;
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
    return overflow == 0 && number >= least && number <= most ? std::optional(number) : std::nullopt;
}

inline py::object borrow(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

// Where the elements of a tensor are; None: null.
template <class T> T* address_at(const py::handle& tensor) {
    const std::optional<uintptr_t> address = address_of(tensor.ptr());
    if (!address.has_value()) throw py::error_already_set();
    return reinterpret_cast<T*>(*address);
}

// As `empty[dtype](shape...)` of _tensors.py, whose makers these are.
class Maker {
public:
    explicit Maker(py::object empty) : empty_(std::move(empty)) {}

    template <class... Extents> py::object make(const py::object& dtype, Extents... extents) {
        const std::array<int64_t, sizeof...(Extents)> shape{extents...};
        return result(find(dtype).make(shape.data(), shape.size()));
    }
    // Not row-major.
    py::object make_strided(const py::object& dtype, const py::object& shape, const py::object& strides) {
        return result(find(dtype).make_strided(shape.ptr(), strides.ptr()));
    }

private:
    const TensorMaker& find(const py::object& dtype) {
        for (const py::object& known : known_)
            if (const TensorMaker* maker = as_tensor_maker(known.ptr()); maker->dtype == dtype.ptr()) return *maker;
        const py::object object = empty_[dtype];
        const TensorMaker* maker = as_tensor_maker(object.ptr());
        if (maker == nullptr) throw py::error_already_set();
        known_.push_back(object);
        return *maker;
    }

    py::object empty_;
    std::vector<py::object> known_;  // few
};

}  // namespace deep_ep::bindings
