#include "bindings/direct_calls.h"

#include "bindings/errors.h"
#include "bindings/high_throughput_calls.h"
#include "bindings/low_latency_calls.h"
#include "bindings/tensor_maker.h"

namespace deep_ep::bindings {

namespace {

struct DirectCalls {
    PyObject_HEAD HighThroughputCalls* high_throughput;
    LowLatencyCalls* low_latency;
};

DirectCalls& read(PyObject* self) { return *reinterpret_cast<DirectCalls*>(self); }

using Function = py::object (*)(DirectCalls& self, PyObject* const* args);

// By keyword, all of them in this order: so none can be taken for another, and none has to be looked for.
struct Signature {
    const char* names;          // with a comma and a blank between them
    PyObject* given = nullptr;  // the names of the last call, which the caller's code keeps: mostly it is that again

    bool takes(Py_ssize_t num_positional, PyObject* keywords) {
        if (num_positional == 0 && keywords != nullptr && keywords == given) return true;
        const Owned comma(PyUnicode_FromString(", "));
        const Owned joined(keywords == nullptr ? PyUnicode_FromString("") : PyUnicode_Join(comma.get(), keywords));
        if (joined.get() == nullptr) return false;
        if (num_positional > 0 || PyUnicode_CompareWithASCIIString(joined.get(), names) != 0) {
            PyErr_Format(PyExc_TypeError, "takes the keywords %s, in this order, got %U", names, joined.get());
            return false;
        }
        Py_INCREF(keywords);
        Py_XSETREF(given, keywords);
        return true;
    }
};

template <Function kFunction> Signature& signature_of() {
    static Signature signature{""};
    return signature;
}

template <Function kFunction>
PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t num_positional, PyObject* keywords) {
    if (!signature_of<kFunction>().takes(num_positional, keywords)) return nullptr;
    return guarded([&] { return kFunction(read(self), args); });
}

template <Function kFunction> PyMethodDef method(const char* name, const char* arguments) {
    signature_of<kFunction>().names = arguments;
    constexpr _PyCFunctionFastWithKeywords kCall = &call<kFunction>;
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(kCall)), METH_FASTCALL | METH_KEYWORDS,
            arguments};
}

template <auto kCall> py::object high_throughput(DirectCalls& self, PyObject* const* args) {
    return (self.high_throughput->*kCall)(args);
}
template <auto kCall> py::object low_latency(DirectCalls& self, PyObject* const* args) {
    return (self.low_latency->*kCall)(args, borrow(reinterpret_cast<PyObject*>(&self)));
}
py::object add_low_latency_plan(DirectCalls& self, PyObject* const* args) {
    self.low_latency->add(borrow(args[0]));
    return py::none();
}
py::object add_low_latency_handle(DirectCalls& self, PyObject* const* args) {
    self.low_latency->add_handle(borrow(args[0]), borrow(args[1]));
    return py::none();
}

PyObject* make_calls(PyTypeObject* type, PyObject* args, PyObject* names) {
    PyObject *session, *options;
    if (names != nullptr || PyArg_ParseTuple(args, "OO!", &session, &PyDict_Type, &options) == 0) return nullptr;
    return guarded([&] {
        auto self = result(type->tp_alloc(type, 0));
        auto& calls = read(self.ptr());
        calls.high_throughput = new HighThroughputCalls(borrow(session), py::dict(borrow(options)));
        calls.low_latency = new LowLatencyCalls(borrow(session), py::dict(borrow(options)));
        return self;
    });
}

void destroy_calls(PyObject* self) {
    delete read(self).high_throughput;
    delete read(self).low_latency;
    PyTypeObject* const type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

void destroy_order(PyObject* self) {
    const auto* order = reinterpret_cast<StreamOrder*>(self);
    Py_XDECREF(order->last_stream);
    Py_XDECREF(order->last_event);
    PyTypeObject* const type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

bool add_type(PyObject* module, const char* name, PyType_Spec& spec) {
    PyObject* type = PyType_FromSpec(&spec);
    return type != nullptr && PyModule_AddObject(module, name, type) == 0;
}

bool add_stream_order(PyObject* module) {
    static PyMemberDef members[] = {{"last_stream", T_OBJECT, offsetof(StreamOrder, last_stream), 0, nullptr},
                                    {"last_event", T_OBJECT, offsetof(StreamOrder, last_event), 0, nullptr},
                                    {"is_marked", T_BOOL, offsetof(StreamOrder, is_marked), 0, nullptr},
                                    {"is_shared", T_BOOL, offsetof(StreamOrder, is_shared), 0, nullptr},
                                    {nullptr, 0, 0, 0, nullptr}};
    PyType_Slot slots[] = {
        {Py_tp_members, members}, {Py_tp_dealloc, reinterpret_cast<void*>(&destroy_order)}, {0, nullptr}};
    PyType_Spec spec{"deep_ep_cpp.StreamOrder", sizeof(StreamOrder), 0, Py_TPFLAGS_DEFAULT, slots};
    return add_type(module, "StreamOrder", spec);
}

}  // namespace

bool add_direct_calls(PyObject* module) {
    static PyMethodDef methods[] = {
        method<&high_throughput<&HighThroughputCalls::combine>>("combine", "x, handle, topk_weights, num_sms"),
        method<&high_throughput<&HighThroughputCalls::dispatch_cached>>("dispatch_cached", "x, handle, num_sms"),
        method<&high_throughput<&HighThroughputCalls::dispatch_fresh>>(
            "dispatch_fresh",
            "x, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights, "
            "expert_alignment, num_sms"),
        method<&low_latency<&LowLatencyCalls::dispatch>>(
            "low_latency_dispatch",
            "x, topk_idx, num_max_tokens, num_experts, cumulative_stats, wait_stats, use_fp8, round_scale, use_ue8m0, "
            "return_recv_hook"),
        method<&low_latency<&LowLatencyCalls::combine>>(
            "low_latency_combine", "x, topk_idx, topk_weights, handle, out, wait_stats, return_recv_hook"),
        method<&add_low_latency_plan>("add_low_latency_plan", "plan"),
        method<&add_low_latency_handle>("add_low_latency_handle", "src_info, plan"),
        {nullptr, nullptr, 0, nullptr}};
    PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(&make_calls)},
                           {Py_tp_methods, methods},
                           {Py_tp_dealloc, reinterpret_cast<void*>(&destroy_calls)},
                           {0, nullptr}};
    PyType_Spec spec{"deep_ep_cpp.DirectCalls", sizeof(DirectCalls), 0, Py_TPFLAGS_DEFAULT, slots};
    return add_type(module, "DirectCalls", spec) && add_stream_order(module) && add_low_latency_hook(module) &&
           add_tensor_maker(module);
}

}  // namespace deep_ep::bindings
