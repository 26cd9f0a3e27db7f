"""Stream policy: which stream waits for which, where outputs are allocated, and how long tensors stay alive.

Kernels run on the *comm stream* of a Buffer. On CUDA the caller's stream is torch's current stream. On the CPU the
host itself is the caller's stream: everything that it did before a call is complete, waiting means blocking, and the
comm stream belongs to the native executor.
"""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Callable, Optional, Union

import torch
from typing_extensions import Self

import deep_ep_cpp
from deep_ep._errors import Error

CPU_DEVICE_INDEX = -1
# torch: lower is more urgent. Communication must not queue behind the compute that it overlaps with.
COMM_STREAM_PRIORITY = -1


@functools.cache
def device_choice() -> tuple[str, str]:
    """('cuda' or 'cpu', why), decided once per process."""
    requested = deep_ep_cpp.get_environment()["device"]
    if requested == "cpu":
        return "cpu", "DEEP_EP_DEVICE=cpu"
    obstacle = ""
    if not torch.cuda.is_available():
        obstacle = "torch.cuda.is_available() is False"
    elif not deep_ep_cpp.is_cuda_built():
        obstacle = "deep_ep_cpp was built without CUDA"
    if not obstacle:
        return "cuda", "a GPU is available"
    if requested == "cuda":
        raise Error(f"DEEP_EP_DEVICE=cuda, but {obstacle}; run `python -m deep_ep.doctor`")
    return "cpu", obstacle


@functools.cache
def native_device(index: int) -> deep_ep_cpp.Device:
    return deep_ep_cpp.Device(index)


def is_capturing() -> bool:
    """Whether the caller's stream records a CUDA graph."""
    return device_choice()[0] == "cuda" and torch.cuda.is_current_stream_capturing()


class HostEvent:
    """A point on the comm stream of a CPU Buffer; keeps the tensors that the work before it uses alive."""

    def __init__(self, device: deep_ep_cpp.Device, stream: int, tensors: tuple[torch.Tensor, ...],
                 check: Callable[[], None]) -> None:
        self._device = device
        self._tensors = tensors
        self._check = check
        self._event = device.create_event()
        device.record_event(self._event, stream)

    def is_complete(self) -> bool:
        if not self._device.query_event(self._event):
            return False
        self._tensors = ()
        return True

    def wait(self) -> None:
        """Blocks the host, then raises what the kernels before this event reported."""
        self._device.synchronize_event(self._event)
        self._tensors = ()
        self._check()

    def hold_back(self, stream: int) -> None:
        """Later work on `stream` waits for this event."""
        self._device.stream_wait_event(stream, self._event)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._device.destroy_event(self._event)


# None: a point on the host's own timeline, which has passed by the time anybody can ask.
RecordedEvent = Union[torch.cuda.Event, HostEvent, None]


def record_on_current_stream() -> RecordedEvent:
    if device_choice()[0] == "cpu":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream())
    return event


def wait_on_current_stream(event: RecordedEvent) -> None:
    if isinstance(event, HostEvent):
        event.wait()
    elif event is not None:
        torch.cuda.current_stream().wait_event(event)


class Operation:
    """The stream side of one call: allocate, `start()`, launch on `stream`, `finish()`; a context manager.

    Every output is made inside `allocation()`, and every tensor that kernels touch is given to `start()`, or to
    `add()` when it is made later. Both order the comm stream behind the stream whose memory pool the outputs come
    from: a block of that pool may have been freed a moment ago with work on it still queued there, and torch may fill
    fresh blocks from that stream. When the call fails half-way, kernels that were launched may still run: their
    tensors are kept as those of an asynchronous call are.
    """

    stream: int
    torch_stream: Optional[torch.cuda.Stream] = None  # the same; None on the CPU, where the host's timeline is meant

    def __init__(self, is_async: bool) -> None:
        self.is_async = is_async
        self._tensors: list[torch.Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: Optional[type[BaseException]], exc: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        if exc_type is not None and self._tensors:
            self._keep_tensors()

    def allocation(self) -> contextlib.AbstractContextManager[Any]:
        raise NotImplementedError

    def start(self, tensors: Iterable[Optional[torch.Tensor]]) -> None:
        """The kernels of this call come after `previous_event`, or else after the caller's work so far."""
        self._wait_for_caller()
        self.add(tensors)

    def add(self, tensors: Iterable[Optional[torch.Tensor]]) -> None:
        self._tensors.extend(tensor for tensor in tensors if tensor is not None)
        self._wait_for_pool()

    def finish(self) -> RecordedEvent:
        """The event that an asynchronous call returns; a synchronous one has made the caller wait instead."""
        raise NotImplementedError

    def _wait_for_caller(self) -> None:
        raise NotImplementedError

    def _wait_for_pool(self) -> None:
        raise NotImplementedError

    def _keep_tensors(self) -> None:
        raise NotImplementedError


class Streams:
    """The streams of one Buffer."""

    kind: str
    device: torch.device
    native: deep_ep_cpp.Device
    comm_stream: Any

    def operation(self, previous: RecordedEvent, is_async: bool, on_comm_stream: bool) -> Operation:
        raise NotImplementedError

    def drain(self, timeout_s: float) -> bool:
        """Waits until the comm stream is idle; False when `timeout_s` passed first."""
        raise NotImplementedError

    def close(self) -> None:
        """Called once, when the comm stream is idle and the native Buffer is gone."""


class CudaStreams(Streams):
    kind = "cuda"

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.native = native_device(index)
        self.comm_stream: torch.cuda.Stream = torch.cuda.Stream(
            self.device, priority=COMM_STREAM_PRIORITY)  # type: ignore[no-untyped-call]

    def operation(self, previous: RecordedEvent, is_async: bool, on_comm_stream: bool) -> Operation:
        return _CudaOperation(self, previous, is_async, on_comm_stream)

    def drain(self, timeout_s: float) -> bool:
        return _poll(self.comm_stream.query, timeout_s)


class _CudaOperation(Operation):

    def __init__(self, streams: CudaStreams, previous: RecordedEvent, is_async: bool, on_comm_stream: bool) -> None:
        super().__init__(is_async)
        self._comm = streams.comm_stream
        self._compute = torch.cuda.current_stream(streams.device)
        self._previous = previous
        self._on_comm_stream = on_comm_stream
        self.stream = self._comm.cuda_stream
        self.torch_stream = self._comm

    def allocation(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._comm) if self._on_comm_stream else contextlib.nullcontext()

    def finish(self) -> RecordedEvent:
        if not self.is_async:
            self._compute.wait_stream(self._comm)
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._comm)
        self._keep_tensors()
        return event

    def _wait_for_caller(self) -> None:
        if isinstance(self._previous, torch.cuda.Event):
            self._comm.wait_event(self._previous)
        elif isinstance(self._previous, HostEvent):
            self._previous.wait()

    def _wait_for_pool(self) -> None:
        # Outputs from the comm stream's own pool are in its order already, and then `previous_event`, which the
        # caller must give, is all that the inputs need.
        if not self._on_comm_stream:
            self._comm.wait_stream(self._compute)

    def _keep_tensors(self) -> None:
        for tensor in self._tensors:
            tensor.record_stream(self._comm)
            if self._on_comm_stream:
                tensor.record_stream(self._compute)


class HostStreams(Streams):
    kind = "cpu"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.native = native_device(CPU_DEVICE_INDEX)
        self.comm_stream = self.native.create_stream()
        self.check: Callable[[], None] = _no_check
        self._in_flight: deque[HostEvent] = deque()

    def operation(self, previous: RecordedEvent, is_async: bool, on_comm_stream: bool) -> Operation:  # noqa: ARG002
        return _HostOperation(self, previous, is_async)

    def record(self, tensors: Iterable[torch.Tensor]) -> HostEvent:
        """An event after all work so far. The tensors live until it is complete, whether anybody waits or not."""
        while self._in_flight and self._in_flight[0].is_complete():
            self._in_flight.popleft()
        event = HostEvent(self.native, self.comm_stream, tuple(tensors), self._raise_failure)
        self._in_flight.append(event)
        return event

    def _raise_failure(self) -> None:
        self.check()

    def drain(self, timeout_s: float) -> bool:
        return _poll(self.record(()).is_complete, timeout_s)

    def close(self) -> None:
        self.check = _no_check
        self._in_flight.clear()
        self.native.destroy_stream(self.comm_stream)


class _HostOperation(Operation):

    def __init__(self, streams: HostStreams, previous: RecordedEvent, is_async: bool) -> None:
        super().__init__(is_async)
        self._streams = streams
        self._previous = previous
        self.stream = streams.comm_stream

    def allocation(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def finish(self) -> RecordedEvent:
        if self.is_async:
            return self._streams.record(self._tensors)
        self._streams.native.synchronize_stream(self.stream)
        self._streams.check()
        return None

    def _wait_for_caller(self) -> None:
        if isinstance(self._previous, HostEvent):
            self._previous.hold_back(self.stream)
        elif self._previous is not None:
            self._previous.synchronize()

    def _wait_for_pool(self) -> None:
        """Nothing to do: what the host did is done."""

    def _keep_tensors(self) -> None:
        self._streams.record(self._tensors)


def open_streams() -> Streams:
    """The streams of a new Buffer, on the GPU that is current or on the CPU."""
    if device_choice()[0] == "cuda":
        return CudaStreams(torch.cuda.current_device())
    return HostStreams()


def _no_check() -> None:
    pass


def _poll(is_done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)
    return True
