// Calls in one step: the usual kinds of dispatch and combine, checked, allocated for, launched and answered natively. What is not
// usual (a wrong argument, another stream than that of the call before, an asynchronous call, a graph, biases, several nodes) is
// left to Python, which can do all of it and finds the words for what is wrong: then a function here has had no effect, and
// returns None.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <initializer_list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/caller_stream.h"
#include "bindings/lent_rows.h"
#include "bindings/maker.h"
#include "bindings/record.h"
#include "bindings/torch_tensor.h"
#include "runtime/buffer.h"

namespace deep_ep::bindings {

// Sizes and addresses of a payload, and of the tensors of a handle within a node.
struct Payload {
    PyObject *x, *scales;  // null: there are none
    TensorView rows, scale_view;
    int64_t num_tokens() const { return rows.extent(0); }
    int64_t row_bytes() const { return rows.extent(1) * rows.item_bytes(); }
    int64_t num_scales() const { return scales == nullptr ? 0 : scale_view.extent(1); }
};
struct HandleView {
    TensorView matrix, src_idx, send_head;
    int64_t num_tokens() const { return send_head.extent(0); }
    int64_t num_rows() const { return src_idx.extent(0); }
};

// What dispatches with rows of one kind have in common: a `Kind` of _high_throughput.py.
struct RowKind {
    std::array<int64_t, 4> numbers;    // hidden, scales, top-k, experts
    std::array<py::object, 3> dtypes;  // of rows, scales and indices; None: there are none
    py::object form;                   // RowForm of _tensors.py
    std::shared_ptr<RowForm> native;
    int64_t lent_row_bytes;  // 0: such rows cannot be lent
    kernels::DispatchArgs args;
};

// Of one Buffer within a node. The functions take arguments as a vectorcall gives them, borrowed, and may throw.
class HighThroughputCalls {
public:
    HighThroughputCalls(const py::object& session, py::dict options);

    // (x, handle, topk_weights or None, num_sms)
    py::object combine(PyObject* const* args);
    // (x, handle, num_sms)
    py::object dispatch_cached(PyObject* const* args);
    // (x, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights, expert_alignment, num_sms)
    py::object dispatch_fresh(PyObject* const* args);

private:
    struct Routing;

    bool read_payload(PyObject* x, Payload& payload) const;
    bool read_handle(PyObject* handle, HandleView& view) const;
    bool read_routing(PyObject* const* args, int64_t num_tokens, Routing& routing) const;
    RowKind& kind_of(const Payload& payload, PyObject* topk_idx, int64_t num_topk, int64_t num_experts);
    kernels::DispatchArgs dispatch_args(const RowKind& kind, const Payload& payload) const;
    bool may_lend(dev::Stream stream);
    bool adds_sums(const HandleView& handle, int64_t num_sms) const;
    py::tuple outputs(const RowKind& kind, int64_t num_rows, dev::Stream stream);
    py::tuple received(const RowKind& kind, std::unique_ptr<LentRows> reserved, int64_t num_rows, dev::Stream stream);
    std::unique_ptr<LentRows> reserve(const RowKind& kind, int64_t num_tokens, dev::Stream stream);
    int cuda_index() const { return caller_.is_cuda() ? caller_.device().id : -1; }
    py::object event() const { return result(PyObject_CallNoArgs(event_class_.ptr())); }

    runtime::Buffer& buffer_;
    py::object runtime_, empty_, lender_, find_kind_, event_class_, unused_;
    CallerStream caller_;
    Maker maker_;
    py::object int32_, float32_, bfloat16_;
    int64_t num_ranks_, least_sums_sms_, least_sums_tokens_, most_sums_tokens_;
    std::vector<int64_t> spare_shares_;
    int64_t least_spare_rows_;
    std::optional<dev::Stream> noted_;  // a stream where lent memory may be used
    std::vector<std::unique_ptr<RowKind>> kinds_;
};

}  // namespace deep_ep::bindings
