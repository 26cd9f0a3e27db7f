#pragma once

#include <Python.h>

#include "core/non_copyable.h"

namespace deep_ep::bindings {

// A name that is asked for again and again. Never released.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// A reference that is released with this object.
class Owned : NonCopyable {
public:
    explicit Owned(PyObject* object) : object_(object) {}
    ~Owned() { Py_XDECREF(object_); }
    PyObject* get() const { return object_; }

private:
    PyObject* object_;
};

}  // namespace deep_ep::bindings
