"""A Buffer does not depend on the modes of torch under which it was built, or made its first call."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from single_rank import SingleRankComm, single_rank_dispatch
from torch._subclasses.fake_tensor import FakeTensorMode
from utils import device

from deep_ep import Buffer


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "device": lambda: torch.device("meta"),
    "default device": default_device,
    "default dtype": default_dtype,
    "deterministic": deterministic,
    "no grad": torch.no_grad,
}


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Layer(torch.autograd.Function):
    """Dispatch, and combine as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, buffer: Buffer) -> Any:
        received, _, _, _, handle, _ = single_rank_dispatch(buffer, x=x)
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.buffer.combine(grads[0].contiguous(), ctx.saved_tensors)[0], None


def use(buffer: Buffer) -> None:
    """Both modes of the library, with gradients."""
    x = torch.ones((5, 16), dtype=torch.bfloat16, device=device(), requires_grad=True)
    received = Layer.apply(x, buffer)  # type: ignore[no-untyped-call]
    received.sum().backward()
    assert x.grad is not None
    assert (x.grad == 1).all()
    low_latency(buffer)


def low_latency(buffer: Buffer) -> None:
    x = torch.ones((5, 512), dtype=torch.bfloat16, device=device())
    topk_idx = torch.zeros((5, 1), dtype=torch.int64, device=device())
    handle = buffer.low_latency_dispatch(x, topk_idx, 8, 4, use_fp8=False)[2]
    for _ in range(3):  # through all that are lent
        rows = buffer.get_next_low_latency_combine_buffer(handle)
        rows.fill_(2)
        weights = torch.ones((5, 1), device=device())
        combined, _, _ = buffer.low_latency_combine(rows, topk_idx, weights, handle, zero_copy=True)
        assert (combined == 2).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_group", [True, False])
def test_built_under_a_mode(group: Any, mode: str, with_group: bool) -> None:
    with MODES[mode]():
        buffer = Buffer(group if with_group else None,
                        1 << 20,
                        1 << 20,
                        low_latency_mode=True,
                        comm=None if with_group else SingleRankComm())
    with buffer:
        use(buffer)


@pytest.mark.parametrize("mode", ["inference", "deterministic", "no grad"])
def test_first_used_under_a_mode(mode: str) -> None:
    with Buffer(None, 1 << 20, 1 << 20, low_latency_mode=True, comm=SingleRankComm()) as buffer:
        with MODES[mode]():
            single_rank_dispatch(buffer)
            low_latency(buffer)
        use(buffer)


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("use_fp8", [True, False])
def test_real_tensors_under_a_fake_mode(use_fp8: bool, is_direct: bool) -> None:
    """All outputs are real, or kernels would be given addresses of nothing."""
    x = torch.ones((5, 512), dtype=torch.bfloat16, device=device())
    topk_idx = torch.zeros((5, 1), dtype=torch.int64, device=device())
    with Buffer(None, 1 << 20, 1 << 20, low_latency_mode=True, comm=SingleRankComm()) as buffer:
        if not is_direct:
            buffer._session.direct = None
        with FakeTensorMode():
            for _ in range(2):  # the first call of a kind goes by way of Python
                payload, counts, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, 8, 4, use_fp8=use_fp8)
        rows = payload[0].float() * payload[1].repeat_interleave(128, dim=2) if use_fp8 else payload
        assert counts.tolist() == [5, 0, 0, 0]
        assert (rows[0, :5] == 1).all()
        assert handle[0][0, :5].tolist() == list(range(5))
