"""Exact comparisons that say where, and outputs that start with garbage."""

import contextlib
from collections.abc import Iterator
from typing import Optional

import torch


def same_bits(name: str, got: Optional[torch.Tensor], want: Optional[torch.Tensor]) -> None:
    if got is None or want is None:
        assert got is want, f"{name}: got {got}, want {want}"
        return
    got, want = got.detach().cpu(), want.detach().cpu()
    assert got.dtype == want.dtype, f"{name}: got {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{name}: got shape {list(got.shape)}, want {list(want.shape)}"
    if got.numel() == 0:
        return
    differs = bits(got) != bits(want)
    if differs.any():
        rows = differs.reshape(got.shape[0], -1).any(1).nonzero().flatten().tolist()
        raise AssertionError(f"{name}: {len(rows)} of {got.shape[0]} rows differ, {rows[:10]}; the first: got "
                             f"{got[rows[0]].flatten()[:8]}, want {want[rows[0]].flatten()[:8]}")


def same_numbers(name: str, got: Optional[torch.Tensor], want: Optional[torch.Tensor]) -> None:
    """As same_bits, but 0 equals -0, which a sum may turn into each other."""
    if got is not None and want is not None:
        got, want = got + 0.0, want + 0.0
    same_bits(name, got, want)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    # A single row counts as contiguous whatever its strides are, but only a copy can be viewed as bytes.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def equal(name: str, got: object, want: object) -> None:
    assert got == want, f"{name}: got {got!r}, want {want!r}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers: an output that was not written shows.

    torch.use_deterministic_algorithms would import all of torch's compiler first: a second and a half in each process.
    """
    mode_before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode_before)
