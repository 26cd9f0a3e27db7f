// Whether a tensor is what a kernel may read, asked of torch's objects by their names. Several are checked in every call, and in
// Python each of these questions takes twice as long.
#pragma once

#include <Python.h>

namespace deep_ep::bindings {

// A reference that is released with this object.
class Owned {
public:
    explicit Owned(PyObject* object) : object_(object) {}
    ~Owned() { Py_XDECREF(object_); }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    PyObject* get() const { return object_; }

private:
    PyObject* object_;
};

// A name that is asked for again and again. Never released.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

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

// shape_in_memory(tensor, device, dtypes, is_contiguous): see deep_ep_cpp.pyi.
inline PyObject* shape_in_memory(PyObject* /*module*/, PyObject* const* args, Py_ssize_t num_args) {
    static PyObject* const is_contiguous = interned("is_contiguous");
    static PyObject* const is_neg = interned("is_neg");
    static PyObject* const shape = interned("shape");
    if (num_args != 4 || !PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "shape_in_memory takes a tensor, a device, a tuple of dtypes and a bool");
        return nullptr;
    }
    PyObject* const tensor = args[0];
    if (has_dtype(tensor, args[2]) && is_on(tensor, args[1]) &&
        (args[3] != Py_True || is_true(PyObject_CallMethodNoArgs(tensor, is_contiguous))) && has_memory(tensor)) {
        const Owned negated(PyObject_CallMethodNoArgs(tensor, is_neg));
        PyObject* found = negated.get() == Py_False ? PyObject_GetAttr(tensor, shape) : nullptr;
        if (found != nullptr) return found;
    }
    // Sparse, nested or wrapped by torch.func: such tensors refuse to tell some of this.
    if (PyErr_Occurred() != nullptr) {
        if (PyErr_ExceptionMatches(PyExc_RuntimeError) == 0) return nullptr;
        PyErr_Clear();
    }
    Py_RETURN_NONE;
}

// false: with an exception set.
inline bool add_tensor_checks(PyObject* module) {
    static PyMethodDef methods[] = {
        {"shape_in_memory", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&shape_in_memory)), METH_FASTCALL,
         "shape_in_memory(tensor: object, device: object, dtypes: tuple, is_contiguous: bool) -> object\n\n"
         "The shape of a tensor that kernels may read, or None."},
        {nullptr, nullptr, 0, nullptr}};
    return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace deep_ep::bindings
