"""Tensors in the memory that peers reach: outputs of dispatch that they write, inputs of combine that they read.

Such a tensor is an ordinary one; when its last view is gone, its memory may be lent again. torch's allocator knows
nothing of it: `Tensor.record_stream` has no effect. Whoever uses it on a stream other than the one that is current when
it is dropped must have joined the two before.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch

import deep_ep_cpp
from deep_ep._checks import BUFFER_ALIGNMENT_BYTES
from deep_ep._memory import make_tensor
from deep_ep._raw_cuda import PooledEvent, current_stream_handle
from deep_ep._streams import CudaStreams, Streams, is_capturing


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
        self._pending: list[PooledEvent] = []
        self._captured: list[deep_ep_cpp.LentMemory] = []

    def tensors(self, specs: Sequence[Spec]) -> Optional[list[torch.Tensor]]:
        """Uninitialised tensors that share one piece of memory, or None: there is no room now.

        None as well while a CUDA graph is captured: its replays would write to memory that may be lent to others.
        The first work on them must come after `settle`.
        """
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += -(-spec.num_bytes // BUFFER_ALIGNMENT_BYTES) * BUFFER_ALIGNMENT_BYTES
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

    def settle(self, stream: int) -> None:
        """Later work on `stream` comes after what was queued on memory that has come back."""
        if not isinstance(self._streams, CudaStreams) or not (self._pending or self._captured):
            return
        if self._captured:
            self._captured.clear()
            self._mark(self._streams)
        self._pending = [event for event in self._pending if not self._streams.native.query_event(event.cuda_event)]
        for event in self._pending:
            self._streams.follow(stream, event)

    def settle_on_current_stream(self) -> None:
        """The same for the caller's stream, also after the kernels of earlier calls."""
        if isinstance(self._streams, CudaStreams):
            current = current_stream_handle(self._streams.index)
            self._streams.follow_last(current)
            self.settle(current)

    def _take_back(self, memory: deep_ep_cpp.LentMemory) -> None:
        if isinstance(self._streams, CudaStreams):
            if is_capturing():
                self._captured.append(memory)
                return
            self._mark(self._streams)
        del memory  # the kernels of calls come one after the other: only the caller's own work needs a mark

    def _mark(self, streams: CudaStreams) -> None:
        """Remembers all work so far on the current stream."""
        self._pending.append(streams.events.record(current_stream_handle(streams.index)))
