"""Tensors that native code makes: as torch.empty() makes them, whichever of torch's functions allocates."""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from single_rank import SingleRankComm, single_rank_dispatch
from utils import device

from deep_ep import Buffer, _high_throughput, _low_latency, _tensors, utils
from deep_ep_cpp import TensorMaker, has_tensor_exchange

pytestmark = pytest.mark.skipif(not has_tensor_exchange(), reason='native code reads no tensors of this torch')

CPU = torch.device('cpu')


def must_not_allocate(*args: Any) -> torch.Tensor:
    raise AssertionError('another device is current')


# empty_strided and current_device of a maker for device 0.
WAYS: dict[str, tuple[Callable[..., torch.Tensor] | None, Callable[[], int] | None]] = {
    'inductor': (utils.find_empty_strided(CPU), None),
    'inductor, current': (utils.find_empty_strided(CPU), lambda: 0),
    'dispatcher': (None, None),
    'another device is current': (must_not_allocate, lambda: 1),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    return WAYS[request.param]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32, torch.bool])
@pytest.mark.parametrize('shape', [(), (7, ), (0, ), (3, 5), (3, 0, 2), (2, 3, 4)])
def test_is_as_torch_makes_it(way: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = TensorMaker(torch.empty(0, dtype=dtype), *way)(*shape)
    wanted = torch.empty(shape, dtype=dtype)
    assert (made.shape, made.stride(), made.dtype, made.device) == (wanted.shape, wanted.stride(), dtype, wanted.device)
    assert made.is_contiguous() and not made.requires_grad and made._base is None
    made.zero_()


def test_wrong_extents_are_errors(way: Any) -> None:
    make = TensorMaker(torch.empty(0), *way)
    for wrong in ((-1, ), (1 << 62, )):
        with pytest.raises(RuntimeError):
            make(*wrong)
    for not_extents in (('2', ), (2.5, ), (None, ), ('2', 1)):
        with pytest.raises(TypeError):
            make(*not_extents)
    for large in ((1 << 64, ), (0, 1 << 62, 8)):
        with pytest.raises(OverflowError):
            make(*large)
    with pytest.raises(TypeError, match='no keywords'):
        make(2, n=3)
    with pytest.raises(TypeError, match='a shape and strides'):
        make.strided((2, ))


def test_not_row_major(way: Any) -> None:
    made = TensorMaker(torch.empty(0, dtype=torch.int32), *way).strided((2, 3), (1, 2))
    assert (made.shape, made.stride(), made.dtype) == ((2, 3), (1, 2), torch.int32)


def test_what_asks_for_the_device_may_fail() -> None:
    make = TensorMaker(torch.empty(0), must_not_allocate, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        make(2)


def test_this_torch_has_both_functions() -> None:
    """Else the rest of this file tests the dispatcher against itself."""
    assert utils.find_empty_strided(CPU) is not None
    assert utils.find_reinterpret() is not torch.as_strided


WRONG: dict[str, Callable[..., Any]] = {
    'another signature': lambda: torch.empty(2, 3),
    'no tensor': lambda *_args: 17,
    'another shape': lambda *_args: torch.empty(6),
    'another dtype': lambda *_args: torch.empty_strided((2, 3), (1, 2), dtype=torch.int8),
    'other strides': lambda *_args: torch.empty((2, 3), dtype=torch.int32),
}


@pytest.mark.parametrize('wrong', WRONG)
def test_a_function_that_does_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    guards = SimpleNamespace(_empty_strided_cpu=WRONG[wrong], _reinterpret_tensor=WRONG[wrong])
    monkeypatch.setattr(utils, '_guards', guards)
    assert utils.find_empty_strided.__wrapped__(CPU) is None
    assert utils.find_reinterpret.__wrapped__() is torch.as_strided


def calls(buffer: Buffer) -> list[torch.Tensor]:
    """What both modes return, for numbers that differ from row to row."""
    x = torch.arange(5 * 512, device=device()).reshape(5, 512).to(torch.bfloat16)
    received, _, _, _, handle, _ = single_rank_dispatch(buffer, x=x)
    combined, _, _ = buffer.combine(received, handle)
    topk_idx = torch.zeros((5, 1), dtype=torch.int64, device=device())
    weights = torch.ones((5, 1), device=device())
    (rows, scales), counts, packed, _, _ = buffer.low_latency_dispatch(x, topk_idx, 8, 4)
    plain, _, low_latency_handle, _, hook = buffer.low_latency_dispatch(x,
                                                                        topk_idx,
                                                                        8,
                                                                        4,
                                                                        use_fp8=False,
                                                                        return_recv_hook=True)
    hook()
    summed, _, _ = buffer.low_latency_combine(plain, topk_idx, weights, low_latency_handle)
    return [received, combined, rows[0, :5].float(), scales[0, :5], counts, packed[0][0, :5], summed]


@pytest.mark.parametrize('way', ['native', 'python', 'no exchange', 'no exchange, public names'])
def test_calls_return_the_same(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Torch before 2.10 has no exchange, so that Python allocates."""
    with Buffer(None, 1 << 20, 1 << 20, low_latency_mode=True, comm=SingleRankComm()) as buffer:
        wanted = calls(buffer)
    if way.startswith('no exchange'):
        for module in (_tensors, _high_throughput):
            monkeypatch.setattr(module, 'has_tensor_exchange', lambda: False)
    if way.endswith('public names'):
        monkeypatch.setattr(_low_latency, 'find_reinterpret', lambda: torch.as_strided)
    with Buffer(None, 1 << 20, 1 << 20, low_latency_mode=True, comm=SingleRankComm()) as buffer:
        if way == 'python':
            buffer._session.direct = None
        assert (buffer._session.direct is not None) == (way == 'native')
        for _ in range(2):  # the first call of a kind goes by way of Python
            for found, expected in zip(calls(buffer), wanted):
                assert torch.equal(found, expected)


def test_memory_is_that_of_torch() -> None:
    """So that it has storage that can be shared, and views of it keep it alive."""
    words = _tensors.EmptyTensors(CPU)[torch.int32](12)
    words.copy_(torch.arange(12))
    view = utils.find_reinterpret()(words, (2, 3), (4, 1), 1)
    assert view.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert view.untyped_storage().data_ptr() == words.untyped_storage().data_ptr()
    del words
    assert view.tolist() == [[1, 2, 3], [5, 6, 7]]


def test_in_inference_mode() -> None:
    make = _tensors.EmptyTensors(CPU)[torch.float32]
    with torch.inference_mode():
        assert make(3).is_inference()
    assert not make(3).is_inference()


def test_reinterpret_is_as_strided() -> None:
    words = torch.arange(20, dtype=torch.int32)
    for view in (((3, 4), (5, 1), 2), ((2, ), (1, ), 18), ((0, ), (1, ), 0)):
        wanted, found = torch.as_strided(words, *view), utils.find_reinterpret()(words, *view)
        assert torch.equal(wanted, found) and found.stride() == wanted.stride()
        assert found.storage_offset() == wanted.storage_offset()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_calls_while_another_device_is_current() -> None:
    """As in a thread that never chose one: everything is made, and launched, where the Buffer is."""
    second = torch.device('cuda', 1)
    with torch.cuda.device(second):
        buffer = Buffer(None, 1 << 20, 1 << 20, low_latency_mode=True, comm=SingleRankComm())
    x = torch.ones((5, 512), dtype=torch.bfloat16, device=second)
    topk_idx = torch.zeros((5, 1), dtype=torch.int64, device=second)
    weights = torch.ones((5, 1), device=second)
    plain: Any = {'use_fp8': False, 'return_recv_hook': True}
    with buffer, torch.cuda.device(0):
        num_bytes = torch.cuda.memory_allocated(0)
        for _ in range(3):
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
            received, _, _, _, handle, _ = buffer.dispatch(x,
                                                           num_tokens_per_rank=per_rank,
                                                           is_token_in_rank=in_rank,
                                                           num_tokens_per_expert=per_expert,
                                                           topk_idx=topk_idx,
                                                           topk_weights=weights)
            combined, _, _ = buffer.combine(received, handle)
            rows, _, packed, _, hook = buffer.low_latency_dispatch(x, topk_idx, 8, 4, **plain)
            hook()
            summed, _, _ = buffer.low_latency_combine(rows, topk_idx, weights, packed)
            for made in (received, combined, rows, packed[0], summed):
                assert made.device == second
            assert torch.equal(combined, x)
            assert torch.equal(summed, x)
        assert torch.cuda.memory_allocated(0) == num_bytes
