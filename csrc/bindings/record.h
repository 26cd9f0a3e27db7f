// Records of arguments as Python sees them: a type for each list of kernels/args.h, made of keywords and never changed.
//
// A type of its own and not one of pybind11's, because an attribute of those takes 80 ns to set and a keyword 70: for the
// fields of a dispatch together as long as a launch. Here a field takes 10 to 15 (docs/decisions.md).
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/args.h"

namespace deep_ep::bindings {

struct Field {
    const char* name;
    const char* type;  // as the stub has it; see kTypeName
    const char* meaning;
    bool (*store)(void* args, PyObject* value);  // false: the value is none of the type; maybe with an exception set
    PyObject* (*load)(const void* args);
};

// What Python holds. `given` has a bit for each field.
struct Record {
    PyObject_HEAD uint64_t given;
    alignas(alignof(std::max_align_t)) unsigned char args[1];  // as many as the type says
};

struct RecordType {
    const char* name;
    const char* qualified_name;
    size_t num_bytes;
    std::vector<Field> fields;
    vectorcallfunc make;
    PyMethodDef methods[2];
    reprfunc represent;
    std::vector<PyGetSetDef> getters;
    PyTypeObject* type;
    std::vector<PyObject*> names;  // interned, never released
};

// Makes each type, and an attribute of `module` of it; false: with an exception set.
bool add_record_types(PyObject* module);
// Of keywords; of a record too, whose fields are the first ones of this type.
PyObject* make_record(const RecordType& type, PyObject* const* args, Py_ssize_t num_args, PyObject* names);
// A copy of `self` with other values in the fields that are given.
PyObject* replace_in_record(const RecordType& type, PyObject* self, PyObject* const* args, Py_ssize_t num_args,
                            PyObject* names);
PyObject* represent_record(const RecordType& type, PyObject* self);
// The arguments, or null with an exception set: `object` is no such record, or has fields that nobody gave.
const void* read_record(const RecordType& type, PyObject* object);

// -- Values ------------------------------------------------------------------------------------------------------------

template <class T>
constexpr const char* kTypeName = std::is_pointer_v<T>                 ? "address"
                                  : std::is_same_v<T, bool>            ? "bool"
                                  : std::is_same_v<T, int>             ? "int32"
                                  : std::is_same_v<T, uint32_t>        ? "uint32"
                                  : std::is_same_v<T, int64_t>         ? "int64"
                                  : std::is_same_v<T, kernels::Biases> ? "two addresses"
                                                                       : nullptr;

template <class T> bool store_value(T& to, PyObject* value) {
    if constexpr (std::is_same_v<T, bool>) {
        const int truth = PyObject_IsTrue(value);
        to = truth == 1;
        return truth >= 0;
    } else if constexpr (std::is_pointer_v<T>) {
        const unsigned long long address = PyLong_AsUnsignedLongLong(value);
        to = reinterpret_cast<T>(static_cast<uintptr_t>(address));
        return address != std::numeric_limits<unsigned long long>::max() || PyErr_Occurred() == nullptr;
    } else if constexpr (std::is_array_v<T>) {
        if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != std::extent_v<T>) return false;
        for (size_t i = 0; i < std::extent_v<T>; ++i)
            if (!store_value(to[i], PyTuple_GET_ITEM(value, static_cast<Py_ssize_t>(i)))) return false;
        return true;
    } else {
        const long long number = PyLong_AsLongLong(value);
        if (number == -1 && PyErr_Occurred() != nullptr) return false;
        to = static_cast<T>(number);
        return static_cast<long long>(to) == number;
    }
}

template <class T> PyObject* load_value(const T& from) {
    if constexpr (std::is_same_v<T, bool>)
        return PyBool_FromLong(from ? 1 : 0);
    else if constexpr (std::is_pointer_v<T>)
        return PyLong_FromVoidPtr(const_cast<void*>(static_cast<const void*>(from)));
    else if constexpr (std::is_array_v<T>)
        return Py_BuildValue("(NN)", load_value(from[0]), load_value(from[1]));
    else
        return PyLong_FromLongLong(from);
}

// -- The type of each operation ----------------------------------------------------------------------------------------

#define EP_WHOLE_LOW_LATENCY_DISPATCH_ARGS(FIELD) EP_LOW_LATENCY_ARGS(FIELD) EP_LOW_LATENCY_DISPATCH_ARGS(FIELD)
#define EP_WHOLE_LOW_LATENCY_COMBINE_ARGS(FIELD) EP_LOW_LATENCY_ARGS(FIELD) EP_LOW_LATENCY_COMBINE_ARGS(FIELD)
#define EP_WHOLE_INTERNODE_NOTIFY_ARGS(FIELD) EP_NOTIFY_ARGS(FIELD) EP_INTERNODE_NOTIFY_ARGS(FIELD)
#define EP_WHOLE_INTERNODE_DISPATCH_ARGS(FIELD) EP_DISPATCH_ARGS(FIELD) EP_INTERNODE_DISPATCH_ARGS(FIELD)
#define EP_WHOLE_INTERNODE_COMBINE_ARGS(FIELD) EP_COMBINE_ARGS(FIELD) EP_INTERNODE_COMBINE_ARGS(FIELD)
#define EP_RECORDS(RECORD)                                             \
    RECORD(LayoutArgs, EP_LAYOUT_ARGS)                                 \
    RECORD(NotifyArgs, EP_NOTIFY_ARGS)                                 \
    RECORD(DispatchArgs, EP_DISPATCH_ARGS)                             \
    RECORD(CombineArgs, EP_COMBINE_ARGS)                               \
    RECORD(InternodeNotifyArgs, EP_WHOLE_INTERNODE_NOTIFY_ARGS)        \
    RECORD(InternodeDispatchArgs, EP_WHOLE_INTERNODE_DISPATCH_ARGS)    \
    RECORD(InternodeCombineArgs, EP_WHOLE_INTERNODE_COMBINE_ARGS)      \
    RECORD(LowLatencyDispatchArgs, EP_WHOLE_LOW_LATENCY_DISPATCH_ARGS) \
    RECORD(LowLatencyCombineArgs, EP_WHOLE_LOW_LATENCY_COMBINE_ARGS)

template <class Args> RecordType& record_type();

#define EP_DECLARE_RECORD(record, fields) template <> RecordType& record_type<kernels::record>();
EP_RECORDS(EP_DECLARE_RECORD)
#undef EP_DECLARE_RECORD

template <class Args> const Args* read(PyObject* object) {
    return static_cast<const Args*>(read_record(record_type<Args>(), object));
}

}  // namespace deep_ep::bindings
