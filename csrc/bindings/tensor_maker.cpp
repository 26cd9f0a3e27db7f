#include "bindings/tensor_maker.h"

#include <structmember.h>

#include <algorithm>
#include <array>

#include "bindings/owned.h"
#include "bindings/tensor_check.h"

namespace deep_ep::bindings {

namespace {

constexpr size_t kMaxDims = 8;

const TensorMaker& read(PyObject* self) { return *reinterpret_cast<const TensorMaker*>(self); }

PyObject* call_maker(PyObject* self, PyObject* const* args, size_t num_args, PyObject* names) {
    const auto num_dims = static_cast<size_t>(PyVectorcall_NARGS(num_args));
    if (names != nullptr || num_dims > kMaxDims) {
        PyErr_Format(PyExc_TypeError, "takes at most %zu extents, and no keywords", kMaxDims);
        return nullptr;
    }
    std::array<int64_t, kMaxDims> extents{};
    for (size_t dim = 0; dim < num_dims; ++dim) {
        extents[dim] = PyLong_AsLongLong(args[dim]);
        if (extents[dim] == -1 && PyErr_Occurred() != nullptr) return nullptr;
    }
    return read(self).make(extents.data(), num_dims);
}

// (shape, strides): not row-major.
PyObject* call_strided(PyObject* self, PyObject* const* args, Py_ssize_t num_args) {
    if (num_args == 2) return read(self).make_strided(args[0], args[1]);
    PyErr_SetString(PyExc_TypeError, "takes a shape and strides");
    return nullptr;
}

PyObject* keep(PyObject* object) {
    Py_INCREF(object);
    return object;
}

// (example, empty_strided, current_device): a tensor of the type and on the device.
PyObject* make_maker(PyTypeObject* type, PyObject* args, PyObject* names) {
    static const char* const kNames[] = {"example", "empty_strided", "current_device", nullptr};
    PyObject *example, *empty_strided, *current_device;
    if (PyArg_ParseTupleAndKeywords(args, names, "OOO", const_cast<char**>(kNames), &example, &empty_strided,
                                    &current_device) == 0)
        return nullptr;
    dlpack::Tensor tensor;
    if (exchange_api() == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "native code cannot read the tensors of this torch");
        return nullptr;
    }
    if (exchange_api()->describe(example, &tensor) != 0) return nullptr;
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    auto* maker = reinterpret_cast<TensorMaker*>(self);
    maker->call = &call_maker;
    maker->empty_strided = keep(empty_strided);
    maker->current_device = keep(current_device);
    maker->new_empty_strided = PyObject_GetAttrString(example, "new_empty_strided");
    maker->dtype = PyObject_GetAttrString(example, "dtype");
    maker->index = tensor.device.id;
    if (maker->new_empty_strided != nullptr && maker->dtype != nullptr) return self;
    Py_DECREF(self);
    return nullptr;
}

void destroy_maker(PyObject* self) {
    const TensorMaker& maker = read(self);
    Py_XDECREF(maker.empty_strided);
    Py_XDECREF(maker.current_device);
    Py_XDECREF(maker.new_empty_strided);
    Py_XDECREF(maker.dtype);
    PyTypeObject* const type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

}  // namespace

PyObject* TensorMaker::make(const int64_t* extents, size_t num_dims) const {
    const Owned shape(PyTuple_New(static_cast<Py_ssize_t>(num_dims)));
    const Owned strides(PyTuple_New(static_cast<Py_ssize_t>(num_dims)));
    if (shape.get() == nullptr || strides.get() == nullptr) return nullptr;
    int64_t stride = 1;
    for (size_t dim = num_dims; dim-- > 0;) {
        PyTuple_SET_ITEM(shape.get(), static_cast<Py_ssize_t>(dim), PyLong_FromLongLong(extents[dim]));
        PyTuple_SET_ITEM(strides.get(), static_cast<Py_ssize_t>(dim), PyLong_FromLongLong(stride));
        if (__builtin_mul_overflow(stride, std::max<int64_t>(extents[dim], 1), &stride)) {
            PyErr_SetString(PyExc_OverflowError, "the tensor has more elements than an int64 counts");
            return nullptr;
        }
    }
    return PyErr_Occurred() == nullptr ? make_strided(shape.get(), strides.get()) : nullptr;
}

PyObject* TensorMaker::make_strided(PyObject* shape, PyObject* strides) const {
    bool is_current = true;
    if (empty_strided != Py_None && current_device != Py_None) {
        // A thread that never chose a device has the first one, where an allocation would make a context.
        const Owned current(PyObject_CallNoArgs(current_device));
        if (current.get() == nullptr) return nullptr;
        is_current = PyLong_AsLong(current.get()) == index;
        if (PyErr_Occurred() != nullptr) return nullptr;
    }
    if (empty_strided != Py_None && is_current) {
        const Owned args(PyTuple_Pack(3, shape, strides, dtype));
        return args.get() == nullptr ? nullptr : PyObject_Call(empty_strided, args.get(), nullptr);
    }
    const std::array<PyObject*, 2> args{shape, strides};
    return PyObject_Vectorcall(new_empty_strided, args.data(), args.size(), nullptr);
}

namespace {
PyTypeObject* maker_type = nullptr;
}

const TensorMaker* as_tensor_maker(PyObject* object) {
    if (Py_TYPE(object) == maker_type) return &read(object);
    PyErr_Format(PyExc_TypeError, "expected a TensorMaker, got %R", object);
    return nullptr;
}

bool add_tensor_maker(PyObject* module) {
    static PyMethodDef methods[] = {{"strided", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_strided)),
                                     METH_FASTCALL, "strided(shape, strides): not row-major."},
                                    {nullptr, nullptr, 0, nullptr}};
    static PyMemberDef members[] = {
        {"__vectorcalloffset__", T_PYSSIZET, offsetof(TensorMaker, call), READONLY, nullptr},
        {nullptr, 0, 0, 0, nullptr}};
    PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(&make_maker)},
                           {Py_tp_members, members},
                           {Py_tp_methods, methods},
                           {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                           {Py_tp_dealloc, reinterpret_cast<void*>(&destroy_maker)},
                           {0, nullptr}};
    PyType_Spec spec{"deep_ep_cpp.TensorMaker", sizeof(TensorMaker), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
                     slots};
    maker_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    return maker_type != nullptr &&
           PyModule_AddObject(module, "TensorMaker", reinterpret_cast<PyObject*>(maker_type)) == 0;
}

}  // namespace deep_ep::bindings
