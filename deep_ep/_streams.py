"""Stream policy: which stream waits for which, where outputs are allocated, and how long tensors stay alive.

On CUDA the caller's stream is torch's current stream. Synchronous calls run on it, so that nothing has to wait for
another stream; asynchronous ones run on the *comm stream* of the Buffer. Every operation, and every phase of one that
has a hook, counts on the one before it to be complete, of whichever mode. So a Buffer remembers the stream of the last
one, and the event behind it, for which the next one waits on another stream. Streams are plain numbers here, and events
come from a pool: torch's objects for them would be a good part of the microseconds that a call costs the host.

On the CPU the host itself is the caller's stream: everything that it did before a call is complete, waiting means
blocking, and all kernels run on the comm stream, which belongs to the native executor.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Callable, Optional, Union

import torch
from typing_extensions import Self

import deep_ep_cpp
from deep_ep._env import device_choice, native_device
from deep_ep.utils import (
    CurrentStream,
    EventPool,
    HostEvent,
    PooledEvent,
    RecordedEvent,
    StreamId,
    current_stream_handle,
    current_stream_id,
    event_pool,
    is_of_torch,
)

CPU_DEVICE_INDEX = -1
# torch: lower is more urgent. Communication must not queue behind the compute that it overlaps with.
COMM_STREAM_PRIORITY = -1
_NO_CONTEXT = contextlib.nullcontext()

Tensors = tuple[Optional[torch.Tensor], ...]


class Operation:
    """The stream side of one call: allocate, `start()`, launch on `stream`, `finish()`; a context manager.

    Every output is made inside `allocation()`, and every tensor that kernels touch is given to `start()`, or to
    `add()` when it is made later. Both order the kernels behind the stream whose memory pool the outputs come from: a
    block of that pool may have been freed a moment ago with work on it still queued there, and torch may fill fresh
    blocks from that stream. When the call fails half-way, kernels that were launched may still run: their tensors are
    kept as those of an asynchronous call are.

    A call with a hook: both phases read what `snapshot()` returns; `start()`, launch the send phase, `pause()`; in the
    hook `resume()`, launch the receive phase, `finish()`.
    """

    __slots__ = ("_inputs", "_outputs", "current", "is_async", "is_captured", "stream")

    stream: int  # of the kernels
    current: int  # the caller's

    def __init__(self, is_async: bool, is_captured: bool = False) -> None:
        self.is_async = is_async
        self.is_captured = is_captured  # into a CUDA graph
        self._inputs: Tensors = ()
        self._outputs: Tensors = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: Optional[type[BaseException]], exc: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        if exc_type is not None:
            self.abandon()

    def allocation(self) -> contextlib.AbstractContextManager[Any]:
        return _NO_CONTEXT

    def start(self, inputs: Tensors, outputs: Tensors) -> None:
        """The kernels of this call come after `previous_event`, or else after the caller's work so far."""
        self._inputs, self._outputs = inputs, outputs
        self._wait_before_kernels()

    def add(self, outputs: Tensors) -> None:
        self._outputs += outputs
        self._wait_for_pool()

    def add_lent(self, outputs: Tensors) -> None:
        """The same for tensors in lent memory, which the next calls wait for by themselves."""

    def snapshot(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`inputs` as they are now for the kernels of both phases, whatever the caller does to them from now on."""
        return inputs

    def pause(self) -> None:
        """The call goes on later, and its tensors may be dropped before it does."""
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError

    def finish(self) -> RecordedEvent:
        """The event that an asynchronous call returns; a synchronous one has made the caller wait instead."""
        raise NotImplementedError

    def _wait_before_kernels(self) -> None:
        raise NotImplementedError

    def _wait_for_pool(self) -> None:
        """Outputs of a stream's own pool need no more, nor those of the host."""

    def abandon(self) -> None:
        """The call has failed, and nobody will call `finish()`."""
        raise NotImplementedError


class Streams:
    """The streams of one Buffer."""

    kind: str
    device: torch.device
    native: deep_ep_cpp.Device
    comm_stream: Any

    def operation(self, previous: RecordedEvent, is_async: bool, on_comm_stream: bool) -> Operation:
        raise NotImplementedError

    def low_latency_operation(self, is_async: bool, can_pause: bool = False) -> Operation:
        """One that a capture does not move to another stream, and that asks the device for as little as can be.

        If it can pause, it knows whether it is captured.
        """
        raise NotImplementedError

    def is_captured(self, stream: int) -> bool:  # noqa: ARG002
        """Whether what is launched there becomes part of a CUDA graph."""
        return False

    def wait_for_last(self) -> None:
        """The host waits until the last operation is complete; also while another stream is captured."""

    def drain(self, timeout_s: float) -> bool:
        """Waits until all operations are complete; False when `timeout_s` passed first."""
        raise NotImplementedError

    def close(self) -> None:
        """Called once, when the streams are drained and the native Buffer is gone."""


class CudaStreams(Streams):
    kind = "cuda"

    def __init__(self, index: int, native: deep_ep_cpp.Device, events: EventPool,
                 comm_stream: torch.cuda.Stream) -> None:
        self.index = index
        self.device = torch.device("cuda", index)
        self.native = native
        self.events = events
        self.comm_stream: torch.cuda.Stream = comm_stream
        self.comm: int = comm_stream.cuda_stream
        self._comm_id: StreamId = (comm_stream.stream_id, comm_stream.device_index, comm_stream.device_type)
        self._torch_streams: dict[StreamId, torch.cuda.Stream] = {}
        # Made here and kept: calls may come while a CUDA graph is captured, and making an event takes longer than
        # recording it.
        self._scratch = native.create_event()
        self.own_event = PooledEvent(native.create_event(), [])
        # The operation before: its stream (None: there was none), the event behind it or behind one before it, and
        # which of the two; whether there are several streams, so that phases leave events behind them.
        self.order = deep_ep_cpp.StreamOrder()
        self.order.last_event = self.own_event

    def operation(self, previous: RecordedEvent, is_async: bool, on_comm_stream: bool) -> Operation:
        current = current_stream_handle(self.index)
        kind = self.native.stream_kind(current)
        if kind == "plain" and not is_async:
            return _DirectOperation(self, previous, current)
        return _CommOperation(self, previous, current, kind == "captured", is_async, on_comm_stream)

    def low_latency_operation(self, is_async: bool, can_pause: bool = False) -> Operation:
        current = current_stream_handle(self.index)
        # A capture would have to be forked to the comm stream, and where the event is dropped nobody would join it.
        if is_async and not self.is_captured(current):
            return _CommOperation(self, None, current, False, True, False)
        return _PhasedOperation(self, current, is_async, can_pause and self.is_captured(current))

    def is_captured(self, stream: int) -> bool:
        return stream != 0 and self.native.stream_kind(stream) == "captured"  # the default stream never is

    def follow(self, stream: int, event: Union[PooledEvent, HostEvent]) -> None:
        """Later work on `stream` comes after `event`."""
        if isinstance(event, HostEvent):
            event.wait()
        else:
            self.native.stream_wait_event(stream, event.cuda_event)

    def allocation_on_comm_stream(self) -> contextlib.AbstractContextManager[Any]:
        if torch.cuda.current_device() != self.index:
            return torch.cuda.stream(self.comm_stream)
        return CurrentStream(self._comm_id)

    def current_torch_stream(self) -> torch.cuda.Stream:
        """torch.cuda.current_stream(), whose objects are kept: making one takes 5 us, and there are few."""
        stream_id = current_stream_id(self.index)
        stream = self._torch_streams.get(stream_id)
        if stream is None:
            stream = self._torch_streams[stream_id] = torch.cuda.current_stream(self.device)
        return stream

    def join(self, waiting: int, waited_for: int) -> None:
        """Later work on one stream comes after what the other has so far."""
        if waiting != waited_for:
            self.native.join_streams(waiting, waited_for, self._scratch)

    def follow_last(self, stream: int) -> None:
        """Later work on `stream` comes after the operation before."""
        last = self.order.last_stream
        if stream == last or last is None:
            return
        self.order.is_shared = True
        if self.order.is_marked:
            self.native.stream_wait_event(stream, self.order.last_event.cuda_event)
        else:
            self.join(stream, last)

    def set_last(self, stream: int, event: Optional[PooledEvent] = None) -> None:
        """What `stream` has so far, or what came before `event` on it, is the operation before.

        The event is there when the stream is not the same next time. Recording it then instead would make the next
        operation wait for what the caller has queued in between, and the stream may be gone.
        """
        if event is None:
            event = self.own_event
            self.native.record_event(event.cuda_event, stream)
        self.order.last_stream, self.order.last_event, self.order.is_marked = stream, event, True

    def enter_phase(self, stream: int) -> bool:
        """A phase is launched on `stream` next. Whether it has to be marked with `set_last` then.

        An event for each phase would make a call that costs the host few microseconds one dearer, and is of no use
        until a second stream comes. So phases leave none while one stream of torch, which is never destroyed, has them
        all; the first that comes on another stream waits for all that the first one has by then. Streams are not joined
        where one of them is captured: an event does not cross the border of a graph, and whoever captures on several
        streams orders them.
        """
        if stream != self.order.last_stream or self.order.is_shared:
            if self.native.stream_kind(stream) == "captured":
                return False
            self.follow_last(stream)
            self.order.is_shared = self.order.is_shared or not is_of_torch(stream, self.index)
            self.order.last_stream = stream
        self.order.is_marked = False
        return bool(self.order.is_shared)

    def wait_for_last(self) -> None:
        """A phase that left no event is not waited for: it uses no lent memory."""
        self.native.synchronize_event(self.order.last_event.cuda_event)

    def drain(self, timeout_s: float) -> bool:
        # A capture that has the streams comes first. One of others goes on: the native device may be asked in it,
        # and torch's streams may not.
        last = None if self.order.is_marked else self.order.last_stream
        if self.is_captured(self.comm) or (last is not None and self.is_captured(last)):
            return False
        # Once: where a phase left no event, another attempt would wait for what the caller has queued by then.
        self.follow_last(self.comm)
        self.order.last_stream = self.comm
        self.native.record_event(self._scratch, self.comm)
        return _poll(lambda: self.native.query_event(self._scratch), timeout_s)

    def close(self) -> None:
        self.native.destroy_event(self._scratch)
        self.native.destroy_event(self.own_event.cuda_event)


class _DirectOperation(Operation):
    """A synchronous call on the current stream, where nothing but the operation before it can be in its way."""

    __slots__ = ("_previous", "_streams")

    def __init__(self, streams: CudaStreams, previous: RecordedEvent, current: int) -> None:
        # Not by way of the base class, which takes as long as all of this.
        self.is_async = self.is_captured = False
        self.stream = self.current = current
        self._streams = streams
        self._previous = previous

    def start(self, inputs: Tensors, outputs: Tensors) -> None:  # noqa: ARG002
        if self._previous is not None:
            self._streams.follow(self.stream, self._previous)
        self._streams.follow_last(self.stream)

    def add(self, outputs: Tensors) -> None:
        """They are in the order of this stream."""

    def finish(self) -> RecordedEvent:
        self._streams.set_last(self.stream)
        return None

    def abandon(self) -> None:
        with contextlib.suppress(deep_ep_cpp.Error):  # it would hide the failure that brought us here
            self._streams.set_last(self.stream)


class _PhasedOperation(Operation):
    """A low-latency call on the current stream, in one launch or two.

    torch reuses memory in stream order, so its tensors may be dropped at any time, and what the caller does to the
    inputs after the send phase comes later on the stream.
    """

    __slots__ = ("_is_to_mark", "_streams")

    def __init__(self, streams: CudaStreams, current: int, is_async: bool, is_captured: bool) -> None:
        # Not by way of the base class, which takes as long as all of this.
        self.is_async, self.is_captured = is_async, is_captured
        self.stream = self.current = current
        self._streams = streams

    def start(self, inputs: Tensors, outputs: Tensors) -> None:  # noqa: ARG002
        self._is_to_mark = self._streams.enter_phase(self.stream)

    def pause(self) -> None:
        if self._is_to_mark:
            self._streams.set_last(self.stream)

    def resume(self) -> None:
        self._is_to_mark = self._streams.enter_phase(self.stream)

    def finish(self) -> RecordedEvent:
        if self._is_to_mark:
            self._streams.set_last(self.stream)
        return self._streams.events.record(self.stream) if self.is_async else None

    def abandon(self) -> None:
        with contextlib.suppress(deep_ep_cpp.Error):
            self.pause()


class _CommOperation(Operation):
    """A call on the comm stream: an asynchronous one, or one whose current stream will not do.

    That is a stream that is captured into a graph, whose branches, several streams perhaps, then meet on the comm
    stream, and one whose handle is ambiguous.
    """

    __slots__ = ("_on_comm_stream", "_previous", "_streams")

    def __init__(self, streams: CudaStreams, previous: RecordedEvent, current: int, is_captured: bool, is_async: bool,
                 on_comm_stream: bool) -> None:
        super().__init__(is_async, is_captured)
        self.stream = streams.comm
        self._streams = streams
        self._previous = previous
        self.current = current
        self._on_comm_stream = on_comm_stream

    def allocation(self) -> contextlib.AbstractContextManager[Any]:
        return self._streams.allocation_on_comm_stream() if self._on_comm_stream else _NO_CONTEXT

    def finish(self) -> RecordedEvent:
        if not self.is_async:
            self._set_last(None)
            self._streams.join(self.current, self.stream)
            return None
        event = self._streams.events.record(self.stream)
        self._set_last(event)
        self._keep_tensors()
        return event

    def _wait_before_kernels(self) -> None:
        if self._previous is not None:
            self._streams.follow(self.stream, self._previous)
        if not self.is_captured:
            self._streams.follow_last(self.stream)
        self._wait_for_pool()

    def _wait_for_pool(self) -> None:
        # Outputs from the comm stream's own pool are in its order already, and then `previous_event`, which the
        # caller must give, is all that the inputs need.
        if not self._on_comm_stream:
            self._streams.join(self.stream, self.current)

    def _set_last(self, event: Optional[PooledEvent]) -> None:
        if not self.is_captured:  # an event does not cross the border of a graph
            self._streams.set_last(self.stream, event)

    def abandon(self) -> None:
        self._keep_tensors()
        with contextlib.suppress(deep_ep_cpp.Error):
            self._set_last(None)

    def _keep_tensors(self) -> None:
        """Their memory is not used again before the kernels are done, nor outputs' before the caller's later work."""
        comm_stream = self._streams.comm_stream
        outputs_user = self._streams.current_torch_stream() if self._on_comm_stream else comm_stream
        for tensor in self._inputs:
            if tensor is not None:
                tensor.record_stream(comm_stream)
        for tensor in self._outputs:
            if tensor is not None:
                tensor.record_stream(outputs_user)


class HostStreams(Streams):
    kind = "cpu"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.native = native_device(CPU_DEVICE_INDEX)
        self.comm_stream = self.native.create_stream()
        self.check: Callable[[], None] = _no_check
        self._in_flight: deque[HostEvent] = deque()
        self._end: Optional[HostEvent] = None  # of all work, once nobody gives any more

    def operation(self, previous: RecordedEvent, is_async: bool, on_comm_stream: bool) -> Operation:  # noqa: ARG002
        return _HostOperation(self, previous, is_async)

    def low_latency_operation(self, is_async: bool, can_pause: bool = False) -> Operation:  # noqa: ARG002
        return _HostOperation(self, None, is_async)

    def record(self, tensors: Iterable[torch.Tensor]) -> HostEvent:
        """An event after all work so far. The tensors live until it is complete, whether anybody waits or not."""
        self._let_go()
        event = HostEvent(self.native, self.comm_stream, tuple(tensors), self.end_wait)
        self._in_flight.append(event)
        return event

    def finish(self) -> None:
        """Waits for all work so far."""
        self.native.synchronize_stream(self.comm_stream)
        self.end_wait()

    def end_wait(self) -> None:
        """The host has waited: work is complete, and may have failed."""
        self._let_go()
        self.check()

    def _let_go(self) -> None:
        """Of the tensors of all work that is complete."""
        while self._in_flight and self._in_flight[0].is_complete():
            self._in_flight.popleft()

    def drain(self, timeout_s: float) -> bool:
        # Every attempt looks at the same event: a new one is never complete at once, which is all that a destructor,
        # and the constructor that tries again after it, wait for.
        if self._end is None:
            self._end = self.record(())
        return _poll(self._end.is_complete, timeout_s)

    def close(self) -> None:
        self.check = _no_check
        for event in self._in_flight:  # all complete by now
            event.is_complete()
        self._in_flight.clear()
        self.native.destroy_stream(self.comm_stream)


class _HostOperation(Operation):

    __slots__ = ("_previous", "_streams")

    def __init__(self, streams: HostStreams, previous: RecordedEvent, is_async: bool) -> None:
        super().__init__(is_async)
        self._streams = streams
        self._previous = previous
        self.stream = self.current = streams.comm_stream

    def add_lent(self, outputs: Tensors) -> None:
        self._outputs += outputs

    def snapshot(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # The host is the caller's stream and does not wait for the send phase: peers that it waits for may come later.
        return tuple(tensor.detach().clone() for tensor in inputs)

    def pause(self) -> None:
        self._keep_tensors()

    def resume(self) -> None:
        """Nothing to do: all work of this device is in order."""

    def finish(self) -> RecordedEvent:
        if self.is_async:
            return self._keep_tensors()
        self._streams.finish()
        return None

    def _wait_before_kernels(self) -> None:
        if isinstance(self._previous, HostEvent):
            self._previous.hold_back(self.stream)  # a process has one kind of device, and so one kind of event

    def abandon(self) -> None:
        self._keep_tensors()

    def _keep_tensors(self) -> HostEvent:
        return self._streams.record(tensor for tensor in self._inputs + self._outputs if tensor is not None)


def open_streams() -> Streams:
    """The streams of a new Buffer, on the GPU that is current or on the CPU."""
    if device_choice()[0] == "cuda":
        index = torch.cuda.current_device()
        comm_stream = torch.cuda.Stream(index, priority=COMM_STREAM_PRIORITY)  # type: ignore[no-untyped-call]
        return CudaStreams(index, native_device(index), event_pool(index), comm_stream)
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
