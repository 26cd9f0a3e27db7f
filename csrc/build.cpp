// What this build is: the one place of the bindings that reads what the build variables have set (cmake/EpOptions.cmake,
// cmake/EpArchitectures.cmake). Apart from the rest, so that a test can build it alone and look at the module.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace deep_ep {
namespace {

constexpr bool kHasCuda = EP_WITH_CUDA != 0;
constexpr bool kHasSm90Features = kHasCuda && EP_DISABLE_SM90_FEATURES == 0;
constexpr bool kHasCacheHints = kHasCuda && EP_DISABLE_AGGRESSIVE_PTX == 0;
constexpr int kTopkIdxBits = EP_TOPK_IDX_BITS;

py::dict get_build() {
    py::dict facts;
    facts["cuda"] = kHasCuda;
    facts["architectures"] = EP_ARCHITECTURES;
    facts["sm90_features"] = kHasSm90Features;
    facts["cache_hints"] = kHasCacheHints;
    facts["topk_idx_bits"] = kTopkIdxBits;
    return facts;
}

// Callers import these from here, but they are made of torch: deep_ep supplies them when asked.
py::object forwarded(const std::string& name) {
    if (name == "EventHandle") return py::module_::import("deep_ep.utils").attr("EventHandle");
    if (name == "topk_idx_t") return py::module_::import("torch").attr(kTopkIdxBits == 32 ? "int32" : "int64");
    throw py::attribute_error("module 'deep_ep_cpp' has no attribute '" + name + "'");
}

}  // namespace

void bind_build(py::module_& m);

void bind_build(py::module_& m) {
    m.def("get_build", &get_build);
    m.def("is_cuda_built", [] { return kHasCuda; });
    m.def("is_sm90_compiled", [] { return kHasSm90Features; });
    m.def("topk_idx_bits", [] { return kTopkIdxBits; });
    m.def("__getattr__", &forwarded);
}

#ifdef EP_BUILD_ALONE
PYBIND11_MODULE(deep_ep_build, m) { bind_build(m); }
#endif

}  // namespace deep_ep
