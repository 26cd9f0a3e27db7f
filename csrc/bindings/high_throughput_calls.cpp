#include "bindings/high_throughput_calls.h"

namespace deep_ep::bindings {

namespace {

constexpr int64_t kMaxAlignment = 1 << 20;  // of counts that are rounded up in 32 bits
constexpr Py_ssize_t kNumHandleFields = 6;
constexpr size_t kMaxKinds = 64;

}  // namespace

HighThroughputCalls::HighThroughputCalls(const py::object& session, py::dict options)
    : buffer_(session.attr("runtime").cast<runtime::Buffer&>()),
      runtime_(session.attr("runtime")),
      empty_(session.attr("empty")),
      lender_(session.attr("lender")),
      find_kind_(options["find_kind"]),
      event_class_(options["event_class"]),
      unused_(options["unused"]),
      caller_(session.attr("streams")),
      maker_(session.attr("empty")),
      int32_(options["int32"]),
      float32_(options["float32"]),
      bfloat16_(options["bfloat16"]),
      num_ranks_(session.attr("num_ranks").cast<int64_t>()),
      least_sums_sms_(options["least_sums_sms"].cast<int64_t>()),
      least_sums_tokens_(options["least_sums_tokens"].cast<int64_t>()),
      most_sums_tokens_(options["most_sums_tokens"].cast<int64_t>()),
      spare_shares_(options["spare_shares"].cast<std::vector<int64_t>>()),
      least_spare_rows_(options["least_spare_rows"].cast<int64_t>()) {}

// -- What is given -----------------------------------------------------------------------------------------------------

// `x` of dispatch: token rows, or (rows of 1-byte elements, scales). As check_payload of _tensors.py.
bool HighThroughputCalls::read_payload(PyObject* x, Payload& payload) const {
    const bool has_scales = PyTuple_CheckExact(x) != 0;
    if (has_scales && PyTuple_GET_SIZE(x) != 2) return false;
    payload.x = has_scales ? PyTuple_GET_ITEM(x, 0) : x;
    payload.scales = has_scales ? PyTuple_GET_ITEM(x, 1) : nullptr;
    TensorView& rows = payload.rows;
    if (!rows.read(payload.x, caller_.device()) || !rows.is_rows()) return false;
    if (!has_scales) return true;
    TensorView& scales = payload.scale_view;
    return rows.item_bytes() == 1 && scales.read(payload.scales, caller_.device()) && scales.num_dims() == 2 &&
           scales.extent(0) == payload.num_tokens() && (scales.is(dlpack::kFloat32) || scales.is(dlpack::kInt32));
}

bool HighThroughputCalls::read_handle(PyObject* handle, HandleView& view) const {
    if (!PyTuple_CheckExact(handle) || PyTuple_GET_SIZE(handle) != kNumHandleFields) return false;
    const auto read = [&](TensorView& field, Py_ssize_t at) {
        return field.read(PyTuple_GET_ITEM(handle, at), caller_.device()) && field.is(dlpack::kInt32);
    };
    return read(view.matrix, 0) && read(view.src_idx, 3) && read(view.send_head, 5) && view.matrix.is_matrix() &&
           view.matrix.extent(0) == num_ranks_ && view.matrix.extent(1) == num_ranks_ && view.src_idx.is_vector() &&
           view.send_head.is_matrix() && view.send_head.extent(1) == num_ranks_;
}

struct HighThroughputCalls::Routing {
    TensorView per_rank, in_rank, per_expert, topk_idx, topk_weights;
    PyObject* idx;  // null: no top-k
    int64_t num_topk, num_experts;
};

// From args[1] on; as make_routing and _check_routing of _high_throughput.py.
bool HighThroughputCalls::read_routing(PyObject* const* args, int64_t num_tokens, Routing& routing) const {
    const dlpack::Device& device = caller_.device();
    TensorView &per_rank = routing.per_rank, &in_rank = routing.in_rank, &per_expert = routing.per_expert;
    if (!per_rank.read(args[1], device) || !per_rank.is(dlpack::kInt32) || !per_rank.is_vector() ||
        per_rank.extent(0) != num_ranks_ || !in_rank.read(args[2], device) || !in_rank.is(dlpack::kBool) ||
        !in_rank.is_matrix() || in_rank.extent(0) != num_tokens || in_rank.extent(1) != num_ranks_ ||
        !per_expert.read(args[3], device) || !per_expert.is(dlpack::kInt32) || !per_expert.is_vector())
        return false;
    routing.num_experts = per_expert.extent(0);
    routing.num_topk = 0;
    routing.idx = args[4] == Py_None ? nullptr : args[4];
    if (routing.num_experts == 0 || routing.num_experts % num_ranks_ != 0 ||
        routing.num_experts / num_ranks_ > layout::kMaxLocalExperts)
        return false;
    if (routing.idx == nullptr) return args[5] == Py_None;
    TensorView &idx = routing.topk_idx, &weights = routing.topk_weights;
    if (!idx.read_indices(args[4], device) || idx.extent(0) != num_tokens || !weights.read(args[5], device) ||
        !weights.is(dlpack::kFloat32) || !weights.is_matrix() || weights.extent(0) != num_tokens ||
        weights.extent(1) != idx.extent(1))
        return false;
    routing.num_topk = idx.extent(1);
    return true;
}

// -- What is made of it ------------------------------------------------------------------------------------------------

RowKind& HighThroughputCalls::kind_of(const Payload& payload, PyObject* topk_idx, int64_t num_topk,
                                      int64_t num_experts) {
    static PyObject* const dtype = interned("dtype");
    const auto dtype_of = [&](PyObject* tensor) {
        if (tensor == nullptr) return py::object(py::none());
        return py::object(py::handle(tensor).attr(dtype));
    };
    const std::array<int64_t, 4> numbers{payload.rows.extent(1), payload.num_scales(), num_topk, num_experts};
    std::array<py::object, 3> dtypes{dtype_of(payload.x), dtype_of(payload.scales), dtype_of(topk_idx)};
    for (const auto& kind : kinds_)
        if (kind->numbers == numbers && kind->dtypes[0].is(dtypes[0]) && kind->dtypes[1].is(dtypes[1]) &&
            kind->dtypes[2].is(dtypes[2]))
            return *kind;
    const py::object found =
        find_kind_(numbers[0], dtypes[0], numbers[1], dtypes[1], numbers[2], dtypes[2], numbers[3]);
    const py::object form = found.attr("form");
    const int64_t row_bytes = form.attr("can_be_lent").cast<bool>() ? form.attr("row_bytes").cast<int64_t>() : 0;
    const auto* args = read_unfinished<kernels::DispatchArgs>(found.attr("args").ptr());
    if (args == nullptr) throw py::error_already_set();
    if (kinds_.size() == kMaxKinds) kinds_.clear();
    kinds_.push_back(std::make_unique<RowKind>(RowKind{
        numbers, std::move(dtypes), form, form.attr("native").cast<std::shared_ptr<RowForm>>(), row_bytes, *args}));
    return *kinds_.back();
}

kernels::DispatchArgs HighThroughputCalls::dispatch_args(const RowKind& kind, const Payload& payload) const {
    kernels::DispatchArgs args = kind.args;
    args.x = payload.rows.address<uint8_t>();
    args.num_tokens = static_cast<int>(payload.num_tokens());
    if (payload.scales == nullptr) return args;
    args.scales = payload.scale_view.address<uint32_t>();
    args.scale_stride_token = payload.scale_view.stride(0);
    args.scale_stride_scale = payload.scale_view.stride(1);
    return args;
}

// Whether outputs of a call on `stream` may lie in lent memory. Streams are noted by Python.
bool HighThroughputCalls::may_lend(dev::Stream stream) {
    if (lender_.is_none()) return false;
    if (noted_ == stream) return true;
    const py::dict noted = lender_.attr("noted");
    const py::int_ key(reinterpret_cast<uintptr_t>(stream));
    if (!noted.contains(key) || !noted[key].cast<bool>()) return false;
    noted_ = stream;
    return true;
}

bool HighThroughputCalls::adds_sums(const HandleView& handle, int64_t num_sms) const {
    return !lender_.is_none() && num_sms >= least_sums_sms_ && handle.num_tokens() >= least_sums_tokens_ &&
           handle.num_tokens() <= most_sums_tokens_;
}

py::tuple HighThroughputCalls::outputs(const RowKind& kind, int64_t num_rows, dev::Stream stream) {
    if (!lender_.is_none() && num_rows > 0 && kind.lent_row_bytes > 0)
        if (const auto lent = lend(buffer_.high_throughput().loans(), kind.native, num_rows, stream, false))
            return lent->tensors(num_rows, cuda_index());
    return kind.form.attr("empty")(empty_, num_rows);
}

std::unique_ptr<LentRows> HighThroughputCalls::reserve(const RowKind& kind, int64_t num_tokens, dev::Stream stream) {
    if (kind.lent_row_bytes == 0) return nullptr;
    const auto likely = lender_.attr("guess_rows")(num_tokens, num_ranks_).cast<int64_t>();
    const auto num_bytes = static_cast<int64_t>(buffer_.plan().num_lend_bytes);
    for (const int64_t share : spare_shares_) {
        const int64_t num_rows = likely + likely / share + least_spare_rows_;
        if (num_rows * kind.lent_row_bytes > num_bytes) continue;
        if (auto lent = lend(buffer_.high_throughput().loans(), kind.native, num_rows, stream, false)) return lent;
    }
    return nullptr;
}

// -- The calls ---------------------------------------------------------------------------------------------------------

namespace {

// `addresses`: of the Outputs of _high_throughput.py, or the tensors.
void set_outputs(kernels::DispatchArgs& args, const py::tuple& addresses, int64_t num_rows) {
    args.recv_x = address_at<uint8_t>(addresses[0]);
    args.recv_scales = address_at<uint32_t>(addresses[1]);
    args.recv_topk_idx = address_at<void>(addresses[2]);
    args.recv_topk_weights = address_at<float>(addresses[3]);
    args.recv_src_idx = address_at<int>(addresses[4]);
    args.num_recv_rows = static_cast<int>(num_rows);
}

py::object payload_of(const py::tuple& outputs) {
    if (outputs[1].is_none()) return outputs[0];
    return py::make_tuple(outputs[0], outputs[1]);
}

}  // namespace

py::object HighThroughputCalls::combine(PyObject* const* args) {
    buffer_.begin_call();
    HandleView handle;
    TensorView x, weights;
    const dlpack::Device& device = caller_.device();
    const bool has_weights = args[2] != Py_None;
    const auto num_sms = read_int(args[3], 0, INT32_MAX);
    if (!read_handle(args[1], handle) || !x.read(args[0], device) || !x.is(dlpack::kBFloat16) || !x.is_rows() ||
        x.extent(0) != handle.num_rows() || !num_sms.has_value() || adds_sums(handle, *num_sms))
        return py::none();
    if (has_weights && (!weights.read(args[2], device) || !weights.is(dlpack::kFloat32) || !weights.is_matrix() ||
                        weights.extent(0) != handle.num_rows()))
        return py::none();
    const auto stream = caller_.open();
    if (!stream.has_value() || (!lender_.is_none() && !may_lend(*stream))) return py::none();
    const int64_t num_tokens = handle.num_tokens(), hidden = x.extent(1);
    const py::object combined = maker_.make(bfloat16_, num_tokens, hidden);
    const py::object combined_weights =
        has_weights ? maker_.make(float32_, num_tokens, weights.extent(1)) : py::object(py::none());
    kernels::CombineArgs call{};
    call.x = x.address<const uint8_t>();
    call.num_rows = static_cast<int>(handle.num_rows());
    call.hidden = static_cast<int>(hidden);
    call.rank_prefix_matrix = handle.matrix.address<const int>();
    call.send_head = handle.send_head.address<const int>();
    call.src_idx = handle.src_idx.address<const int>();
    call.num_tokens = static_cast<int>(num_tokens);
    call.combined_x = address_at<uint8_t>(combined);
    if (has_weights) {
        call.topk_weights = weights.address<const float>();
        call.num_topk = static_cast<int>(weights.extent(1));
        call.combined_topk_weights = address_at<float>(combined_weights);
    }
    caller_.run(
        *stream, true,
        [&] {
            buffer_.high_throughput().combine(call, static_cast<int>(*num_sms), *stream);
            caller_.close(*stream);
        },
        [&] { return py::make_tuple(borrow(args[0]), borrow(args[1]), borrow(args[2]), combined, combined_weights); });
    return py::make_tuple(combined, combined_weights, event());
}

py::object HighThroughputCalls::dispatch_cached(PyObject* const* args) {
    buffer_.begin_call();
    Payload payload;
    HandleView handle;
    const auto num_sms = read_int(args[2], 0, INT32_MAX);
    if (!read_handle(args[1], handle) || !read_payload(args[0], payload) ||
        payload.num_tokens() != handle.num_tokens() || !num_sms.has_value())
        return py::none();
    const auto stream = caller_.open();
    if (!stream.has_value() || (!lender_.is_none() && !may_lend(*stream))) return py::none();
    const RowKind& kind = kind_of(payload, nullptr, 0, 0);
    const py::tuple made = outputs(kind, handle.num_rows(), *stream);
    kernels::DispatchArgs call = dispatch_args(kind, payload);
    call.rank_prefix_matrix = handle.matrix.address<int>();
    call.send_head = handle.send_head.address<int>();
    call.is_worst_case = true;  // the handle may come from one: fewer rows than it has room for are no error
    set_outputs(call, made, handle.num_rows());
    caller_.run(
        *stream, true,
        [&] {
            buffer_.high_throughput().dispatch(call, static_cast<int>(*num_sms), *stream);
            caller_.close(*stream);
        },
        [&] { return py::make_tuple(borrow(args[0]), borrow(args[1]), made); });
    const py::none none;
    return py::make_tuple(payload_of(made), none, none, none, none, event());
}

py::object HighThroughputCalls::dispatch_fresh(PyObject* const* args) {
    buffer_.begin_call();
    Payload payload;
    Routing routing;
    const auto alignment = read_int(args[6], 1, kMaxAlignment);
    const auto num_sms = read_int(args[7], 0, INT32_MAX);
    if (!read_payload(args[0], payload) || !read_routing(args, payload.num_tokens(), routing) ||
        !alignment.has_value() || !num_sms.has_value())
        return py::none();
    const auto stream = caller_.open();
    if (!stream.has_value() || !may_lend(*stream)) return py::none();
    const int64_t num_tokens = payload.num_tokens();
    const RowKind& kind = kind_of(payload, routing.idx, routing.num_topk, routing.num_experts);
    std::unique_ptr<LentRows> reserved = reserve(kind, num_tokens, *stream);
    if (reserved == nullptr) return py::none();
    const py::object matrix = maker_.make(int32_, num_ranks_, num_ranks_);
    const py::object send_head = maker_.make(int32_, num_tokens, num_ranks_);
    kernels::DispatchArgs call = dispatch_args(kind, payload);
    if (routing.idx != nullptr) {
        call.topk_idx = routing.topk_idx.address<void>();
        call.topk_weights = routing.topk_weights.address<float>();
    }
    call.num_tokens_per_rank = routing.per_rank.address<int>();
    call.num_tokens_per_expert = routing.per_expert.address<int>();
    call.is_token_in_rank = routing.in_rank.address<uint8_t>();
    call.rank_prefix_matrix = address_at<int>(matrix);
    call.send_head = address_at<int>(send_head);
    call.expert_alignment = static_cast<int>(*alignment);
    py::tuple made = reserved->addresses(), counts;
    set_outputs(call, made, reserved->num_rows);
    int64_t num_rows = 0;
    caller_.run(
        *stream, true,
        [&] {
            buffer_.high_throughput().dispatch(call, static_cast<int>(*num_sms), *stream);
            counts = runtime_.attr("wait_counts")();
            num_rows = counts[0].cast<int64_t>();
            made = received(kind, std::move(reserved), num_rows, *stream);
            if (num_rows > call.num_recv_rows) {
                set_outputs(call, made, num_rows);
                call.num_tokens_per_rank = call.num_tokens_per_expert = nullptr;  // they have been exchanged
                call.expert_alignment = 0;
                buffer_.high_throughput().dispatch(call, static_cast<int>(*num_sms), *stream);
            }
            caller_.close(*stream);
        },
        [&] {
            py::list kept(made);
            for (int i = 0; i < 6; ++i) kept.append(borrow(args[i]));
            kept.append(matrix);
            kept.append(send_head);
            return py::tuple(kept);
        });
    lender_.attr("remember_rows")(num_tokens, num_rows);
    const py::tuple handle = py::make_tuple(matrix, unused_, unused_, made[4], borrow(args[2]), send_head);
    return py::make_tuple(payload_of(made), made[2], made[3], counts[1], handle, event());
}

// The outputs of a fresh dispatch: in what was reserved, where the rows have room there.
py::tuple HighThroughputCalls::received(const RowKind& kind, std::unique_ptr<LentRows> reserved, int64_t num_rows,
                                        dev::Stream stream) {
    if (num_rows > 0 && num_rows <= reserved->num_rows) return reserved->tensors(num_rows, cuda_index());
    reserved.reset();  // its memory may serve now
    return outputs(kind, num_rows, stream);
}

}  // namespace deep_ep::bindings
