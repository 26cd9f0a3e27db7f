"""Calls that torch.compile makes, and does not look into.

What stands below a call here are addresses, events and other processes. Dynamo would trace into it, break the graph at
each of them and compile what is left once for every shape, until it gives up at its recompile limit. It takes an opaque
function as one graph break: called as in eager code, with nothing in it compiled.

`torch.compiler.disable` would say so too, but imports torch._dynamo, which takes seconds, and costs each call a
microsecond. These are the marks that it makes, and the functions of torch that make them have no public name.
"""

import functools
from types import FunctionType
from typing import Any, Callable, TypeVar

from torch._C._dynamo import eval_frame

T = TypeVar("T", bound=type)
REASON = "deep_ep talks to other processes"


def opaque(cls: T) -> T:
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
