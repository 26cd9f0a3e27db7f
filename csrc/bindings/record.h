// Records of arguments as Python sees them: a type for each list of kernels/params.h, made of keywords and never changed.
//
// A type of its own and not one of pybind11's, because an attribute of those takes 80 ns to set and a keyword 70: for the
// fields of a dispatch together as long as a launch. Here a field takes 10 to 15 (docs/decisions.md).
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/owned.h"
#include "kernels/params.h"

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

// -- Values ------------------------------------------------------------------------------------------------------------

template <class T>
constexpr const char* kTypeName = std::is_pointer_v<T>                 ? "address"
                                  : std::is_same_v<T, bool>            ? "bool"
                                  : std::is_same_v<T, int>             ? "int32"
                                  : std::is_same_v<T, uint32_t>        ? "uint32"
                                  : std::is_same_v<T, int64_t>         ? "int64"
                                  : std::is_same_v<T, kernels::Biases> ? "two addresses"
                                                                       : nullptr;

// Of a number, of a tensor, or of None: 0. Nothing: of neither; maybe with an exception set.
inline std::optional<uintptr_t> address_of(PyObject* value) {
    static PyObject* const data_ptr = interned("data_ptr");
    if (value == Py_None) return 0;
    if (!PyLong_Check(value)) {
        const Owned number(PyObject_CallMethodNoArgs(value, data_ptr));
        return number.get() != nullptr && PyLong_Check(number.get()) ? address_of(number.get()) : std::nullopt;
    }
    const unsigned long long address = PyLong_AsUnsignedLongLong(value);
    if (address == std::numeric_limits<unsigned long long>::max() && PyErr_Occurred() != nullptr) return std::nullopt;
    return static_cast<uintptr_t>(address);
}

template <class T> bool store_value(T& to, PyObject* value) {
    if constexpr (std::is_same_v<T, bool>) {
        const int truth = PyObject_IsTrue(value);
        to = truth == 1;
        return truth >= 0;
    } else if constexpr (std::is_pointer_v<T>) {
        const std::optional<uintptr_t> address = address_of(value);
        if (address.has_value()) to = reinterpret_cast<T>(*address);
        return address.has_value();
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

// -- What types do ---------------------------------------------------------------------------------------------------

inline Record* allocate(const RecordType& type) { return reinterpret_cast<Record*>(type.type->tp_alloc(type.type, 0)); }

inline void destroy(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

// The place of the field with that name, or -1. Callers give fields in their order, and their names are interned: mostly it
// is the one at `likely`, or one soon after it, which is told by its address.
inline int find_field(const RecordType& type, PyObject* name, int likely) {
    const auto num_fields = static_cast<int>(type.names.size());
    PyObject* const* names = type.names.data();
    for (int at = likely; at < num_fields; ++at)
        if (names[at] == name) return at;
    for (int at = 0; at < num_fields; ++at)
        if (names[at] == name || PyUnicode_Compare(names[at], name) == 0) return at;
    return -1;
}

inline void refuse_value(const RecordType& type, const Field& field, PyObject* value) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s must have the type %s, got %R", type.name, field.name, field.type, value);
}

inline bool fill(const RecordType& type, Record* record, PyObject* const* values, PyObject* names) {
    const Py_ssize_t num_given = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    const Field* fields = type.fields.data();
    int at = 0;
    for (Py_ssize_t i = 0; i < num_given; ++i) {
        PyObject* name = PyTuple_GET_ITEM(names, i);
        at = find_field(type, name, at);
        if (at < 0) {
            PyErr_Format(PyExc_TypeError, "%s has no field '%U'", type.name, name);
            return false;
        }
        const Field& field = fields[at];
        if (!field.store(record->args, values[i])) {
            refuse_value(type, field, values[i]);
            return false;
        }
        record->given |= uint64_t{1} << at++;
    }
    return true;
}

// The record types, to know what an object is.
inline std::vector<const RecordType*>& all_types() {
    static std::vector<const RecordType*> types;
    return types;
}

// Whether all fields of `base` are the first ones of `type`: then its struct is the first base of the other's.
inline bool is_extension(const RecordType& type, const RecordType& base) {
    return &type != &base && base.names.size() <= type.names.size() &&
           std::equal(base.names.begin(), base.names.end(), type.names.begin());
}

inline bool copy_base(const RecordType& type, Record* record, PyObject* base) {
    for (const RecordType* candidate : all_types()) {
        if (Py_TYPE(base) != candidate->type || !is_extension(type, *candidate)) continue;
        const auto* original = reinterpret_cast<const Record*>(base);
        record->given = original->given;
        std::memcpy(record->args, original->args, candidate->num_bytes);
        return true;
    }
    return false;
}

inline PyObject* filled(const RecordType& type, Record* record, PyObject* const* args, Py_ssize_t num_args,
                        PyObject* names) {
    if (record == nullptr) return nullptr;
    if (num_args > 1 || (num_args == 1 && !copy_base(type, record, args[0])))
        PyErr_Format(PyExc_TypeError, "%s takes keywords, after a record that it extends", type.name);
    else if (fill(type, record, args + num_args, names))
        return reinterpret_cast<PyObject*>(record);
    Py_DECREF(reinterpret_cast<PyObject*>(record));
    return nullptr;
}

// FIELDS: (name, type, meaning) of each.
inline PyObject* list_fields(const RecordType& type) {
    PyObject* list = PyTuple_New(static_cast<Py_ssize_t>(type.fields.size()));
    Py_ssize_t at = 0;
    for (const Field& field : type.fields) {
        PyObject* facts = Py_BuildValue("(sss)", field.name, field.type, field.meaning);
        if (list == nullptr || facts == nullptr) return nullptr;  // no memory, while the module is loaded
        PyTuple_SET_ITEM(list, at++, facts);
    }
    return list;
}

inline PyObject* get(PyObject* self, void* field) {
    return static_cast<const Field*>(field)->load(reinterpret_cast<const Record*>(self)->args);
}

inline bool add_record_type(PyObject* module, RecordType& type) {
    for (Field& field : type.fields) {
        type.names.push_back(PyUnicode_InternFromString(field.name));
        type.getters.push_back({field.name, &get, nullptr, field.meaning, &field});
    }
    type.getters.push_back({});
    PyType_Slot slots[] = {{Py_tp_methods, type.methods},
                           {Py_tp_getset, type.getters.data()},
                           {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
                           {Py_tp_repr, reinterpret_cast<void*>(type.represent)},
                           {0, nullptr}};
    PyType_Spec spec{type.qualified_name, static_cast<int>(offsetof(Record, args) + type.num_bytes), 0,
                     Py_TPFLAGS_DEFAULT, slots};
    PyObject* made = PyType_FromSpec(&spec);
    PyObject* fields = list_fields(type);
    if (made == nullptr || fields == nullptr) return false;
    type.type = reinterpret_cast<PyTypeObject*>(made);
    type.type->tp_vectorcall = type.make;
    all_types().push_back(&type);
    const bool is_listed = PyObject_SetAttrString(made, "FIELDS", fields) == 0;
    Py_DECREF(fields);
    return is_listed && PyModule_AddObject(module, type.name, made) == 0;
}

// Of keywords; of a record too, whose fields are the first ones of this type.
inline PyObject* make_record(const RecordType& type, PyObject* const* args, Py_ssize_t num_args, PyObject* names) {
    return filled(type, allocate(type), args, num_args, names);
}

// A copy of `self` with other values in the fields that are given.
inline PyObject* replace_in_record(const RecordType& type, PyObject* self, PyObject* const* args, Py_ssize_t num_args,
                                   PyObject* names) {
    if (num_args > 0) {
        PyErr_Format(PyExc_TypeError, "%s.replace takes keywords only", type.name);
        return nullptr;
    }
    Record* copy = allocate(type);
    if (copy != nullptr) {
        const auto* original = reinterpret_cast<const Record*>(self);
        copy->given = original->given;
        std::memcpy(copy->args, original->args, type.num_bytes);
    }
    return filled(type, copy, args, num_args, names);
}

inline PyObject* represent_record(const RecordType& type, PyObject* self) {
    const auto* record = reinterpret_cast<const Record*>(self);
    std::string text = std::string(type.name) + "(";
    for (size_t i = 0; i < type.fields.size(); ++i) {
        if ((record->given >> i & 1) == 0) continue;
        PyObject* value = type.fields[i].load(record->args);
        PyObject* shown = value == nullptr ? nullptr : PyObject_Repr(value);
        Py_XDECREF(value);
        if (shown == nullptr) return nullptr;
        text += std::string(text.back() == '(' ? "" : ", ") + type.fields[i].name + "=" + PyUnicode_AsUTF8(shown);
        Py_DECREF(shown);
    }
    return PyUnicode_FromString((text + ")").c_str());
}

// Null with an exception set: `object` is no such record.
inline const Record* as_record(const RecordType& type, PyObject* object) {
    if (Py_TYPE(object) == type.type) return reinterpret_cast<const Record*>(object);
    PyErr_Format(PyExc_TypeError, "expected %s, got %s", type.name, Py_TYPE(object)->tp_name);
    return nullptr;
}

// The arguments, or null with an exception set: `object` is no such record, or has fields that nobody gave.
inline const void* read_record(const RecordType& type, PyObject* object) {
    const Record* record = as_record(type, object);
    if (record == nullptr) return nullptr;
    if (record->given == ~uint64_t{0} >> (64 - type.fields.size())) return record->args;
    std::string missing;
    for (size_t i = 0; i < type.fields.size(); ++i)
        if ((record->given >> i & 1) == 0) missing += std::string(missing.empty() ? "" : ", ") + type.fields[i].name;
    PyErr_Format(PyExc_TypeError, "%s lacks %s", type.name, missing.c_str());
    return nullptr;
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

template <class Args> PyObject* make(PyObject* /*type*/, PyObject* const* args, size_t num_args, PyObject* names) {
    return make_record(record_type<Args>(), args, PyVectorcall_NARGS(num_args), names);
}

template <class Args> PyObject* replace(PyObject* self, PyObject* const* args, Py_ssize_t num_args, PyObject* names) {
    return replace_in_record(record_type<Args>(), self, args, num_args, names);
}

template <class Args> PyObject* represent(PyObject* self) { return represent_record(record_type<Args>(), self); }

template <class Args> RecordType describe(const char* name, const char* qualified_name, std::vector<Field> fields) {
    static_assert(std::is_trivially_copyable_v<Args>);
    return {.name = name,
            .qualified_name = qualified_name,
            .num_bytes = sizeof(Args),
            .fields = std::move(fields),
            .make = &make<Args>,
            .methods = {{"replace", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&replace<Args>)),
                         METH_FASTCALL | METH_KEYWORDS, "A copy with other values in the fields that are given."},
                        {nullptr, nullptr, 0, nullptr}},
            .represent = &represent<Args>,
            .getters = {},
            .type = nullptr,
            .names = {}};
}

#define EP_BOUND_FIELD(c_type, field, text)                                                                \
    Field{#field, kTypeName<decltype(Args::field)>, text,                                                  \
          [](void* args, PyObject* value) { return store_value(static_cast<Args*>(args)->field, value); }, \
          [](const void* args) { return load_value(static_cast<const Args*>(args)->field); }},
#define EP_BIND_RECORD(record, fields)                                                                      \
    template <> inline RecordType& record_type<kernels::record>() {                                         \
        using Args = kernels::record;                                                                       \
        static RecordType type = describe<Args>(#record, "deep_ep_cpp." #record, {fields(EP_BOUND_FIELD)}); \
        return type;                                                                                        \
    }
EP_RECORDS(EP_BIND_RECORD)
#undef EP_BIND_RECORD
#undef EP_BOUND_FIELD

// Makes each type, and an attribute of `module` of it; false: with an exception set.
#define EP_ADD_RECORD(record, fields) &&add_record_type(module, record_type<kernels::record>())
inline bool add_record_types(PyObject* module) { return true EP_RECORDS(EP_ADD_RECORD); }
#undef EP_ADD_RECORD

// The same of a record that lacks fields: those are zero.
template <class Args> const Args* read_unfinished(PyObject* object) {
    const Record* record = as_record(record_type<Args>(), object);
    return record == nullptr ? nullptr : reinterpret_cast<const Args*>(record->args);
}

template <class Args> const Args* read(PyObject* object) {
    return static_cast<const Args*>(read_record(record_type<Args>(), object));
}

}  // namespace deep_ep::bindings
