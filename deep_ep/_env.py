"""What the package itself reads from the environment. DEEP_EP_* variables are read by csrc/core/env.cc."""

import os
from pathlib import Path
from typing import Optional

import deep_ep_cpp


def nvshmem_qp_depth() -> int:
    """NVSHMEM_QP_DEPTH: entries of a queue pair; low-latency users set it before they build a Buffer."""
    return int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))


def visible_devices() -> list[str]:
    """CUDA_VISIBLE_DEVICES: the physical GPUs behind torch's device numbers; empty when all are visible."""
    return [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def lend_bytes() -> int:
    """DEEP_EP_LEND_BYTES: what a Buffer lends when its caller does not say."""
    return int(deep_ep_cpp.get_environment()["lend_bytes"])


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


def prepare_threaded_ranks() -> None:
    """Before CUDA starts, where ranks are threads that share a GPU.

    Every stream gets a hardware queue, or one rank's kernel waits behind another's that waits for it; and no kernel is
    loaded late, which waits for the device.
    """
    os.environ.update({"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"})


def speed_settings() -> dict[str, str]:
    """What is set that may change a measured time, for reports: of this package, and of NCCL."""
    harmless = ("DEEP_EP_DEVICE", "DEEP_EP_TIMEOUT_SECS")
    return {
        name: value
        for name, value in sorted(os.environ.items()) if name.startswith(("DEEP_EP_", "NCCL_")) and name not in harmless
    }
