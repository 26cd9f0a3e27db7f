// Exceptions of ours as Python's, for functions that pybind11 does not call.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace deep_ep::bindings {

// Any exception of C++ or Python.
void set_python_error(std::exception_ptr thrown);

// What `call` returns, as a new reference; or null, with an exception set.
template <class F> PyObject* guarded(const F& call) {
    try {
        return call().release().ptr();
    } catch (...) {
        set_python_error(std::current_exception());
        return nullptr;
    }
}

}  // namespace deep_ep::bindings
