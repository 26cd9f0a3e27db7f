"""Tensors that native code makes: as torch.empty() makes them, whichever of torch's functions allocates."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deep_ep import _tensors, utils
from deep_ep_cpp import TensorMaker, has_tensor_exchange

pytestmark = pytest.mark.skipif(not has_tensor_exchange(), reason='native code reads no tensors of this torch')


def must_not_allocate(*args: Any) -> torch.Tensor:
    raise AssertionError('another device is current')


# empty_strided and current_device of a maker for device 0.
WAYS: dict[str, tuple[Callable[..., torch.Tensor] | None, Callable[[], int] | None]] = {
    'inductor': (utils.find_empty_strided('cpu'), None),
    'inductor, current': (utils.find_empty_strided('cpu'), lambda: 0),
    'dispatcher': (None, None),
    'another device is current': (must_not_allocate, lambda: 1),
    'no device is current': (must_not_allocate, lambda: 1 // 0),
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


def test_errors_are_those_of_torch(way: Any) -> None:
    make = TensorMaker(torch.empty(0), *way)
    for wrong in ((-1, ), (1 << 62, )):
        with pytest.raises(RuntimeError):
            make(*wrong)
    for not_extents in (('2', ), (2.5, ), (None, )):
        with pytest.raises(TypeError):
            make(*not_extents)
    with pytest.raises(TypeError, match='no keywords'):
        make(2, n=3)
    with pytest.raises(OverflowError):
        make(1 << 64)


def test_memory_is_that_of_torch() -> None:
    """So that it has storage that can be shared, and views of it keep it alive."""
    words = _tensors.EmptyTensors(torch.device('cpu'))[torch.int32](12)
    words.copy_(torch.arange(12))
    view = utils.reinterpret(words, (2, 3), (4, 1), 1)
    assert view.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert view.untyped_storage().data_ptr() == words.untyped_storage().data_ptr()
    del words
    assert view.tolist() == [[1, 2, 3], [5, 6, 7]]


def test_in_inference_mode() -> None:
    make = _tensors.EmptyTensors(torch.device('cpu'))[torch.float32]
    with torch.inference_mode():
        assert make(3).is_inference()
    assert not make(3).is_inference()


def test_reinterpret_is_as_strided() -> None:
    words = torch.arange(20, dtype=torch.int32)
    for view in (((3, 4), (5, 1), 2), ((2, ), (1, ), 18), ((0, ), (1, ), 0)):
        wanted, found = torch.as_strided(words, *view), utils.reinterpret(words, *view)
        assert torch.equal(wanted, found) and found.stride() == wanted.stride()
        assert found.storage_offset() == wanted.storage_offset()
