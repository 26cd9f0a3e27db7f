"""A model of a GPU's streams and events, for tests of what comes after what; they run everywhere."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deep_ep
from deep_ep import _streams
from deep_ep._streams import CudaStreams
from deep_ep.utils import EventPool

COMM, MAIN, SIDE = 1, 2, 3
TORCH_ID = 100  # what torch calls a stream, less its handle


class ModelGpu:
    """Streams know all the work that comes before their next; events what their stream knew when they were recorded.

    With the rules of capture: an event recorded on a captured stream draws whoever waits for it into the capture, and
    a captured stream must not wait for an event from outside.
    """

    def __init__(self) -> None:
        self.current = MAIN
        self.device = 0
        self.known: dict[int, set[str]] = {COMM: set(), MAIN: set(), SIDE: set()}
        self.captured: set[int] = set()
        self.ambiguous: set[int] = set()
        self.external: set[int] = set()  # known to torch by their handles
        self.calls: Counter[str] = Counter()
        self._events: dict[int, tuple[frozenset[str], bool]] = {}

    def work(self, stream: int, name: str) -> frozenset[str]:
        """Queues `name`; returns what comes before it."""
        before = frozenset(self.known[stream])
        self.known[stream].add(name)
        return before

    def set_stream(self, stream_id: int, device_index: int, device_type: int) -> None:
        assert (device_index, device_type) == (0, 1)
        self.current = stream_id - TORCH_ID

    def get_stream(self, index: int) -> tuple[int, int, int]:
        return self.current + (0 if self.current in self.external else TORCH_ID), index, 1

    # What CudaStreams asks of the native device

    def create_event(self) -> int:
        self.calls["create_event"] += 1
        self._events[len(self._events) + 1] = (frozenset(), False)
        return len(self._events)

    def destroy_event(self, event: int) -> None:
        self.calls["destroy_event"] += 1
        self._events[event] = (frozenset({"destroyed"}), True)

    def record_event(self, event: int, stream: int) -> None:
        self.calls["record_event"] += 1
        self._events[event] = (frozenset(self.known[stream]), stream in self.captured)

    def stream_wait_event(self, stream: int, event: int) -> None:
        self.calls["stream_wait_event"] += 1
        known, is_captured = self._events[event]
        if stream in self.captured and not is_captured:
            raise deep_ep.Error("an event from outside the capture")
        if is_captured:
            self.captured.add(stream)
        self.known[stream] |= known

    def join_streams(self, waiting: int, waited_for: int, event: int) -> None:
        self.record_event(event, waited_for)
        self.stream_wait_event(waiting, event)

    def query_event(self, event: int) -> bool:
        assert not self._events[event][1], "an event of a capture never completes"
        return True

    def stream_kind(self, stream: int) -> str:
        self.calls["stream_kind"] += 1
        return "captured" if stream in self.captured else "ambiguous" if stream in self.ambiguous else "plain"


class Tensor:
    """As much of a tensor as the stream side sees."""

    def __init__(self) -> None:
        self.recorded: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


def installed(monkeypatch: pytest.MonkeyPatch) -> ModelGpu:
    """One that stands in for the GPU of this process."""
    made = ModelGpu()
    monkeypatch.setattr(_streams, "current_stream_handle", lambda _: made.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: made.current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", made.get_stream, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_setStream", made.set_stream, raising=False)
    return made


def cuda_streams(gpu: ModelGpu) -> CudaStreams:
    """The stream side of a Buffer on `gpu`."""
    native: Any = gpu
    comm_stream: Any = SimpleNamespace(cuda_stream=COMM, stream_id=COMM + TORCH_ID, device_index=0, device_type=1)
    return CudaStreams(0, native, EventPool(native), comm_stream)
