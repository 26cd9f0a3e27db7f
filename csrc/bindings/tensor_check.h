// Whether a tensor is what a kernel may read, asked of torch's objects by their names. Several are checked in every call, and in
// Python each of these questions takes twice as long.
#pragma once

#include <Python.h>

#include "bindings/owned.h"
#include "core/dlpack.h"

namespace deep_ep::bindings {

inline bool is_true(PyObject* answer) {
    const Owned owned(answer);
    return answer != nullptr && PyObject_IsTrue(answer) == 1;
}

inline bool is_in(PyObject* item, PyObject* tuple) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i)
        if (PyTuple_GET_ITEM(tuple, i) == item) return true;
    return false;
}

// Any type, if none is named; but for those whose memory does not hold the values.
inline bool has_dtype(PyObject* tensor, PyObject* dtypes) {
    static PyObject* const dtype = interned("dtype");
    static PyObject* const is_quantized = interned("is_quantized");
    static PyObject* const is_conj = interned("is_conj");
    if (PyTuple_GET_SIZE(dtypes) == 0) {
        const Owned quantized(PyObject_GetAttr(tensor, is_quantized));
        const Owned conjugated(quantized.get() == Py_False ? PyObject_CallMethodNoArgs(tensor, is_conj) : nullptr);
        return conjugated.get() == Py_False;
    }
    const Owned found(PyObject_GetAttr(tensor, dtype));
    return found.get() != nullptr && is_in(found.get(), dtypes);
}

inline bool is_on(PyObject* tensor, PyObject* wanted) {
    static PyObject* const device = interned("device");
    const Owned found(PyObject_GetAttr(tensor, device));
    return found.get() != nullptr && PyObject_RichCompareBool(found.get(), wanted, Py_EQ) == 1;
}

// data_ptr() says where the elements are.
inline bool has_memory(PyObject* tensor) {
    static PyObject* const data_ptr = interned("data_ptr");
    static PyObject* const numel = interned("numel");
    const Owned address(PyObject_CallMethodNoArgs(tensor, data_ptr));
    if (address.get() == nullptr) return false;
    if (PyObject_IsTrue(address.get()) == 1) return true;
    const Owned count(PyObject_CallMethodNoArgs(tensor, numel));
    return count.get() != nullptr && PyObject_IsTrue(count.get()) == 0;
}

// Of torch.Tensor, and of its classes that mean no other memory than it does. Never released.
struct TensorClass {
    PyObject* type = nullptr;
    PyObject* is_plain = nullptr;  // (value): whether an object of another type is of such a class

    static TensorClass& get() {
        static TensorClass known;
        return known;
    }

    bool includes(PyObject* value) const {
        return reinterpret_cast<PyObject*>(Py_TYPE(value)) == type || is_true(PyObject_CallOneArg(is_plain, value));
    }
};

// A new reference, or null where it is none or an exception is set.
inline PyObject* find_shape(PyObject* tensor, PyObject* device, PyObject* dtypes, bool is_contiguous) {
    static PyObject* const contiguous = interned("is_contiguous");
    static PyObject* const is_neg = interned("is_neg");
    static PyObject* const shape = interned("shape");
    if (!TensorClass::get().includes(tensor) || !has_dtype(tensor, dtypes) || !is_on(tensor, device) ||
        (is_contiguous && !is_true(PyObject_CallMethodNoArgs(tensor, contiguous))) || !has_memory(tensor))
        return nullptr;
    const Owned negated(PyObject_CallMethodNoArgs(tensor, is_neg));
    return negated.get() == Py_False ? PyObject_GetAttr(tensor, shape) : nullptr;
}

// What Python gets of a shape that may be null.
inline PyObject* answer(PyObject* shape) {
    if (shape != nullptr) return shape;
    // Sparse, nested or wrapped by torch.func: such tensors refuse to tell some of this.
    if (PyErr_Occurred() != nullptr && PyErr_ExceptionMatches(PyExc_RuntimeError) == 0) return nullptr;
    PyErr_Clear();
    Py_RETURN_NONE;
}

inline bool takes(Py_ssize_t num_given, PyObject* const* args) {
    if (num_given == 4 && PyTuple_Check(args[2])) return true;
    PyErr_SetString(PyExc_TypeError, "takes a tensor, a device, a tuple of dtypes and one thing more");
    return false;
}

// shape_in_memory(tensor, device, dtypes, is_contiguous): see deep_ep_cpp.pyi.
inline PyObject* shape_in_memory(PyObject* /*module*/, PyObject* const* args, Py_ssize_t num_args) {
    return takes(num_args, args) ? answer(find_shape(args[0], args[1], args[2], args[3] == Py_True)) : nullptr;
}

// matrix_shape(tensor, device, dtypes, num_rows).
inline PyObject* matrix_shape(PyObject* /*module*/, PyObject* const* args, Py_ssize_t num_args) {
    if (!takes(num_args, args)) return nullptr;
    PyObject* shape = find_shape(args[0], args[1], args[2], true);
    if (shape == nullptr) return answer(nullptr);
    const bool fits = PyTuple_GET_SIZE(shape) == 2 &&
                      (args[3] == Py_None || PyObject_RichCompareBool(PyTuple_GET_ITEM(shape, 0), args[3], Py_EQ) == 1);
    if (fits) return shape;
    Py_DECREF(shape);
    return answer(nullptr);
}

// Null: this torch has none.
inline const dlpack::ExchangeApi*& exchange_api() {
    static const dlpack::ExchangeApi* api = nullptr;
    return api;
}

// Of the class whose tensors are to be read.
inline void find_exchange_api(PyObject* tensor_class) {
    const Owned capsule(PyObject_GetAttrString(tensor_class, "__dlpack_c_exchange_api__"));
    const void* found = capsule.get() == nullptr ? nullptr : PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api");
    PyErr_Clear();
    const auto* api = static_cast<const dlpack::ExchangeApi*>(found);
    const bool is_known = api != nullptr && api->version.major == dlpack::kExchangeMajor && api->describe != nullptr;
    exchange_api() = is_known ? api : nullptr;
}

// use_tensor_class(type, is_plain).
inline PyObject* use_tensor_class(PyObject* /*module*/, PyObject* const* args, Py_ssize_t num_args) {
    if (num_args != 2) {
        PyErr_SetString(PyExc_TypeError, "use_tensor_class takes a class and a function");
        return nullptr;
    }
    Py_INCREF(args[0]);
    Py_INCREF(args[1]);
    TensorClass::get() = {args[0], args[1]};
    find_exchange_api(args[0]);
    Py_RETURN_NONE;
}

template <_PyCFunctionFast kFunction> PyMethodDef method(const char* name, const char* text) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(kFunction)), METH_FASTCALL, text};
}

// false: with an exception set.
inline bool add_tensor_checks(PyObject* module) {
    static PyMethodDef methods[] = {
        method<&shape_in_memory>("shape_in_memory",
                                 "shape_in_memory(tensor: object, device: object, dtypes: tuple, is_contiguous: bool)"
                                 " -> object\n\nThe shape of a tensor that kernels may read, or None."),
        method<&matrix_shape>("matrix_shape",
                              "matrix_shape(tensor: object, device: object, dtypes: tuple, num_rows: object)"
                              " -> object\n\nThe same of a matrix."),
        method<&use_tensor_class>("use_tensor_class", "use_tensor_class(tensor_class: type, is_plain: object) -> None"),
        {nullptr, nullptr, 0, nullptr}};
    return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace deep_ep::bindings
