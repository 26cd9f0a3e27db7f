// deep_ep_bench_cpp: what the benchmarks run beside the library. `make build` makes it; the wheel leaves it out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bench/held_sms.h"
#include "bench/links.h"
#include "bindings/device.h"

namespace py = pybind11;

namespace deep_ep::bench {
namespace {

using release_gil = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(deep_ep_bench_cpp, m) {
    py::class_<Links>(m, "Links", "The links between the ranks of a node.")
        .def(py::init([](int device, int rank, int num_ranks, int64_t bytes_per_peer, bool is_heap_on_host) {
                 return std::make_unique<Links>(make_device(device), rank, num_ranks, bytes_per_peer,
                                                is_heap_on_host ? dev::Placement::kHost : dev::Placement::kDevice);
             }),
             py::arg("device"), py::arg("rank"), py::arg("num_ranks"), py::arg("bytes_per_peer"),
             py::arg("is_heap_on_host") = false, release_gil())
        .def("export_handle", [](const Links& links) { return py::bytes(links.export_handle()); })
        .def("connect", &Links::connect, py::arg("handles"), release_gil())
        .def(
            "load", [](Links& links, uintptr_t source) { links.load(pointer<const void>(source)); }, py::arg("source"),
            release_gil())
        .def(
            "push", [](Links& links, int num_sms, uintptr_t stream) { links.push(num_sms, pointer<void>(stream)); },
            py::arg("num_sms"), py::arg("stream"), release_gil())
        .def("synchronize", &Links::synchronize, release_gil())
        .def("release", &Links::release, py::arg("timeout_s"), release_gil());
    py::class_<HeldSms>(m, "HeldSms", "SMs that somebody else has.")
        .def(py::init([](int device) { return std::make_unique<HeldSms>(make_device(device)); }), py::arg("device"))
        .def(
            "hold",
            [](HeldSms& held, int num_sms, double timeout_s, uintptr_t stream) {
                held.hold(num_sms, timeout_s, pointer<void>(stream));
            },
            py::arg("num_sms"), py::arg("timeout_s"), py::arg("stream"), release_gil())
        .def_property_readonly("num_held", &HeldSms::num_held)
        .def_property_readonly("num_sms", &HeldSms::num_sms)
        .def("release", &HeldSms::release)
        .def("synchronize", &HeldSms::synchronize, release_gil());
}

}  // namespace deep_ep::bench
