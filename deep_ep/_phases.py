"""Where the phases of a low-latency call are launched, in what order, and how long tensors stay alive.

Synchronous calls and calls with a hook run on torch's current stream, so that nothing has to wait for another stream;
asynchronous ones run on the comm stream. While a CUDA graph is captured everything runs on the current stream. On the
CPU all of them run on the native stream (see _streams.py).
"""

from collections.abc import Sequence
from typing import Optional

import torch

from deep_ep._raw_cuda import current_stream_handle
from deep_ep._streams import CudaStreams, HostEvent, HostStreams, RecordedEvent, Streams

Tensors = Sequence[Optional[torch.Tensor]]


class PhaseOrder:
    """Keeps the phases of one Buffer in the order in which they are launched, whichever streams they go to.

    Every phase counts on the one before it to be complete. Streams are not joined while one of them is captured: an
    event does not cross the border of a graph, and whoever captures on several streams orders them.
    """

    def __init__(self) -> None:
        self._last: Optional[int] = None

    def enter(self, streams: CudaStreams, stream: int) -> None:
        """To be called before each launch on `stream`."""
        if self._last == stream or streams.native.stream_kind(stream) == "captured":
            return
        if self._last is not None:
            streams.join(stream, self._last)
        self._last = stream

    def join(self, streams: Streams) -> None:
        """The comm stream waits for all phases, so that whoever waits for it before releasing memory waits for them."""
        if isinstance(streams, CudaStreams) and self._last is not None:
            streams.join(streams.comm, self._last)


class Phases:
    """The stream side of one call: `begin()`, launch on `stream`, `finish()`.

    With a hook: both phases read what `keep()` returns; `begin()`, launch the send phase, `pause()`; in the hook
    `resume()`, launch the receive phase, `finish()`. Outputs are allocated before `begin()`, on the current stream.
    """

    __slots__ = ("stream", )

    stream: int

    def keep(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`inputs` as they are now for the kernels, whatever the caller does to them from now on."""
        raise NotImplementedError

    def begin(self) -> None:
        raise NotImplementedError

    def pause(self, tensors: Tensors) -> None:
        """The work launched so far uses `tensors`, which may be dropped before the call goes on."""
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError

    def finish(self, tensors: Tensors) -> RecordedEvent:
        """What the caller has to wait for; None: the call was synchronous."""
        raise NotImplementedError


class _CudaPhases(Phases):

    __slots__ = ("_current", "_is_async", "_is_on_comm_stream", "_order", "_streams")

    def __init__(self, streams: CudaStreams, order: PhaseOrder, is_async: bool) -> None:
        self._streams = streams
        self._order = order
        self._is_async = is_async
        self._current = current_stream_handle(streams.index)
        # A capture would have to be forked to the comm stream, and where the event is dropped nobody would join it.
        self._is_on_comm_stream = is_async and streams.native.stream_kind(self._current) != "captured"
        self.stream = streams.comm if self._is_on_comm_stream else self._current

    def keep(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs  # what the caller does comes later on the stream of the send phase

    def begin(self) -> None:
        if self._is_on_comm_stream:
            self._streams.join(self.stream, self._current)
            self._streams.follow_last(self.stream)
        self._order.enter(self._streams, self.stream)

    def pause(self, tensors: Tensors) -> None:
        # torch reuses memory in stream order, so tensors of the current stream may be dropped at any time.
        if self._is_on_comm_stream:
            for tensor in tensors:
                if tensor is not None:
                    tensor.record_stream(self._streams.comm_stream)

    def resume(self) -> None:
        self._order.enter(self._streams, self.stream)

    def finish(self, tensors: Tensors) -> RecordedEvent:
        if not self._is_async:
            return None
        event = self._streams.events.record(self.stream)
        if self._is_on_comm_stream:
            self._streams.set_last(self.stream, event)
        self.pause(tensors)
        return event


class _HostPhases(Phases):

    __slots__ = ("_is_async", "_streams")

    def __init__(self, streams: HostStreams, is_async: bool) -> None:
        self._streams = streams
        self._is_async = is_async
        self.stream = streams.comm_stream

    def keep(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # The host is the caller's stream and does not wait for the send phase: peers that it waits for may come later.
        return tuple(tensor.detach().clone() for tensor in inputs)

    def begin(self) -> None:
        pass

    def pause(self, tensors: Tensors) -> None:
        self._record(tensors)

    def resume(self) -> None:
        pass

    def finish(self, tensors: Tensors) -> RecordedEvent:
        event = self._record(tensors)
        if self._is_async:
            return event
        event.wait()
        return None

    def _record(self, tensors: Tensors) -> HostEvent:
        return self._streams.record([tensor for tensor in tensors if tensor is not None])


def open_phases(streams: Streams, order: PhaseOrder, is_async: bool) -> Phases:
    if isinstance(streams, CudaStreams):
        return _CudaPhases(streams, order, is_async)
    if isinstance(streams, HostStreams):
        return _HostPhases(streams, is_async)
    raise NotImplementedError(streams.kind)
