"""What this package takes from torch beneath its public names, here and nowhere else.

Where a version of torch lacks one of these, the public and slower way is taken. Streams of GPUs are plain numbers:
torch's objects for them take longer to make than a launch takes.
"""

import functools
from types import FunctionType
from typing import Any, Callable, TypeVar

import torch
from torch._C._dynamo import eval_frame
from torch.utils._python_dispatch import _disable_current_modes

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
