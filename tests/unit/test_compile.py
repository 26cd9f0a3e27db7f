"""Layers under torch.compile: calls are graph breaks and nothing else, whatever shapes they see."""

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from pending_call import dispatch_arguments
from single_rank import single_rank_buffer
from torch._C._dynamo import eval_frame
from torch._dynamo.testing import CompileCounterWithBackend
from utils import device

from deep_ep import (
    Buffer,
    _high_throughput,
    _low_latency,
    _peers,
    _session,
    _streams,
    _tensors,
    buffer,
    utils,
)

HIDDEN, NUM_EXPERTS, NUM_TOPK, MAX_TOKENS = 64, 4, 2, 64
TOKENS = (1, 5, 7, 9, 13, 2, 3, 11, 17, 23, 33, 64, 12, 31)
MODULES = (_high_throughput, _low_latency, _peers, _session, _streams, _tensors, buffer, utils)
Layer = Callable[[Buffer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def shared() -> Iterator[Buffer]:
    num_bytes = Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, 1, NUM_EXPERTS)
    with single_rank_buffer(num_rdma_bytes=num_bytes, low_latency_mode=True) as made:
        yield made


def synchronous(buffer: Buffer, x: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    topk_weights, topk_idx = logits.softmax(-1).topk(NUM_TOPK)
    counted = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    rows, _, row_weights, counts, handle, _ = buffer.dispatch(x,
                                                              topk_idx=topk_idx,
                                                              topk_weights=topk_weights,
                                                              **dispatch_arguments(counted))
    assert isinstance(rows, torch.Tensor)
    assert handle is not None
    assert row_weights is not None
    assert counts is not None
    answers = (rows @ weight) * row_weights.sum(1, keepdim=True).bfloat16()
    combined, _, _ = buffer.combine(answers, handle)
    return combined.float() + len(counts)


def overlapped(buffer: Buffer, x: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    topk_weights, topk_idx = logits.softmax(-1).topk(NUM_TOPK)
    begin = Buffer.capture()
    counted = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS, previous_event=begin, async_finish=True)
    rows, _, _, _, handle, event = buffer.dispatch(x,
                                                   topk_idx=topk_idx,
                                                   topk_weights=topk_weights,
                                                   previous_event=counted[4],
                                                   async_finish=True,
                                                   **dispatch_arguments(counted))
    event.current_stream_wait()
    assert isinstance(rows, torch.Tensor)
    assert handle is not None
    combined, _, event = buffer.combine(rows @ weight, handle, async_finish=True)
    with event:
        shared = x.float() * 2
    return combined.float() + shared


def with_hooks(buffer: Buffer, x: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    topk_weights, topk_idx = logits.softmax(-1).topk(NUM_TOPK)
    rows, _, handle, _, receive = buffer.low_latency_dispatch(x,
                                                              topk_idx,
                                                              MAX_TOKENS,
                                                              NUM_EXPERTS,
                                                              use_fp8=False,
                                                              return_recv_hook=True)
    assert receive is not None
    assert isinstance(rows, torch.Tensor)
    receive()
    combined, _, receive = buffer.low_latency_combine(rows @ weight,
                                                      topk_idx,
                                                      topk_weights,
                                                      handle,
                                                      return_recv_hook=True)
    assert receive is not None
    receive()
    return combined.float() * 2


def functions_of_the_package() -> Iterator[types.FunctionType]:
    for module in MODULES:
        for value in list(vars(module).values()):
            members = [value, *vars(value).values()] if isinstance(value, type) else [value]
            for member in members:
                function = getattr(member, "__func__", member)
                if isinstance(function, types.FunctionType) and function.__module__.startswith("deep_ep"):
                    yield function


@pytest.mark.parametrize("layer", [synchronous, overlapped, with_hooks])
def test_a_layer_of_changing_shapes_is_compiled_a_few_times(shared: Buffer, layer: Layer) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(layer, backend=counter)
    weight = torch.randn(HIDDEN, HIDDEN, device=device()).bfloat16()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, HIDDEN, device=device()).bfloat16()
            logits = torch.randn(num_tokens, NUM_EXPERTS, device=device())
            torch.testing.assert_close(compiled(shared, x, logits, weight), layer(shared, x, logits, weight))
    assert counter.frame_count > 0, "the layer itself is compiled"
    traced = [f.__qualname__ for f in functions_of_the_package() if eval_frame._debug_get_cache_entry_list(f.__code__)]
    assert not traced


def test_an_opaque_class_of_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which can skip the frame of a function, but not those of what it calls."""

    def skip_code(code: types.CodeType) -> None:
        action = eval_frame._FrameAction
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT))

    older = types.SimpleNamespace(set_eval_frame=eval_frame.set_eval_frame, skip_code=skip_code)
    monkeypatch.setattr(utils, "eval_frame", older)

    def below(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    class Calls:

        def method(self, x: torch.Tensor) -> torch.Tensor:
            """Adds one."""
            return below(x)

        @staticmethod
        def static(x: torch.Tensor) -> torch.Tensor:
            return below(x)

        @classmethod
        def of_class(cls, x: torch.Tensor) -> torch.Tensor:
            return below(x)

    calls = utils.opaque(Calls)()
    assert Calls.method.__doc__ == "Adds one."
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter)
    def layer(x: torch.Tensor) -> torch.Tensor:
        return calls.of_class(calls.static(calls.method(x * 2))) * 3

    assert layer(torch.ones(2)).tolist() == [15.0, 15.0]
    assert counter.frame_count == 2, "before and after"
    assert not eval_frame._debug_get_cache_entry_list(below.__code__)


def test_importing_the_package_does_not_import_the_compiler() -> None:
    """It takes seconds. (What torch itself imports is its own affair.)"""
    program = """if True:
        import sys, torch, torch.distributed
        had = "torch._dynamo" in sys.modules
        import deep_ep
        assert ("torch._dynamo" in sys.modules) == had
    """
    subprocess.run([sys.executable, "-c", program], check=True)
