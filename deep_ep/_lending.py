"""Tensors in the memory that peers reach: outputs of dispatch that they write in place, inputs of combine that they read.

Such a tensor is an ordinary one; when its last view is gone, its memory may be lent again. torch's allocator knows
nothing of it: `Tensor.record_stream` has no effect. Whoever uses it on a stream other than the one that is current when
it is dropped must have joined the two before.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch

import deep_ep_cpp
from deep_ep._memory import make_tensor
from deep_ep._streams import CudaStreams, Streams, is_capturing

ALIGNMENT_BYTES = 128


class Spec(NamedTuple):
    """A tensor to be made."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Lent:
    """Owner of a piece of lent memory, held by every tensor over it."""

    def __init__(self, lender: "Lender", memory: deep_ep_cpp.LentMemory) -> None:
        self._lender = lender
        self.memory: Optional[deep_ep_cpp.LentMemory] = memory

    def __del__(self) -> None:
        memory, self.memory = self.memory, None
        if memory is not None:
            self._lender._take_back(memory)


class Lender:
    """The lent memory of one Buffer."""

    def __init__(self, runtime: deep_ep_cpp.Buffer, streams: Streams, num_bytes: int) -> None:
        self._runtime = runtime
        self._streams = streams
        self.num_bytes = num_bytes
        # What was queued on memory that has come back, until it is done; and memory that came back during a capture.
        self._pending: list[torch.cuda.Event] = []
        self._captured: list[deep_ep_cpp.LentMemory] = []

    def tensors(self, specs: Sequence[Spec]) -> Optional[list[torch.Tensor]]:
        """Uninitialised tensors that share one piece of memory, or None: there is no room now.

        None as well while a CUDA graph is captured: its replays would write to memory that may be lent to others.
        The first work on them must come after `settle`.
        """
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += -(-spec.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if end == 0 or end > self.num_bytes or is_capturing():
            return None
        memory = self._runtime.lend(end)
        if memory is None:
            return None
        owner, device = _Lent(self, memory), self._streams.device
        return [
            make_tensor(memory.address + offset, spec.shape, spec.dtype, device, owner)
            for spec, offset in zip(specs, offsets)
        ]

    def settle(self, stream: Optional[torch.cuda.Stream]) -> None:
        """`stream` (None: the host's timeline) waits for what was queued on memory that has come back."""
        if stream is None or not (self._pending or self._captured):
            return
        if self._captured:
            self._captured.clear()
            self._pending.extend(self._marks())
        self._pending = [event for event in self._pending if not event.query()]
        for event in self._pending:
            stream.wait_event(event)

    def settle_on_current_stream(self) -> None:
        is_cuda = isinstance(self._streams, CudaStreams)
        self.settle(torch.cuda.current_stream(self._streams.device) if is_cuda else None)

    def _take_back(self, memory: deep_ep_cpp.LentMemory) -> None:
        if isinstance(self._streams, CudaStreams):
            if is_capturing():
                self._captured.append(memory)
                return
            self._pending.extend(self._marks())
        del memory

    def _marks(self) -> list[torch.cuda.Event]:
        """Events after all work so far on the current stream and on the comm stream."""
        assert isinstance(self._streams, CudaStreams)
        marks = []
        for stream in (torch.cuda.current_stream(self._streams.device), self._streams.comm_stream):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            marks.append(event)
        return marks
