// The Python module deep_ep_cpp: bindings only. Addresses and streams cross as integers; deep_ep_cpp.pyi documents them.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/device.h"
#include "bindings/direct_calls.h"
#include "bindings/errors.h"
#include "bindings/lent_rows.h"
#include "bindings/record.h"
#include "bindings/tensor_check.h"
#include "bindings/torch_tensor.h"
#include "core/driver_floor.h"
#include "core/env.h"
#include "core/error.h"
#include "core/interruption.h"
#include "layout/heap.h"
#include "layout/status.h"
#include "rail/nvshmem/loader.h"
#include "rail/nvshmem/versions.h"
#include "runtime/buffer.h"
#include "runtime/config.h"
#include "runtime/failure_report.h"
#include "runtime/plan.h"

namespace py = pybind11;

namespace deep_ep {

void bind_build(py::module_& m);  // build.cpp

namespace {

using runtime::Buffer;
using runtime::HighThroughput;
using runtime::Internode;
using runtime::LowLatency;
using release_gil = py::call_guard<py::gil_scoped_release>;

uintptr_t number(void* handle) { return reinterpret_cast<uintptr_t>(handle); }

CudaVersions cuda_versions() {
#if EP_WITH_CUDA
    return dev::cuda_versions();
#else
    return {};
#endif
}

// Kept here and translated here, not by pybind11's register_exception: that uses std::call_once, which crashes with the C++ runtime
// that is linked into the wheel (tests/test_wheel.py). Never destroyed.
struct Errors {
    explicit Errors(py::module_& m)
        : error(m, "Error", PyExc_RuntimeError),
          cuda_error(m, "CudaError", error.ptr()),
          transport_error(m, "TransportError", error.ptr()),
          timeout_error(m, "TimeoutError", error.ptr()),
          invalid_argument(m, "InvalidArgument", py::make_tuple(error, py::handle(PyExc_ValueError))),
          internal_error(m, "InternalError", error.ptr()) {}

    // Of other classes than ours it throws it again.
    void translate(const std::exception_ptr& thrown) const {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const Error& e) {
            py::set_error(class_of(e), e.what());
        }
    }

private:
    py::handle class_of(const Error& thrown) const {
        if (dynamic_cast<const InvalidArgument*>(&thrown) != nullptr) return invalid_argument;
        if (dynamic_cast<const InternalError*>(&thrown) != nullptr) return internal_error;
        if (dynamic_cast<const TimeoutError*>(&thrown) != nullptr) return timeout_error;
        if (dynamic_cast<const TransportError*>(&thrown) != nullptr) return transport_error;
        if (dynamic_cast<const CudaError*>(&thrown) != nullptr) return cuda_error;
        return error;
    }

    py::exception<Error> error;
    py::exception<CudaError> cuda_error;
    py::exception<TransportError> transport_error;
    py::exception<TimeoutError> timeout_error;
    py::exception<InvalidArgument> invalid_argument;
    py::exception<InternalError> internal_error;
};
const Errors* errors = nullptr;

void bind_errors(py::module_& m) {
    errors = new Errors(m);
    // Local: exceptions of other modules do not pass through the C++ runtime that is linked into this one.
    py::register_local_exception_translator([](std::exception_ptr thrown) { errors->translate(thrown); });
}

void bind_config(py::module_& m) {
    py::class_<Config>(m, "Config",
                       "Sizes for the high-throughput calls: the SM budget, and how many tokens a chunk has.")
        .def(py::init<int, int, int, int, int>(), py::arg("num_sms") = 20,
             py::arg("num_max_nvl_chunked_send_tokens") = 6, py::arg("num_max_nvl_chunked_recv_tokens") = 256,
             py::arg("num_max_rdma_chunked_send_tokens") = 6, py::arg("num_max_rdma_chunked_recv_tokens") = 256)
        .def("get_nvl_buffer_size_hint", &Config::get_nvl_buffer_size_hint, py::arg("hidden_bytes"),
             py::arg("num_ranks"), "Bytes of num_nvl_bytes for rows of `hidden_bytes`, a multiple of 128.")
        .def("get_rdma_buffer_size_hint", &Config::get_rdma_buffer_size_hint, py::arg("hidden_bytes"),
             py::arg("num_ranks"), "Bytes of num_rdma_bytes for the same calls: 0 within a node.")
        .def_readonly("num_sms", &Config::num_sms);
}

const char* stream_kind_name(dev::StreamKind kind) {
    switch (kind) {
        case dev::StreamKind::kPlain: return "plain";
        case dev::StreamKind::kCaptured: return "captured";
        case dev::StreamKind::kAmbiguous: return "ambiguous";
    }
    return "";
}

void bind_device(py::module_& m) {
    using dev::Device;
    using Class = py::class_<Device, std::shared_ptr<Device>>;
    Class(m, "Device")
        .def(py::init(&make_device), py::arg("index"))
        .def_property_readonly("kind", [](Device& d) { return d.kind() == dev::DeviceKind::kCuda ? "cuda" : "cpu"; })
        .def_property_readonly("num_sms", &Device::num_sms)
        .def_property_readonly("unique_id", &Device::unique_id)
        .def("create_stream", [](Device& d) { return number(d.create_stream()); })
        .def(
            "destroy_stream", [](Device& d, uintptr_t s) { d.destroy_stream(pointer<void>(s)); }, release_gil())
        .def(
            "synchronize_stream", [](Device& d, uintptr_t s) { d.synchronize_stream(pointer<void>(s)); }, release_gil())
        .def("stream_kind", [](Device& d, uintptr_t s) { return stream_kind_name(d.stream_kind(pointer<void>(s))); })
        .def("join_streams",
             [](Device& d, uintptr_t waiting, uintptr_t waited_for, uintptr_t e) {
                 d.record_event(pointer<void>(e), pointer<void>(waited_for));
                 d.stream_wait_event(pointer<void>(waiting), pointer<void>(e));
             })
        .def("create_event", [](Device& d) { return number(d.create_event()); })
        .def("destroy_event", [](Device& d, uintptr_t e) { d.destroy_event(pointer<void>(e)); })
        .def("record_event",
             [](Device& d, uintptr_t e, uintptr_t s) { d.record_event(pointer<void>(e), pointer<void>(s)); })
        .def("stream_wait_event",
             [](Device& d, uintptr_t s, uintptr_t e) { d.stream_wait_event(pointer<void>(s), pointer<void>(e)); })
        .def(
            "synchronize_event", [](Device& d, uintptr_t e) { d.synchronize_event(pointer<void>(e)); }, release_gil())
        .def("query_event", [](Device& d, uintptr_t e) { return d.query_event(pointer<void>(e)); });
}

// The arguments of a call, which Python has put into a record.
template <class Args> const Args& read(py::handle record) {
    const Args* args = bindings::read<Args>(record.ptr());
    if (args == nullptr) throw py::error_already_set();
    return *args;
}

// How Python calls an operation of a mode: with its record, then what else it takes, handles as numbers.
template <auto kMode, auto kOperation> struct Call;
template <auto kMode, class Mode, class Result, class Args, class... Rest,
          Result (Mode::*kOperation)(const Args&, Rest...)>
struct Call<kMode, kOperation> {
    template <class T> using Given = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;
    template <class T> static T native(Given<T> given) {
        if constexpr (std::is_pointer_v<T>)
            return reinterpret_cast<T>(given);
        else
            return given;
    }
    static Result call(Buffer& buffer, py::handle args, Given<Rest>... rest) {
        return ((buffer.*kMode)().*kOperation)(read<Args>(args), native<Rest>(rest)...);
    }
};

// For waits, which have released the GIL: lets a signal handler run, Ctrl-C's too, whose exception ends the wait.
void check_signals() {
    const py::gil_scoped_acquire acquired;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::tuple wait_counts(Buffer& buffer) {
    runtime::RecvCounts counts;
    {
        const py::gil_scoped_release released;
        counts = buffer.high_throughput().counts().wait();
    }
    return py::make_tuple(counts.num_tokens, std::move(counts.num_tokens_per_expert), counts.num_rail_tokens);
}

// Bytes of a token on the rail, of a token over NVLink, and of the counts that go ahead to a forwarder.
py::tuple wire_sizes(uint64_t row_bytes, uint64_t num_topk, uint64_t num_scales, uint64_t ranks_per_node,
                     uint64_t num_local_experts, bool is_combine) {
    if (is_combine) {
        const auto slot = layout::SlotLayout::for_combine(row_bytes, num_topk);
        return py::make_tuple(layout::SlotLayout::for_combine(row_bytes, num_topk).bytes,
                              layout::bulk_bytes(slot.topk_weights.end()), 0);
    }
    const auto slot = layout::SlotLayout::for_dispatch(row_bytes, num_topk, num_scales);
    return py::make_tuple(layout::SlotLayout::for_dispatch(row_bytes, num_topk, num_scales, ranks_per_node).bytes,
                          layout::bulk_bytes(slot.scales.end()),
                          layout::CountsBlock::make(ranks_per_node, num_local_experts).bytes);
}

// Of layout::wait_cell, in order: operations, stages, and for both what a rank does there that others wait for.
py::tuple wait_names() {
    std::vector<std::string> operations, stages;
    std::vector<std::vector<std::string>> awaited(layout::kNumOperations);
    for (int stage = 0; stage < layout::kNumStages; ++stage)
        stages.emplace_back(runtime::stage_name(static_cast<layout::Stage>(stage), {}).name);
    for (int i = 0; i < layout::kNumOperations; ++i) {
        const auto operation = static_cast<layout::Operation>(i);
        operations.emplace_back(runtime::operation_name(operation));
        for (int stage = 0; stage < layout::kNumStages; ++stage)
            awaited[static_cast<size_t>(i)].emplace_back(
                runtime::stage_name(static_cast<layout::Stage>(stage), operation).awaited);
    }
    return py::make_tuple(std::move(operations), std::move(stages), std::move(awaited));
}

// The cells as they stand, and how many calls each mode has made.
py::tuple read_waits(Buffer& buffer) {
    runtime::Waits waits;
    {
        const py::gil_scoped_release released;
        waits = buffer.read_waits();
    }
    const auto* bytes = reinterpret_cast<const char*>(waits.cells.data());
    return py::make_tuple(py::bytearray(bytes, waits.cells.size() * sizeof(layout::WaitCell)), waits.num_calls,
                          waits.num_low_latency_calls);
}

void bind_buffer(py::module_& m) {
    bindings::bind_lent_rows(m);
    py::class_<Buffer>(m, "Buffer")
        .def(py::init([](std::shared_ptr<dev::Device> device, int rank, int num_ranks, int64_t num_data_bytes,
                         double timeout_s, double warn_s, int64_t num_low_latency_bytes, bool is_shrinkable,
                         int64_t num_lend_bytes, int ranks_per_node, int64_t num_rail_bytes, std::string rail,
                         std::string rail_reach, double rail_gb_per_s, bool is_heap_on_host) {
                 const Environment& env = environment();
                 return std::make_unique<Buffer>(
                     std::move(device),
                     runtime::BufferOptions{rank,
                                            num_ranks,
                                            num_data_bytes,
                                            num_low_latency_bytes,
                                            timeout_s,
                                            warn_s,
                                            is_shrinkable,
                                            num_lend_bytes,
                                            ranks_per_node,
                                            num_rail_bytes,
                                            {std::move(rail), env.rail_interface, std::move(rail_reach)},
                                            rail_gb_per_s,
                                            is_heap_on_host ? dev::Placement::kHost : dev::Placement::kDevice});
             }),
             py::arg("device"), py::arg("rank"), py::arg("num_ranks"), py::kw_only(), py::arg("num_data_bytes"),
             py::arg("timeout_s"), py::arg("warn_s"), py::arg("num_low_latency_bytes") = 0,
             py::arg("is_shrinkable") = false, py::arg("num_lend_bytes") = 0, py::arg("ranks_per_node") = 0,
             py::arg("num_rail_bytes") = 0, py::arg("rail") = "host", py::arg("rail_reach") = "",
             py::arg("rail_gb_per_s") = 0.0, py::arg("is_heap_on_host") = false)
        .def("export_handle", [](Buffer& b) { return py::bytes(b.export_handle()); })
        .def("connect", &Buffer::connect, py::arg("handles"), release_gil())
        .def("rail_address", [](Buffer& b) { return py::bytes(b.rail_address()); })
        .def("connect_rail", &Buffer::connect_rail, py::arg("addresses"), release_gil())
        .def_property_readonly("num_rail_bytes", [](Buffer& b) { return b.rail_region().num_data_bytes; })
        .def_property_readonly("rail_name", &Buffer::rail_name)
        .def_property_readonly("data_ptr", [](Buffer& b) { return number(b.data()); })
        .def_property_readonly("data_bytes", [](Buffer& b) { return b.plan().num_data_bytes; })
        .def("destroy", &Buffer::destroy, py::arg("timeout_s"), release_gil())
        .def("check", &Buffer::check)
        .def_property_readonly("wait_cells_ptr", [](Buffer& b) { return number(b.wait_cells()); })
        .def("read_waits", &read_waits)
        .def_property_readonly("failure", &Buffer::failure)
        .def("begin_call", &Buffer::begin_call)
        .def("abandon_call", &Buffer::abandon_call, py::arg("text"))
        .def(
            "abandon_hook",
            [](Buffer& b, uint64_t ticket, const std::string& text) { b.low_latency().abandon_hook(ticket, text); },
            py::arg("ticket"), py::arg("text"))
        .def("start_watching", &Buffer::start_watching)
        .def("set_warning_handler", &Buffer::set_warning_handler, py::arg("handler"))
        .def("get_dispatch_layout", &Call<&Buffer::high_throughput, &HighThroughput::get_dispatch_layout>::call,
             py::arg("args"), py::arg("stream"))
        .def("notify_dispatch", &Call<&Buffer::high_throughput, &HighThroughput::notify_dispatch>::call,
             py::arg("args"), py::arg("stream"))
        .def("wait_counts", &wait_counts)
        .def("dispatch", &Call<&Buffer::high_throughput, &HighThroughput::dispatch>::call, py::arg("args"),
             py::arg("num_sms"), py::arg("stream"))
        .def("combine", &Call<&Buffer::high_throughput, &HighThroughput::combine>::call, py::arg("args"),
             py::arg("num_sms"), py::arg("stream"))
        .def("internode_notify", &Call<&Buffer::internode, &Internode::notify>::call, py::arg("args"),
             py::arg("stream"))
        .def("internode_dispatch", &Call<&Buffer::internode, &Internode::dispatch>::call, py::arg("args"),
             py::arg("num_sms"), py::arg("stream"))
        .def("internode_combine", &Call<&Buffer::internode, &Internode::combine>::call, py::arg("args"),
             py::arg("num_sms"), py::arg("stream"))
        .def(
            "lend",
            [](Buffer& b, std::shared_ptr<bindings::RowForm> form, int64_t num_rows, uintptr_t stream,
               bool is_captured) {
                return bindings::lend(b.high_throughput().loans(), std::move(form), num_rows, pointer<void>(stream),
                                      is_captured);
            },
            py::arg("form"), py::arg("num_rows"), py::arg("stream"), py::arg("is_captured"))
        .def("note_stream",
             [](Buffer& b, uintptr_t stream, bool is_ours) {
                 b.high_throughput().loans().note_stream(pointer<void>(stream), is_ours);
             })
        .def_property_readonly("num_lend_bytes", [](Buffer& b) { return b.plan().num_lend_bytes; })
        .def_property_readonly(
            "lend_address", [](Buffer& b) { return reinterpret_cast<uintptr_t>(b.high_throughput().loans().begin()); })
        .def_readonly_static("LEND_PART_OF_DATA", &runtime::kLendPartOfData)
        .def_readonly_static("LATE_NS", &layout::kLateNs)
        .def_readonly_static("SEND_PHASE", &runtime::kSendPhase)
        .def_readonly_static("BOTH_PHASES", &runtime::kBothPhases)
        .def("low_latency_dispatch", &Call<&Buffer::low_latency, &LowLatency::dispatch>::call, py::arg("args"),
             py::arg("ticket"), py::arg("stream"))
        .def("low_latency_combine", &Call<&Buffer::low_latency, &LowLatency::combine>::call, py::arg("args"),
             py::arg("ticket"), py::arg("stream"))
        .def("clean_low_latency",
             [](Buffer& buffer, uintptr_t stream) { buffer.low_latency().clean(pointer<void>(stream)); })
        .def_property_readonly("low_latency_data_ptr", [](Buffer& b) { return number(b.low_latency().data()); })
        .def_property_readonly("masked_ranks_ptr", [](Buffer& b) { return number(b.low_latency().masked_ranks()); });
}

}  // namespace

void bindings::set_python_error(std::exception_ptr thrown) {
    try {
        errors->translate(thrown);
    } catch (py::error_already_set& e) {
        e.restore();
    } catch (const py::builtin_exception& e) {
        e.set_error();
    } catch (const std::exception& e) {
        PyErr_SetString(PyExc_RuntimeError, e.what());
    }
}

PYBIND11_MODULE(deep_ep_cpp, m) {
    m.doc() = "Expert-parallel dispatch and combine: the native half of deep_ep.";
    bind_build(m);
    set_interruption_check(&check_signals);
    bind_errors(m);
    bind_config(m);
    bind_device(m);
    bind_buffer(m);
    if (!bindings::add_record_types(m.ptr()) || !bindings::add_tensor_checks(m.ptr()) ||
        !bindings::add_direct_calls(m.ptr()))
        throw py::error_already_set();
    m.def("get_low_latency_rdma_size_hint", &LowLatency::size_hint, py::arg("num_max_dispatch_tokens_per_rank"),
          py::arg("hidden"), py::arg("num_ranks"), py::arg("num_experts"));
    m.def("has_tensor_exchange", [] { return bindings::exchange_api() != nullptr; });
    m.def("wait_names", &wait_names);
    m.def("wire_sizes", &wire_sizes, py::kw_only(), py::arg("row_bytes"), py::arg("num_topk"), py::arg("num_scales"),
          py::arg("ranks_per_node"), py::arg("num_local_experts"), py::arg("is_combine"));
    m.def("plan_chunk_bytes", &runtime::plan_chunk_bytes, py::arg("engine_bytes"), py::arg("rail_gb_per_s"));
    m.def("cuda_versions", [] {
        const CudaVersions versions = cuda_versions();
        return py::make_tuple(versions.runtime, versions.driver);
    });
    m.def(
        "describe_old_driver",
        [](int runtime, int driver) { return describe_old_driver({.runtime = runtime, .driver = driver}); },
        py::arg("runtime"), py::arg("driver"));
    m.def(
        "part_to_lend",
        [](uint64_t num_data_bytes, uint64_t num_ranks) {
            return layout::DataSplit::make(num_data_bytes, num_ranks).lend_bytes;
        },
        py::arg("num_data_bytes"), py::arg("num_ranks"));
    // Of the engine nvshmem: what it loads needs no GPU.
    m.def(
        "load_nvshmem",
        [](const std::string& host_library, const std::vector<std::string>& engines,
           const std::string& remote_transport, bool is_ibgda_enabled) {
            using namespace rail::nvshmem;
            const World& world = load_world(host_library, engines, transport_of(remote_transport, is_ibgda_enabled));
            return text(world.loaded()) + " (engine built with " + text(world.library().built) + ")";
        },
        py::arg("host_library"), py::arg("engines"), py::arg("remote_transport"), py::arg("is_ibgda_enabled"));
    m.def("get_environment", [] {
        const Environment& env = environment();
        py::dict variables;
        variables["timeout_s"] = env.timeout_s;
        variables["warn_s"] = env.warn_s;
        variables["ranks_per_node"] = env.ranks_per_node;
        variables["device"] = env.device;
        variables["num_sms"] = env.num_sms;
        variables["check_calls"] = env.check_calls;
        variables["cpu_sms"] = env.cpu_sms;
        variables["lend_bytes"] = env.lend_bytes;
        variables["cost_model"] = env.cost_model;
        variables["heap"] = env.heap;
        variables["rail"] = env.rail;
        variables["rail_interface"] = env.rail_interface;
        return variables;
    });
}

}  // namespace deep_ep
