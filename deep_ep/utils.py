"""Events, what this package takes from torch beneath its public names, and a check of the machine for callers.

Nothing else in this package takes such names of torch. Where a version of torch lacks one, the public and slower way is
taken. Streams of GPUs are plain numbers: torch's objects for them take longer to make than a launch takes.
"""

import contextlib
import functools
import os
from types import FunctionType, TracebackType
from typing import Any, Callable, ClassVar, Optional, TypeVar, Union

import torch
import torch.distributed as dist
from torch._C._dynamo import eval_frame
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import Self

import deep_ep_cpp
from deep_ep._env import device_choice, native_device, visible_devices
from deep_ep_cpp import Error

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]

T = TypeVar("T")
C = TypeVar("C", bound=type)
REASON = "deep_ep talks to other processes"


def stream_handle_by_public_names(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# The stream that is current in this thread on GPU `index`.
current_stream_handle: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream",
                                                      stream_handle_by_public_names)

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

# torch.cuda.current_device(), less the look whether torch has CUDA ready.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def is_capturing() -> bool:
    """Whether the caller's stream records a CUDA graph."""
    return device_choice()[0] == "cuda" and torch.cuda.is_current_stream_capturing()


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


# Calls that torch.compile makes, and does not look into.
#
# What stands below a call here are addresses, events and other processes. Dynamo would trace into it, break the graph
# at each of them and compile what is left once for every shape, until it gives up at its recompile limit. It takes an
# opaque function as one graph break: called as in eager code, with nothing in it compiled.
#
# `torch.compiler.disable` would say so too, but imports torch._dynamo, which takes seconds, and costs each call a
# microsecond. These are the marks that it makes, and the functions of torch that make them have no public name.


def opaque(cls: C) -> C:
    """Marks the methods that the class defines, but for finalizers."""
    for name, member in list(vars(cls).items()):
        function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        if isinstance(function, FunctionType) and name != "__del__":
            marked = _mark(function)
            if marked is not function:
                setattr(cls, name, type(member)(marked) if function is not member else marked)
    return cls


def _mark(function: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        # Neither the function's own frame nor those of what it calls.
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    elif hasattr(eval_frame, "skip_code"):
        function = _without_callback(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    return function


def _without_callback(function: Callable[..., Any]) -> Callable[..., Any]:
    """For torch before 2.7, where a frame can be skipped, but not what it calls: costs a call half a microsecond."""
    set_eval_frame = eval_frame.set_eval_frame

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        callback = set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_eval_frame(callback)

    eval_frame.skip_code(call.__code__)  # type: ignore[attr-defined,unused-ignore]
    return call


def outside_of_modes(function: Callable[..., T]) -> Callable[..., T]:
    """Runs `function` as if the caller had entered no mode of torch: inference, FakeTensorMode, a default device.

    What is made there and kept is an ordinary tensor, whenever it is used.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> T:
        with torch.inference_mode(False), _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run


# What inductor's generated code allocates and views tensors with: torch.empty_strided and torch.as_strided, less the
# dispatcher, which takes more than the rest. They have no public names, so what they do is tried.
_guards = getattr(torch._C._dynamo, "guards", None)
_SAMPLE = (2, 3), (1, 2)  # shape and strides


def _makes(wanted: torch.Tensor, function: Callable[..., torch.Tensor], *args: Any) -> bool:
    try:
        found = function(*args)
        return all(getattr(found, name) == getattr(wanted, name)
                   for name in ("shape", "dtype", "device")) and found.stride() == wanted.stride()
    except (AttributeError, RuntimeError, TypeError, ValueError):  # whatever another torch makes of it
        return False


@functools.cache
@outside_of_modes
def find_reinterpret() -> Callable[..., torch.Tensor]:
    """(tensor, shape, strides, offset): a view."""
    found: Callable[..., torch.Tensor] = getattr(_guards, "_reinterpret_tensor", torch.as_strided)
    args = torch.empty(7), *_SAMPLE, 1
    return found if _makes(torch.as_strided(*args), found, *args) else torch.as_strided


@functools.cache
@outside_of_modes
def find_empty_strided(device: torch.device) -> Optional[Callable[..., torch.Tensor]]:
    """(shape, strides, dtype): on the current device, if it is of this kind. None: this torch has no such function."""
    found: Optional[Callable[..., torch.Tensor]] = getattr(_guards, f"_empty_strided_{device.type}", None)
    if found is None:
        return None
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        wanted = torch.empty_strided(*_SAMPLE, dtype=torch.int32, device=device)
        return found if _makes(wanted, found, *_SAMPLE, torch.int32) else None


# Events.


class HostEvent:
    """A point on the comm stream of a CPU Buffer; keeps the tensors that the work before it uses alive.

    The native event is used again when it is known to be complete, which its stream finds out if nobody else does. Not
    when this object goes: the garbage collector calls the finalizers of a cycle in any order, and that of a Buffer in
    it asks its events.
    """

    _free: ClassVar[list[int]] = []

    def __init__(self, device: deep_ep_cpp.Device, stream: int, tensors: tuple[torch.Tensor, ...],
                 check: Callable[[], None]) -> None:
        self._device = device
        self._tensors = tensors
        self._check = check
        self._event: Optional[int] = self._free.pop() if self._free else device.create_event()
        device.record_event(self._event, stream)

    def is_complete(self) -> bool:
        if self._event is not None and not self._device.query_event(self._event):
            return False
        self._forget()
        return True

    def wait(self) -> None:
        """Blocks the host, then raises what the kernels before this event reported."""
        if self._event is not None:
            self._device.synchronize_event(self._event)
            self._forget()
        self._check()

    def hold_back(self, stream: int) -> None:
        """Later work on `stream` waits for this event."""
        if self._event is not None:
            self._device.stream_wait_event(stream, self._event)

    def _forget(self) -> None:
        event, self._event, self._tensors = self._event, None, ()
        if event is not None:
            self._free.append(event)


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


@functools.cache
def event_pool(index: int) -> EventPool:
    return EventPool(native_device(index))


def _start_afresh_in_child() -> None:
    """The CPU's device ends with the process: its thread does not exist in a forked child, which makes its own."""
    if device_choice.cache_info().currsize and device_choice()[0] == "cpu":
        native_device.cache_clear()
        HostEvent._free.clear()


os.register_at_fork(after_in_child=_start_afresh_in_child)

# What an EventHandle stands for. None: a point on the host's own timeline, passed by the time anybody can ask.
RecordedEvent = Union[PooledEvent, HostEvent, None]


def record_on_current_stream() -> RecordedEvent:
    if device_choice()[0] == "cpu":
        return None
    index = torch.cuda.current_device()
    return event_pool(index).record(current_stream_handle(index))


def wait_on_current_stream(event: RecordedEvent) -> None:
    if isinstance(event, HostEvent):
        event.wait()
    elif event is not None:
        # The event may be another GPU's, but the handle of a default stream means that of the current one.
        index = torch.cuda.current_device()
        native_device(index).stream_wait_event(current_stream_handle(index), event.cuda_event)


@opaque
class EventHandle:
    """A point in the work of the current stream.

    On CUDA it is recorded on torch's current stream. On the CPU the host is the current stream, so a fresh handle is
    complete at once; a handle that an asynchronous call returned is complete when the kernels of that call are.
    """

    __slots__ = ("__weakref__", "_recorded")

    def __init__(self) -> None:
        self._recorded: RecordedEvent = record_on_current_stream()

    @classmethod
    def _wrap(cls, recorded: RecordedEvent) -> "EventHandle":
        handle = cls.__new__(cls)
        handle._recorded = recorded
        return handle

    def current_stream_wait(self) -> None:
        """Later work on the current stream waits for this point (on the CPU: blocks).

        Raises deep_ep.TimeoutError on the CPU when the kernels before this point gave up on a peer.
        """
        wait_on_current_stream(self._recorded)


@opaque
class EventOverlap:
    """An event and, optionally, tensors that must outlive it. Also a context manager:

        with event:
            ...  # work that overlaps with communication
        # here the current stream waits for the event

    Attributes (both may be assigned): `event`, an EventHandle or None; `extra_tensors`, a tuple or None.
    """

    def __init__(self,
                 event: Optional[EventHandle] = None,
                 extra_tensors: Optional[tuple[torch.Tensor, ...]] = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Later work on the current stream waits for the event (on the CPU: blocks).

        Raises deep_ep.Error when there is no event: a synchronous call returns EventOverlap(None).
        """
        if self.event is None:
            raise Error("EventOverlap.current_stream_wait: there is no event (the call that returned this was "
                        "synchronous, so its results are ready)")
        self.event.current_stream_wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: Optional[type[BaseException]], exc: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        if self.event is not None:
            self.event.current_stream_wait()


def overlap_of(recorded: RecordedEvent, tensors: tuple[Optional[torch.Tensor], ...] = ()) -> EventOverlap:
    """What a call returns whose kernels are complete at `recorded`, until when `tensors` are to live."""
    if recorded is None:
        return EventOverlap(None)
    extra_tensors = tuple([tensor for tensor in tensors if tensor is not None]) if tensors else ()
    return EventOverlap(EventHandle._wrap(recorded), extra_tensors or None)


def check_nvlink_connections(group: dist.ProcessGroup) -> None:
    """Raises deep_ep.Error when the GPUs of `group` are PCIe cards that no NVLink bridge joins.

    Does nothing on the CPU and on GPUs whose name does not contain 'PCIE'. Collective. Needs `pynvml` on PCIe cards.
    """
    if device_choice()[0] == "cpu" or "PCIE" not in torch.cuda.get_device_name().upper():
        return
    if group.size() > 2:
        raise Error(f"check_nvlink_connections: a bridge joins two PCIe GPUs, but the group has {group.size()} ranks")
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise Error("check_nvlink_connections needs pynvml (pip install nvidia-ml-py)") from error
    physical: list[Any] = [None] * group.size()
    dist.all_gather_object(physical, _physical_gpu(torch.cuda.current_device()), group)
    pynvml.nvmlInit()
    try:
        handles = [_nvml_handle(pynvml, device) for device in physical]
        for i, first in enumerate(handles):
            for j in range(i + 1, len(handles)):
                status = pynvml.nvmlDeviceGetP2PStatus(first, handles[j], pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
                if status != pynvml.NVML_P2P_STATUS_OK:
                    raise Error(f"check_nvlink_connections: GPUs {physical[i]} and {physical[j]} (ranks {i} and {j}) "
                                "have no NVLink between them")
    finally:
        pynvml.nvmlShutdown()


def _physical_gpu(index: int) -> str:
    visible = visible_devices()
    return visible[index] if visible else str(index)


def _nvml_handle(pynvml: Any, device: str) -> Any:
    if device.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(device))
    return pynvml.nvmlDeviceGetHandleByUUID(device)
