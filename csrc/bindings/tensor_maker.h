// Tensors of torch, allocated for less than torch.empty() costs the host.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>

namespace deep_ep::bindings {

// `maker(n, m)` in Python: an uninitialised tensor of that shape, of one type and on one device. Its memory comes from torch's
// allocator, for the stream that is current there.
struct TensorMaker {
    PyObject_HEAD vectorcallfunc call;
    // (shape, strides, dtype): allocates on the device that is current in torch, without asking its dispatcher. None: there is no
    // such function.
    PyObject* empty_strided;
    PyObject* current_device;     // (): its index. None: there is one device
    PyObject* new_empty_strided;  // (shape, strides): on `index`, by the dispatcher
    PyObject* dtype;
    int index;

    // New references, or null with an exception set.
    PyObject* make(const int64_t* extents, size_t num_dims) const;
    PyObject* make_strided(PyObject* shape, PyObject* strides) const;
};

// Null, with an exception set: it is none.
const TensorMaker* as_tensor_maker(PyObject* object);

// False: with an exception set. Makers may be made where native code can read tensors (exchange_api()).
bool add_tensor_maker(PyObject* module);

}  // namespace deep_ep::bindings
