#include "bindings/low_latency_calls.h"

#include <structmember.h>

#include <algorithm>

#include "bindings/errors.h"

namespace deep_ep::bindings {

namespace {

constexpr Py_ssize_t kNumHandleFields = 5;

// Of a plan: what is not the same in every call is zero.
template <class Args> Args unfinished(const py::object& record) {
    const Args* args = read_unfinished<Args>(record.ptr());
    if (args == nullptr) throw py::error_already_set();
    return *args;
}

bool refers_to(PyObject* weak_reference, PyObject* object) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    PyWeakref_GetRef(weak_reference, &found);
    Py_XDECREF(found);
    return found == object;
#else
    return PyWeakref_GetObject(weak_reference) == object;
#endif
}

std::array<int64_t, 4> shape_of(const kernels::LowLatencyArgs& args) {
    return {args.num_max_tokens, args.num_topk, args.num_experts, args.hidden};
}

}  // namespace

LowLatencyCalls::LowLatencyCalls(const py::object& session, const py::dict& options)
    : native_(session.attr("runtime").cast<runtime::Buffer&>().low_latency()),
      buffer_(session.attr("runtime").cast<runtime::Buffer&>()),
      weak_session_(py::weakref(session)),
      runtime_(session.attr("runtime")),
      event_class_(options["event_class"]),
      reinterpret_(options["reinterpret"]),
      caller_(session.attr("streams")),
      maker_(session.attr("empty")),
      int32_(options["int32"]),
      int64_(options["int64"]),
      bfloat16_(options["bfloat16"]),
      num_ranks_(session.attr("num_ranks").cast<int64_t>()) {}

void LowLatencyCalls::add(const py::object& plan) {
    const auto number = [&](const char* name) { return plan.attr(name).cast<int64_t>(); };
    const auto args = unfinished<kernels::LowLatencyDispatchArgs>(plan.attr("dispatch_args"));
    const std::array<bool, 3> form{args.is_fp8, args.rounds_scales, args.packs_scales};
    const auto shape = shape_of(args);
    if (find(shape, &form) != nullptr) return;
    const bool has_scales = plan.attr("has_scales").cast<bool>();
    kinds_.push_back(std::make_unique<LowLatencyKind>(LowLatencyKind{
        .shape = shape,
        .form = form,
        .num_local = number("num_local"),
        .num_rows = num_ranks_ * args.num_max_tokens,
        .num_words = number("num_words"),
        .entries_at = number("entries_at"),
        .number_at = number("number_at"),
        .recv_dtype = plan.attr("recv_dtype"),
        .scale_dtype = has_scales ? py::object(plan.attr("scale_dtype")) : py::object(py::none()),
        .scale_shape = plan.attr("scale_shape"),
        .scale_strides = plan.attr("scale_strides"),
        .src_info = plan.attr("src_info_view"),
        .recv_count = plan.attr("recv_count_view"),
        .tail = plan.attr("handle_tail"),
        .dispatch_args = args,
        .combine_args = unfinished<kernels::LowLatencyCombineArgs>(plan.attr("combine_args")),
    }));
}

void LowLatencyCalls::add_handle(const py::object& src_info, const py::object& plan) {
    const LowLatencyKind* kind =
        find(shape_of(unfinished<kernels::LowLatencyDispatchArgs>(plan.attr("dispatch_args"))), nullptr);
    if (kind != nullptr) know(src_info, *kind);
}

void LowLatencyCalls::know(const py::object& src_info, const LowLatencyKind& kind) {
    for (const auto& [reference, known] : handles_)
        if (known == &kind && refers_to(reference.ptr(), src_info.ptr())) return;
    handles_.at(next_handle_++ % handles_.size()) = {result(PyWeakref_NewRef(src_info.ptr(), nullptr)), &kind};
}

// `form` null: of any.
const LowLatencyKind* LowLatencyCalls::find(const std::array<int64_t, 4>& shape,
                                            const std::array<bool, 3>* form) const {
    for (const auto& kind : kinds_)
        if (kind->shape == shape && (form == nullptr || kind->form == *form)) return kind.get();
    return nullptr;
}

// Of a handle that a call made here returned, whose src_info is known by its identity: what lies behind it in its memory says
// nobody else.
const LowLatencyKind* LowLatencyCalls::find_of_handle(PyObject* handle, int64_t num_topk) {
    if (!PyTuple_CheckExact(handle) || PyTuple_GET_SIZE(handle) != kNumHandleFields) return nullptr;
    PyObject* src_info = PyTuple_GET_ITEM(handle, 0);
    for (const auto& [reference, kind] : handles_) {
        if (!reference || !refers_to(reference.ptr(), src_info) || kind->shape[1] != num_topk) continue;
        for (Py_ssize_t i = 0; i < 3; ++i)
            if (PyObject_RichCompareBool(PyTuple_GET_ITEM(handle, 2 + i), PyTuple_GET_ITEM(kind->tail.ptr(), i),
                                         Py_EQ) != 1)
                return nullptr;
        return kind;
    }
    return nullptr;
}

bool LowLatencyCalls::read_stats(PyObject* value, const dlpack::DataType& dtype, int64_t size, void** address) const {
    *address = nullptr;
    if (value == Py_None) return true;
    TensorView view;
    if (!view.read(value, caller_.device()) || !view.is(dtype) || !view.is_vector() || view.extent(0) != size)
        return false;
    *address = view.address<void>();
    return true;
}

py::object LowLatencyCalls::view_of(const py::object& words, const py::tuple& view) const {
    const Owned args(PyTuple_Pack(4, words.ptr(), view[0].ptr(), view[1].ptr(), view[2].ptr()));
    return result(PyObject_Call(reinterpret_.ptr(), args.get(), nullptr));
}

py::object LowLatencyCalls::take_number() {
    if (free_numbers_.empty()) return maker_.make(int64_, 1);
    py::object number = std::move(free_numbers_.back());
    free_numbers_.pop_back();
    return number;
}

void LowLatencyCalls::give_back(py::object number, dev::Stream stream) {
    if (!number.is_none() && !caller_.is_captured(stream)) free_numbers_.push_back(std::move(number));
}

// Nothing: Python has something to do in such a call.
std::optional<Phase> LowLatencyCalls::open_phase(bool wants_hook) const {
    const auto phase = caller_.open_phase();
    if (!phase.has_value() || (wants_hook && (!caller_.is_cuda() || caller_.is_captured(phase->stream))))
        return std::nullopt;
    return phase;
}

// Both phases of a call, or with a hook the one that sends. Returns the hook, or None.
template <class Args, class Tensors>
py::object LowLatencyCalls::run(const Args& args, const Phase& phase, bool wants_hook, const Tensors& tensors,
                                const py::object& number, const py::object& owner) {
    uint64_t ticket = wants_hook ? runtime::kSendPhase : runtime::kBothPhases;
    caller_.run(
        phase.stream, phase.leaves_event,
        [&] {
            caller_.begin_phase();
            ticket = launch(args, ticket, phase.stream);
            caller_.close_phase(phase);
        },
        tensors);
    if (!wants_hook) return py::none();
    return make_hook({.session = weak_session_(),
                      .owner = owner,
                      .calls = this,
                      .tensors = tensors(),
                      .number = number,
                      .args = args,
                      .ticket = ticket,
                      .stream = phase.stream});
}

py::object LowLatencyCalls::dispatch(PyObject* const* args, const py::object& owner) {
    buffer_.begin_call();
    const dlpack::Device& device = caller_.device();
    TensorView x, topk_idx;
    const auto num_max_tokens = read_int(args[2], 1, INT32_MAX), num_experts = read_int(args[3], 1, INT32_MAX);
    if (!x.read(args[0], device) || !x.is(dlpack::kBFloat16) || !x.is_rows() ||
        !topk_idx.read_indices(args[1], device) || topk_idx.extent(0) != x.extent(0) || !num_max_tokens ||
        !num_experts || x.extent(0) > *num_max_tokens)
        return py::none();
    for (int i = 6; i < 10; ++i)
        if (!PyBool_Check(args[i])) return py::none();
    const std::array<bool, 3> form{args[6] == Py_True, args[7] == Py_True, args[8] == Py_True};
    const bool wants_hook = args[9] == Py_True;
    const LowLatencyKind* kind = find({*num_max_tokens, topk_idx.extent(1), *num_experts, x.extent(1)}, &form);
    if (kind == nullptr) return py::none();
    kernels::LowLatencyDispatchArgs call = kind->dispatch_args;
    void *cumulative_stats, *wait_stats;
    if (!read_stats(args[4], dlpack::kInt32, kind->num_local, &cumulative_stats) ||
        !read_stats(args[5], dlpack::kInt64, num_ranks_, &wait_stats))
        return py::none();
    const auto phase = open_phase(wants_hook);
    if (!phase.has_value()) return py::none();

    const auto hidden = static_cast<int64_t>(call.hidden);
    const py::object recv_x = maker_.make(kind->recv_dtype, kind->num_local, kind->num_rows, hidden);
    const py::object scales = kind->scale_dtype.is_none()
                                  ? py::object(py::none())
                                  : maker_.make_strided(kind->scale_dtype, kind->scale_shape, kind->scale_strides);
    const py::object words = maker_.make(int32_, kind->num_words);
    const py::object src_info = view_of(words, kind->src_info), recv_count = view_of(words, kind->recv_count);
    const py::object layout_range = maker_.make(int64_, kind->num_local, num_ranks_);

    const auto first_word = address_at<uint8_t>(words);
    call.wait_stats = static_cast<int64_t*>(wait_stats);
    call.number = reinterpret_cast<uint64_t*>(first_word + kind->number_at);
    call.x = x.address<const uint8_t>();
    call.topk_idx = topk_idx.address<const void>();
    call.idx_bytes = static_cast<int>(topk_idx.item_bytes());
    call.num_tokens = static_cast<int>(x.extent(0));
    call.recv_x = address_at<uint8_t>(recv_x);
    call.recv_scales = address_at<uint32_t>(scales);
    call.recv_count = address_at<int>(recv_count);
    call.src_info = reinterpret_cast<int*>(first_word);
    call.layout_range = address_at<int64_t>(layout_range);
    call.row_of_entry = reinterpret_cast<int*>(first_word + kind->entries_at);
    call.cumulative_stats = static_cast<int*>(cumulative_stats);

    const auto tensors = [&] {
        return py::make_tuple(borrow(args[0]), borrow(args[1]), recv_x, scales, src_info, layout_range, borrow(args[4]),
                              borrow(args[5]));
    };
    know(src_info, *kind);
    const py::object hook = run(call, *phase, wants_hook, tensors, py::none(), owner);
    py::object payload = recv_x;
    if (!scales.is_none()) payload = py::make_tuple(recv_x, scales);
    const py::tuple handle = py::make_tuple(src_info, layout_range, kind->tail[0], kind->tail[1], kind->tail[2]);
    return py::make_tuple(payload, recv_count, handle, event(), hook);
}

py::object LowLatencyCalls::combine(PyObject* const* args, const py::object& owner) {
    buffer_.begin_call();
    const dlpack::Device& device = caller_.device();
    TensorView x, topk_idx, topk_weights, out;
    if (!PyBool_Check(args[6]) || !topk_idx.read_indices(args[1], device)) return py::none();
    const bool wants_hook = args[6] == Py_True, has_out = args[4] != Py_None;
    const int64_t num_tokens = topk_idx.extent(0), num_topk = topk_idx.extent(1);
    const LowLatencyKind* kind = find_of_handle(args[3], num_topk);
    if (kind == nullptr || num_tokens > kind->shape[0]) return py::none();
    const int64_t hidden = kind->shape[3];
    if (!topk_weights.read(args[2], device) || !topk_weights.is(dlpack::kFloat32) || !topk_weights.is_matrix() ||
        topk_weights.extent(0) != num_tokens || topk_weights.extent(1) != num_topk || !x.read(args[0], device) ||
        !x.is(dlpack::kBFloat16) || x.num_dims() != 3 || !x.is_contiguous() || x.extent(0) != kind->num_local ||
        x.extent(1) != kind->num_rows || x.extent(2) != hidden || !x.is_aligned())
        return py::none();
    if (has_out && (!out.read(args[4], device) || !out.is(dlpack::kBFloat16) || !out.is_matrix() ||
                    out.extent(0) != num_tokens || out.extent(1) != hidden || !out.is_aligned() || out.overlaps(x)))
        return py::none();
    kernels::LowLatencyCombineArgs call = kind->combine_args;
    void* wait_stats;
    if (!read_stats(args[5], dlpack::kInt64, num_ranks_, &wait_stats)) return py::none();
    const auto phase = open_phase(wants_hook);
    if (!phase.has_value()) return py::none();

    const py::object src_info = borrow(PyTuple_GET_ITEM(args[3], 0));
    const py::object combined = has_out ? borrow(args[4]) : maker_.make(bfloat16_, num_tokens, hidden);
    // Several combines may be open with one handle, so that theirs cannot lie behind src_info.
    const py::object number = wants_hook ? take_number() : py::object(py::none());
    call.wait_stats = static_cast<int64_t*>(wait_stats);
    call.number = address_at<uint64_t>(number);
    call.uses_logfmt = false;
    call.x = x.address<const uint8_t>();
    call.topk_idx = topk_idx.address<const void>();
    call.idx_bytes = static_cast<int>(topk_idx.item_bytes());
    call.topk_weights = topk_weights.address<const float>();
    call.num_tokens = static_cast<int>(num_tokens);
    call.row_of_entry = reinterpret_cast<const int*>(address_at<uint8_t>(src_info) + kind->entries_at);
    call.combined_x = address_at<uint8_t>(combined);
    const auto tensors = [&] {
        return py::make_tuple(borrow(args[0]), borrow(args[1]), borrow(args[2]), src_info, combined, borrow(args[5]),
                              number);
    };
    const py::object hook = run(call, *phase, wants_hook, tensors, number, owner);
    return py::make_tuple(combined, event(), hook);
}

// -- Hooks -------------------------------------------------------------------------------------------------------------

void LowLatencyCalls::receive(LowLatencyHook& hook) {
    // The tensors may go when it is launched.
    const std::unique_ptr<LowLatencyHook::State> state(std::exchange(hook.state, nullptr));
    if (state == nullptr) return;
    try {
        const dev::Stream stream = state->stream;
        std::optional<Phase> phase = caller_.open_phase(stream);
        if (phase.has_value())
            caller_.begin_phase();
        else
            phase =
                Phase{stream, caller_.streams().attr("enter_phase")(reinterpret_cast<uintptr_t>(stream)).cast<bool>()};
        std::visit([&](const auto& args) { launch(args, state->ticket, stream); }, state->args);
        caller_.close_phase(*phase);
    } catch (...) {
        set_python_error(std::current_exception());
        const py::error_already_set error;
        state->session.attr("abandon_call")(
            state->is_combine() ? "the hook of low_latency_combine" : "the hook of low_latency_dispatch", error.value(),
            state->ticket);
        throw error;
    }
    give_back(std::move(state->number), state->stream);
}

// Nobody can call it any more.
void LowLatencyCalls::drop(LowLatencyHook& hook) noexcept {
    const std::unique_ptr<LowLatencyHook::State> state(std::exchange(hook.state, nullptr));
    if (state == nullptr || Py_IsInitialized() == 0) return;
    try {
        state->session.attr("abandon_hook")(state->is_combine() ? "low_latency_combine" : "low_latency_dispatch",
                                            state->ticket);
    } catch (py::error_already_set& error) {
        error.discard_as_unraisable("the hook of a low-latency call");
    } catch (...) {  // no memory for the texts: the peers wait for their deadline
    }
}

namespace {

PyTypeObject* hook_type = nullptr;

void destroy_hook(PyObject* self) {
    auto* hook = reinterpret_cast<LowLatencyHook*>(self);
    const py::object owner = hook->state == nullptr ? py::object() : hook->state->owner;
    if (hook->state != nullptr) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        hook->state->calls->drop(*hook);
        PyErr_Restore(type, value, traceback);
    }
    if (hook->weak_references != nullptr) PyObject_ClearWeakRefs(self);
    PyTypeObject* const type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject* call_hook(PyObject* self, PyObject* args, PyObject* names) {
    if (PyTuple_GET_SIZE(args) > 0 || names != nullptr) {
        PyErr_SetString(PyExc_TypeError, "a hook takes no arguments");
        return nullptr;
    }
    auto* hook = reinterpret_cast<LowLatencyHook*>(self);
    if (hook->state == nullptr) Py_RETURN_NONE;
    const py::object owner = hook->state->owner;
    return guarded([&] {
        hook->state->calls->receive(*hook);
        return py::object(py::none());
    });
}

}  // namespace

py::object make_hook(LowLatencyHook::State state) {
    auto* hook = reinterpret_cast<LowLatencyHook*>(hook_type->tp_alloc(hook_type, 0));
    if (hook == nullptr) throw py::error_already_set();
    hook->state = new LowLatencyHook::State(std::move(state));
    return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(hook));
}

bool add_low_latency_hook(PyObject* module) {
    static PyMemberDef members[] = {
        {"__weaklistoffset__", T_PYSSIZET, offsetof(LowLatencyHook, weak_references), READONLY, nullptr},
        {nullptr, 0, 0, 0, nullptr}};
    PyType_Slot slots[] = {{Py_tp_members, members},
                           {Py_tp_dealloc, reinterpret_cast<void*>(&destroy_hook)},
                           {Py_tp_call, reinterpret_cast<void*>(&call_hook)},
                           {0, nullptr}};
    PyType_Spec spec{"deep_ep_cpp.Hook", sizeof(LowLatencyHook), 0, Py_TPFLAGS_DEFAULT, slots};
    hook_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    return hook_type != nullptr && PyModule_AddObject(module, "Hook", reinterpret_cast<PyObject*>(hook_type)) == 0;
}

}  // namespace deep_ep::bindings
