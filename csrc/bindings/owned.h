#pragma once

#include <Python.h>

namespace deep_ep::bindings {

// A name that is asked for again and again. Never released.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

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

}  // namespace deep_ep::bindings
