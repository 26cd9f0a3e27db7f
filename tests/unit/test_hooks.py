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
