"""Dispatch and combine for Mixture-of-Experts models: `Buffer` moves tokens between the ranks of an expert group."""

import sys as _sys
from pathlib import Path as _Path

try:
    import torch as _torch  # noqa: F401

    import deep_ep_cpp as _deep_ep_cpp  # noqa: F401 - here, for the sentence below
except ImportError as _error:
    raise ImportError("deep_ep: {} does not load ({}). To see what is wrong, run: python {}".format(
        "torch" if _sys.modules.get("torch") is None else "the native extension deep_ep_cpp", _error,
        _Path(__file__).with_name("doctor.py"))) from _error

from deep_ep._env import __version__, features, supports
from deep_ep.buffer import Buffer
from deep_ep.utils import EventHandle, EventOverlap
from deep_ep_cpp import (
    Config,
    CudaError,
    Error,
    InternalError,
    InvalidArgument,
    TimeoutError,  # noqa: A004
    TransportError,
    topk_idx_t,
)

__all__ = [
    "Buffer", "Config", "CudaError", "Error", "EventHandle", "EventOverlap", "InternalError", "InvalidArgument",
    "TimeoutError", "TransportError", "__version__", "features", "supports", "topk_idx_t"
]
