"""Tensors live as long as kernels use them, also when the call that launched the kernels fails (pitfall 28)."""

import gc
import weakref
from typing import Any

import pytest
import torch
from single_rank import single_rank_buffer, single_rank_dispatch
from utils import device

import deep_ep


class FailingRuntime:
    """The native Buffer, with one method that fails instead of launching."""

    def __init__(self, runtime: Any, failing: str) -> None:
        self._runtime = runtime
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        if name == self._failing:
            raise deep_ep.Error("planted")
        return getattr(self._runtime, name)


@pytest.mark.skipif(device().type != "cpu", reason="on a GPU torch's allocator keeps the memory, not the tensor")
@pytest.mark.parametrize("failing", ["dispatch", "wait_counts"])
def test_a_call_that_fails_half_way_keeps_its_tensors(failing: str) -> None:
    with single_rank_buffer() as buffer:
        session = buffer._session
        assert session is not None
        runtime, drained = session.runtime, session.streams.drain
        session.runtime = FailingRuntime(runtime, failing)
        weights = torch.ones(400, 2)
        alive = weakref.ref(weights)
        x = torch.ones((400, 16), dtype=torch.bfloat16)
        with pytest.raises(deep_ep.Error, match="planted"):
            single_rank_dispatch(buffer, 400, x=x, topk_weights=weights)
        del weights
        gc.collect()
        held = [event._tensors for event in session.streams._in_flight]
        assert any(tensor is alive() for tensors in held for tensor in tensors), "the notify kernel may still run"
        del held
        session.runtime = runtime
        assert drained(10)
        with pytest.raises(deep_ep.Error, match="planted"):
            single_rank_dispatch(buffer)  # the call was announced, so there is no next one
        session.streams.record(())
        gc.collect()
        assert alive() is None


@pytest.mark.skipif(device().type != "cpu", reason="on a GPU torch's allocator keeps the memory, not the tensor")
def test_an_asynchronous_call_keeps_its_tensors_until_it_is_waited_for() -> None:
    with single_rank_buffer() as buffer:
        weights = torch.ones(5, 2)
        alive = weakref.ref(weights)
        event = single_rank_dispatch(buffer, topk_weights=weights, async_finish=True)[5]
        del weights
        gc.collect()
        assert alive() is not None
        event.current_stream_wait()
        gc.collect()
        assert alive() is None


@pytest.mark.skipif(device().type != "cpu", reason="on a GPU torch's allocator keeps the memory, not the tensor")
def test_a_hook_lets_the_received_rows_go() -> None:
    with single_rank_buffer(0, num_rdma_bytes=1 << 20, low_latency_mode=True) as buffer:
        x, topk_idx = torch.ones((128, 1024), dtype=torch.bfloat16), torch.zeros((128, 1), dtype=torch.int64)
        rows, _, _, _, hook = buffer.low_latency_dispatch(x, topk_idx, 128, 1, use_fp8=False, return_recv_hook=True)
        assert hook is not None
        hook()
        alive = weakref.ref(rows)
        del rows
        gc.collect()
        assert alive() is None
