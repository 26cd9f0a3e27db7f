"""The public surface is what callers were written against (pitfall 41): names, order, defaults."""

import inspect
from typing import Any

import pytest
import torch

import deep_ep
import deep_ep.buffer
import deep_ep.utils
import deep_ep_cpp
from deep_ep import Buffer

REQUIRED = inspect.Parameter.empty
STREAM_OPTIONS = {"previous_event": None, "async_finish": False, "allocate_on_comm_stream": False}
DISPATCH = {
    "x": REQUIRED, "handle": None, "num_tokens_per_rank": None, "num_tokens_per_rdma_rank": None,
    "is_token_in_rank": None, "num_tokens_per_expert": None, "topk_idx": None, "topk_weights": None,
    "expert_alignment": 1, "num_worst_tokens": 0, "config": None, **STREAM_OPTIONS
}  # yapf: disable
COMBINE = {"x": REQUIRED, "handle": REQUIRED, "topk_weights": None, "bias": None, "config": None, **STREAM_OPTIONS}
CONTRACT: dict[str, dict[str, Any]] = {
    "__init__": {
        "group": REQUIRED, "num_nvl_bytes": 0, "num_rdma_bytes": 0, "low_latency_mode": False, "num_qps_per_rank": 24,
        "allow_nvlink_for_low_latency_mode": True, "allow_mnnvl": False, "use_fabric": False,
        "explicitly_destroy": False, "enable_shrink": False, "comm": None,
        "timeout_s": None, "num_lend_bytes": None, "on_failure": None,  # ours
    },
    "lend": {"shape": REQUIRED, "dtype": torch.bfloat16},  # ours
    "destroy": {},
    "is_sm90_compiled": {},
    "set_num_sms": {"new_num_sms": REQUIRED},
    "capture": {},
    "get_low_latency_rdma_size_hint": {
        "num_max_dispatch_tokens_per_rank": REQUIRED, "hidden": REQUIRED, "num_ranks": REQUIRED,
        "num_experts": REQUIRED
    },
    "get_comm_stream": {},
    "get_local_buffer_tensor": {"dtype": REQUIRED, "size": None, "offset": 0, "use_rdma_buffer": False},
    "get_dispatch_config": {"num_ranks": REQUIRED},
    "get_combine_config": {"num_ranks": REQUIRED},
    "get_dispatch_layout": {"topk_idx": REQUIRED, "num_experts": REQUIRED, **STREAM_OPTIONS},
    "dispatch": DISPATCH,
    "combine": COMBINE,
    "internode_dispatch": DISPATCH,
    "internode_combine": COMBINE,
    "clean_low_latency_buffer": {
        "num_max_dispatch_tokens_per_rank": REQUIRED, "hidden": REQUIRED, "num_experts": REQUIRED
    },
    "low_latency_dispatch": {
        "x": REQUIRED, "topk_idx": REQUIRED, "num_max_dispatch_tokens_per_rank": REQUIRED, "num_experts": REQUIRED,
        "cumulative_local_expert_recv_stats": None, "dispatch_wait_recv_cost_stats": None, "use_fp8": True,
        "round_scale": False, "use_ue8m0": False, "async_finish": False, "return_recv_hook": False
    },
    "low_latency_combine": {
        "x": REQUIRED, "topk_idx": REQUIRED, "topk_weights": REQUIRED, "handle": REQUIRED, "use_logfmt": False,
        "zero_copy": False, "async_finish": False, "return_recv_hook": False, "out": None,
        "combine_wait_recv_cost_stats": None
    },
    "low_latency_update_mask_buffer": {"rank_to_mask": REQUIRED, "mask": False},
    "low_latency_query_mask_buffer": {"mask_status": REQUIRED},
    "low_latency_clean_mask_buffer": {},
    "get_next_low_latency_combine_buffer": {"handle": REQUIRED},
}  # yapf: disable
STATIC = {
    "is_sm90_compiled", "set_num_sms", "capture", "get_low_latency_rdma_size_hint", "get_dispatch_config",
    "get_combine_config"
}


@pytest.mark.parametrize("name", CONTRACT)
def test_method(name: str) -> None:
    parameters = dict(inspect.signature(getattr(Buffer, name)).parameters)
    if name not in STATIC:
        assert parameters.pop("self")
    got = {key: parameter.default for key, parameter in parameters.items()}
    assert list(got.items()) == list(CONTRACT[name].items())
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())


@pytest.mark.parametrize("name", STATIC)
def test_static_methods_work_on_class_and_instance(name: str) -> None:
    assert isinstance(inspect.getattr_static(Buffer, name), staticmethod)


def test_names_that_callers_import() -> None:
    for module, names in {
            deep_ep: ("Buffer", "Config", "EventOverlap", "EventHandle", "topk_idx_t", "Error", "TimeoutError"),
            deep_ep.buffer: ("Buffer", "Config", "EventHandle", "EventOverlap"),
            deep_ep.utils: ("EventHandle", "EventOverlap", "check_nvlink_connections"),
            deep_ep_cpp: ("Config", "EventHandle", "topk_idx_t", "is_sm90_compiled"),
    }.items():
        for name in names:
            assert hasattr(module, name), (module.__name__, name)
    assert deep_ep_cpp.EventHandle is deep_ep.utils.EventHandle


def test_names_that_callers_take_for_features() -> None:
    """Their presence is a promise: vLLM, SGLang and Megatron switch code paths on it."""
    assert not hasattr(deep_ep, "ElasticBuffer")
    assert not hasattr(deep_ep, "HybridEPBuffer")


def test_errors_are_runtime_errors() -> None:
    for error in (deep_ep.TimeoutError, deep_ep.CudaError, deep_ep.TransportError, deep_ep.InvalidArgument,
                  deep_ep.InternalError):
        assert issubclass(error, deep_ep.Error)
    assert issubclass(deep_ep.Error, RuntimeError)
    assert issubclass(deep_ep.InvalidArgument, ValueError)
    assert not issubclass(deep_ep.InternalError, ValueError)
