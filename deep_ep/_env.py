"""What this process has: its environment, this build and what it can do, and the device.

DEEP_EP_* variables are read by csrc/core/env.cc, all others of this package here.
"""

import functools
import os
from pathlib import Path
from typing import Optional

import torch

import deep_ep_cpp
from deep_ep_cpp import Error


def nvshmem_qp_depth() -> int:
    """NVSHMEM_QP_DEPTH: entries of a queue pair; low-latency users set it before they build a Buffer."""
    return int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))


def nvshmem_dir() -> Optional[Path]:
    """NVSHMEM_DIR: where NVSHMEM is installed; None: the PyPI package, if there is one."""
    given = os.environ.get("NVSHMEM_DIR")
    return Path(given) if given else None


def nvshmem_transport() -> str:
    """NVSHMEM_REMOTE_TRANSPORT: what NVSHMEM was told to use between nodes; empty: its default."""
    return os.environ.get("NVSHMEM_REMOTE_TRANSPORT", "").strip().lower()


def is_ibgda_enabled() -> bool:
    """NVSHMEM_IB_ENABLE_IBGDA."""
    return os.environ.get("NVSHMEM_IB_ENABLE_IBGDA", "").strip().lower() in ("1", "true", "yes", "on")


def nvcc_candidates() -> list[str]:
    """CUDACXX, CUDA_HOME, CUDA_PATH, then the usual places, as cmake/EpCuda.cmake looks for the compiler."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    given = os.environ.get("CUDACXX")
    return [*([given] if given else []), *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]


def visible_devices() -> list[str]:
    """CUDA_VISIBLE_DEVICES: the physical GPUs behind torch's device numbers; empty when all are visible."""
    return [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def master_address() -> str:
    """MASTER_ADDR: a host that every rank of torch.distributed reaches; empty where nobody has set it.

    Read when it is needed, as programs set it after they have imported this package.
    """
    return os.environ.get("MASTER_ADDR", "").strip()


def lend_bytes() -> Optional[int]:
    """DEEP_EP_LEND_BYTES: what a Buffer lends when its caller does not say; None: a part of num_nvl_bytes."""
    num_bytes = int(deep_ep_cpp.get_environment()["lend_bytes"])
    return None if num_bytes == deep_ep_cpp.Buffer.LEND_PART_OF_DATA else num_bytes


def cost_model() -> str:
    """DEEP_EP_COST_MODEL: a file, "off", or nothing."""
    return str(deep_ep_cpp.get_environment()["cost_model"])


def cache_folder() -> Optional[Path]:
    """XDG_CACHE_HOME: where this package keeps what it has measured. None: this user has no home folder."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "deep_ep"
    except RuntimeError:  # HOME is not set, and no entry of the user database says it
        return None


def set_device(device: str) -> None:
    """Chooses the device, 'cpu' or 'cuda', of processes that this one starts (its own too, before it has looked)."""
    os.environ["DEEP_EP_DEVICE"] = device


def set_ranks_per_node(ranks_per_node: int) -> None:
    """Makes virtual nodes of the ranks, in processes that this one starts."""
    os.environ["DEEP_EP_RANKS_PER_NODE"] = str(ranks_per_node)


def prepare_threaded_ranks() -> None:
    """Before CUDA starts, where ranks are threads that share a GPU.

    Every stream gets a hardware queue, or one rank's kernel waits behind another's that waits for it; and no kernel is
    loaded late, which waits for the device.
    """
    os.environ.update({"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"})


def speed_settings() -> dict[str, str]:
    """What is set that may change a measured time, for reports: of this package, and of NCCL."""
    harmless = ("DEEP_EP_DEVICE", "DEEP_EP_TIMEOUT_SECS")
    found = {
        name: value
        for name, value in sorted(os.environ.items()) if name.startswith(("DEEP_EP_", "NCCL_")) and name not in harmless
    }
    # Always: reports from before lending was the rule do not have it.
    return {"DEEP_EP_LEND_BYTES": "automatic"} | found


@functools.cache
def device_choice() -> tuple[str, str]:
    """('cuda' or 'cpu', why), decided once per process."""
    requested = deep_ep_cpp.get_environment()["device"]
    if requested == "cpu":
        return "cpu", "DEEP_EP_DEVICE=cpu"
    obstacle = ""
    if not torch.cuda.is_available():
        obstacle = "torch.cuda.is_available() is False"
    elif not deep_ep_cpp.is_cuda_built():
        obstacle = "deep_ep_cpp was built without CUDA"
    if not obstacle:
        return "cuda", "a GPU is available"
    if requested == "cuda":
        raise Error(f"DEEP_EP_DEVICE=cuda, but {obstacle}; run `python -m deep_ep doctor`")
    return "cpu", obstacle


@functools.cache
def native_device(index: int) -> deep_ep_cpp.Device:
    return deep_ep_cpp.Device(index)


__version__ = "1.3.0.dev0"  # the build reads it from here

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
    "wait_counters": "Buffer.get_wait_counters and Buffer.dump_waits: which rank was late, at which stage, how often",
    "call_checks": "DEEP_EP_CHECK_CALLS",
    "cpu": "the CPU device",
    "cuda": "the CUDA device is compiled in (there may be no GPU)",
    "sm90": "code that uses the features of SM90 and newer GPUs is compiled in",
}


def features() -> dict[str, bool]:
    """Every feature that this version knows by name, and whether this build has it."""
    found = dict.fromkeys(FEATURES, True)
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
