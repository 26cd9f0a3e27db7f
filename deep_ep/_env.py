"""The environment as the Python half sees it; csrc/core/env.cc reads what concerns the native half (DEEP_EP_*)."""

import os


def nvshmem_qp_depth() -> int:
    """NVSHMEM_QP_DEPTH: entries of a queue pair."""
    return int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))


def visible_cuda_devices() -> list[str]:
    """CUDA_VISIBLE_DEVICES; empty when it is not set."""
    return [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def set_device(device: str) -> None:
    """Chooses the device of this process, if it has not looked yet, and of those it starts: 'cpu' or 'cuda'."""
    os.environ["DEEP_EP_DEVICE"] = device
