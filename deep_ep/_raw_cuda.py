"""Streams and events of GPUs as plain numbers: torch's objects for them take longer to make than a launch takes.

Here, in _opaque.py and in _memory.py are torch's functions that have no public name, and nowhere else. Where a version
of torch lacks one of these, the public and slower way is taken.
"""

from typing import Callable

import torch

import deep_ep_cpp


class PooledEvent:
    """A point on a stream of a GPU. Its native event goes back to the pool when nobody holds this object any more.

    By then streams may still have to wait for it. That is no harm: a wait is for what the event stood for when the wait
    was queued, whatever is recorded in it later.
    """

    __slots__ = ("_free", "cuda_event")

    def __init__(self, cuda_event: int, free: list[int]) -> None:
        self.cuda_event = cuda_event
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.cuda_event)


class EventPool:
    """Native events of one GPU, made when first needed and then kept."""

    def __init__(self, native: deep_ep_cpp.Device) -> None:
        self._native = native
        self._free: list[int] = []

    def record(self, stream: int) -> PooledEvent:
        try:
            cuda_event = self._free.pop()
        except IndexError:
            cuda_event = self._native.create_event()
        event = PooledEvent(cuda_event, self._free)
        self._native.record_event(cuda_event, stream)
        return event


def current_stream_handle(index: int) -> int:
    """The stream that is current in this thread on GPU `index`."""
    try:
        return int(torch._C._cuda_getCurrentRawStream(index))
    except AttributeError:
        return int(torch.cuda.current_stream(index).cuda_stream)


StreamId = tuple[int, int, int]  # what torch calls stream_id, device_index and device_type


def current_stream_id(index: int) -> StreamId:
    """The same stream, as torch names it."""
    try:
        return tuple(torch._C._cuda_getCurrentStream(index))
    except AttributeError:
        stream = torch.cuda.current_stream(index)
        return stream.stream_id, stream.device_index, stream.device_type


def is_of_torch(stream: int, index: int) -> bool:
    """Whether the stream that is current on GPU `index`, whose handle this is, is one that torch never destroys.

    torch knows others, such as those of `torch.cuda.ExternalStream`, by their handles.
    """
    return stream == 0 or current_stream_id(index)[0] != stream


# torch.from_dlpack for a capsule, less the checks of other objects, which take as long.
from_capsule: Callable[[object], torch.Tensor] = getattr(torch._C, "_from_dlpack", torch.utils.dlpack.from_dlpack)


class CurrentStream:
    """`with torch.cuda.stream(...)` for a stream of the current GPU, without making objects of torch."""

    __slots__ = ("_id", "_previous")

    def __init__(self, stream_id: StreamId) -> None:
        self._id = stream_id
        self._previous = stream_id

    def __enter__(self) -> None:
        self._previous = current_stream_id(self._id[1])
        self._set(self._id)

    def __exit__(self, *_: object) -> None:
        self._set(self._previous)

    @staticmethod
    def _set(stream_id: StreamId) -> None:
        number, index, kind = stream_id
        try:
            torch._C._cuda_setStream(stream_id=number, device_index=index, device_type=kind)
        except AttributeError:
            stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                stream_id=number, device_index=index, device_type=kind)
            torch.cuda.set_stream(stream)
