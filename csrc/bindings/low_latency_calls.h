// The same as high_throughput_calls.h for the low-latency mode, whose calls have a hook or none.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/caller_stream.h"
#include "bindings/maker.h"
#include "bindings/record.h"
#include "bindings/torch_tensor.h"
#include "runtime/buffer.h"

namespace deep_ep::bindings {

// What calls of one kind have in common: a `Plan` of _low_latency.py.
struct LowLatencyKind {
    std::array<int64_t, 4> shape;  // T, top-k, experts, hidden
    std::array<bool, 3> form;      // use_fp8, round_scale, use_ue8m0
    int64_t num_local, num_rows, num_words, entries_at, number_at;
    py::object recv_dtype, scale_dtype;  // scale_dtype: None without scales
    py::object scale_shape, scale_strides;
    py::tuple src_info, recv_count;  // shape, strides and offset among the words
    py::tuple tail;                  // of a handle: (T, hidden, experts)
    kernels::LowLatencyDispatchArgs dispatch_args;
    kernels::LowLatencyCombineArgs combine_args;
};

// What a call with a hook returns, as `Hook` of _low_latency.py: launches the receive phase, once.
class LowLatencyCalls;
struct LowLatencyHook {
    PyObject_HEAD PyObject* weak_references;
    struct State {
        py::object session, owner;  // of `calls`
        LowLatencyCalls* calls;
        py::object tensors;  // that the receive phase uses
        py::object number;   // that is given back, or none
        std::variant<kernels::LowLatencyDispatchArgs, kernels::LowLatencyCombineArgs> args;
        uint64_t ticket;
        dev::Stream stream;

        bool is_combine() const { return std::holds_alternative<kernels::LowLatencyCombineArgs>(args); }
    };
    State* state;  // null: it was called
};

class LowLatencyCalls {
public:
    LowLatencyCalls(const py::object& session, const py::dict& options);

    // (x, topk_idx, T, experts, cumulative stats, wait stats, use_fp8, round_scale, use_ue8m0, wants hook)
    py::object dispatch(PyObject* const* args, const py::object& owner);
    // (x, topk_idx, topk_weights, handle, out, wait stats, wants hook)
    py::object combine(PyObject* const* args, const py::object& owner);
    // From now on calls of this kind are made here.
    void add(const py::object& plan);
    // A handle of such a call, by its src_info.
    void add_handle(const py::object& src_info, const py::object& plan);

    // Of a hook.
    void receive(LowLatencyHook& hook);
    void drop(LowLatencyHook& hook) noexcept;

private:
    const LowLatencyKind* find(const std::array<int64_t, 4>& shape, const std::array<bool, 3>* form) const;
    const LowLatencyKind* find_of_handle(PyObject* handle, int64_t num_topk);
    void know(const py::object& src_info, const LowLatencyKind& kind);
    bool read_stats(PyObject* value, const dlpack::DataType& dtype, int64_t size, void** address) const;
    std::optional<Phase> open_phase(bool wants_hook) const;
    uint64_t launch(const kernels::LowLatencyDispatchArgs& args, uint64_t ticket, dev::Stream stream) {
        return native_.dispatch(args, ticket, stream);
    }
    uint64_t launch(const kernels::LowLatencyCombineArgs& args, uint64_t ticket, dev::Stream stream) {
        return native_.combine(args, ticket, stream);
    }
    template <class Args, class Tensors>
    py::object run(const Args& args, const Phase& phase, bool wants_hook, const Tensors& tensors,
                   const py::object& number, const py::object& owner);
    py::object view_of(const py::object& words, const py::tuple& view) const;
    py::object take_number();
    void give_back(py::object number, dev::Stream stream);
    py::object event() const { return result(PyObject_CallNoArgs(event_class_.ptr())); }

    runtime::LowLatency& native_;
    runtime::Buffer& buffer_;
    py::object weak_session_;  // the session has this
    py::object runtime_, event_class_, reinterpret_;
    CallerStream caller_;
    Maker maker_;
    py::object int32_, int64_, bfloat16_;
    int64_t num_ranks_;
    std::vector<std::unique_ptr<LowLatencyKind>> kinds_;
    // Handles of the last dispatches: a weak reference to src_info, and the kind.
    std::array<std::pair<py::object, const LowLatencyKind*>, 16> handles_;
    size_t next_handle_ = 0;
    std::vector<py::object> free_numbers_;  // `Numbers` of _low_latency.py
};

// false: with an exception set.
bool add_low_latency_hook(PyObject* module);
py::object make_hook(LowLatencyHook::State state);

}  // namespace deep_ep::bindings
