"""Tensors over memory that torch did not allocate."""

import ctypes
from typing import Any

import torch


class _CudaBytes:
    """Device memory, as numba's array interface describes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes, ),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2
        }


def view_memory(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """`num_bytes` from `address` on as uint8; whoever owns the memory must outlive the tensor."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        return torch.as_tensor(_CudaBytes(address, num_bytes), device=device)
    memory: Any = (ctypes.c_uint8 * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8)
