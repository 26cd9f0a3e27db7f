"""What a hook of a low-latency call keeps alive."""
import gc
import types
import weakref
from typing import Any

import pytest
import torch

from deep_ep import _low_latency


class LooseOperation:
    """As on a GPU: its tensors may be dropped at any time, since torch reuses memory in the order of the stream."""

    stream = 0
    is_captured = False

    def start(self, inputs: Any, outputs: Any) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def finish(self) -> None:
        pass


def test_a_hook_keeps_the_tensors_of_its_receive_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a combine is such a tensor. With its memory given to the next call's, both received one call."""
    seen: list[bool] = []
    number = torch.zeros(1, dtype=torch.int64)
    alive = weakref.ref(number)

    def launch(args: Any, ticket: int, stream: int) -> int:
        seen.append(alive() is not None)
        return 1

    session = types.SimpleNamespace(runtime=types.SimpleNamespace(low_latency_combine=launch),
                                    streams=types.SimpleNamespace(kind="cpu"))
    _, hook = _low_latency._run(session, "low_latency_combine", LooseOperation(), None, (number, None), True)
    del number
    gc.collect()
    assert hook is not None
    hook()
    assert seen == [True, True]
    assert alive() is None


def combine_with_hook(session: Any, numbers: _low_latency.Numbers, operation: Any) -> tuple[_low_latency.Hook, int]:
    """The hook, and where the number of its call is."""
    number = numbers.take(operation)
    _, hook = _low_latency._run(session, "low_latency_combine", operation, None, (number, ), True)
    assert hook is not None
    hook.then = numbers, number
    return hook, id(number)


def make_session(is_captured: bool = False) -> Any:
    runtime = types.SimpleNamespace(low_latency_combine=lambda *_: 1)
    streams = types.SimpleNamespace(is_captured=lambda _: is_captured)
    return types.SimpleNamespace(runtime=runtime,
                                 streams=streams,
                                 empty={torch.int64: lambda size: torch.zeros(size, dtype=torch.int64)},
                                 abandon_hook=lambda *_: None)


def test_open_calls_have_numbers_of_their_own_and_later_calls_take_them_over() -> None:
    session = make_session()
    numbers = _low_latency.Numbers(session)
    first, first_number = combine_with_hook(session, numbers, LooseOperation())
    second, second_number = combine_with_hook(session, numbers, LooseOperation())
    assert first_number != second_number
    first()
    first()  # gives nothing back again
    third, third_number = combine_with_hook(session, numbers, LooseOperation())
    assert third_number == first_number
    del second  # dropped without being called: its send phase may still be under way
    gc.collect()
    assert numbers._free == []
    third()
    assert [id(number) for number in numbers._free] == [first_number]


def test_a_captured_call_keeps_its_number_to_itself() -> None:
    """The graph writes there whenever it is replayed."""

    class CapturedOperation(LooseOperation):
        is_captured = True

    session = make_session()
    numbers = _low_latency.Numbers(session)
    hook, _ = combine_with_hook(session, numbers, LooseOperation())
    hook()
    [free] = numbers._free
    captured, captured_number = combine_with_hook(session, numbers, CapturedOperation())
    captured()
    assert captured_number != id(free)
    assert numbers._free == [free]
    half_captured_session = make_session(is_captured=True)
    half_captured, _ = combine_with_hook(half_captured_session, _low_latency.Numbers(half_captured_session),
                                         LooseOperation())
    half_captured()
    assert half_captured.then is not None
    assert half_captured.then[0]._free == []
