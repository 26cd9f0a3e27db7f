"""What this build of the package can do, for callers that work with several versions of it."""

import deep_ep_cpp

FEATURES = {
    "high_throughput": "dispatch and combine inside a node",
    "low_latency": "low_latency_dispatch and low_latency_combine inside a node",
    "internode": "the high-throughput mode across nodes",
    "low_latency_internode": "the low-latency mode across nodes",
    "lending": "num_lend_bytes and Buffer.lend: peers write and read tensors in place",
    "worst_case": "num_worst_tokens: a dispatch that the host does not wait for",
    "cuda_graphs": "calls that can be captured",
    "fp8": "low_latency_dispatch with use_fp8, and FP8 rows with scales in dispatch",
    "logfmt": "low_latency_combine with use_logfmt",
    "shrink": "masked ranks: enable_shrink and its calls",
    "on_failure": "Buffer(on_failure=...): failures are told even where only graphs are replayed",
    "call_checks": "DEEP_EP_CHECK_CALLS",
    "cpu": "the CPU device",
    "cuda": "the CUDA device is compiled in (there may be no GPU)",
    "sm90": "code that uses the features of SM90 and newer GPUs is compiled in",
}
_TO_COME = ("internode", "low_latency_internode")


def features() -> dict[str, bool]:
    """Every feature that this version knows by name, and whether this build has it."""
    found = {name: name not in _TO_COME for name in FEATURES}
    found["cuda"] = found["cuda_graphs"] = bool(deep_ep_cpp.is_cuda_built())
    found["sm90"] = bool(deep_ep_cpp.is_sm90_compiled())
    return found


def supports(feature: str) -> bool:
    """Whether this build has a feature. Names that it does not know are not there: False.

    So `getattr(deep_ep, "supports", lambda name: False)("lending")` works with every library of this interface. The
    names are in docs/api.md. It says what the build has; what the machine has is for `python -m deep_ep doctor`.

    Raises TypeError when `feature` is not a str.
    """
    if not isinstance(feature, str):
        raise TypeError(f"feature must be a str, got {type(feature).__name__}")
    return features().get(feature, False)
