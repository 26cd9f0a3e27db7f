// What Python makes of both kinds of calls in one step: a type with a function for each.
#pragma once

#include <Python.h>

namespace deep_ep::bindings {

// false: with an exception set.
bool add_direct_calls(PyObject* module);

}  // namespace deep_ep::bindings
