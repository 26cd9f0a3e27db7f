"""Tensors over memory that torch did not allocate, lent memory above all, and a quicker torch.empty.

Lent tensors are in the memory that peers reach: outputs of dispatch that they write, inputs of combine that they read.
Such a tensor is an ordinary one; when its last view is gone, its memory may be lent again. torch's allocator knows
nothing of it, so `Tensor.record_stream` has no effect. Instead the memory waits for every stream on which the Buffer
has been called, and for the one that is current where the tensor is dropped, on whichever thread that is.
"""

import math
from collections.abc import Sequence
from typing import Callable, Optional

import torch

import deep_ep_cpp
from deep_ep._streams import CudaStreams, Operation, Streams
from deep_ep._torch import current_stream_handle, from_capsule, is_of_torch, outside_of_modes

# What DLPack calls a type: (code, bits). Other types travel as bytes.
_DLPACK_TYPES = {
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
}
_BYTES = _DLPACK_TYPES[torch.uint8]

# More rows than a guess has, to be tried in turn: one in so many of them, and some.
SPARE_SHARES = 4, 16
LEAST_SPARE_ROWS = 64

Spec = tuple[tuple[int, ...], torch.dtype]  # of a tensor to be made

deep_ep_cpp.use_torch(current_stream_handle, from_capsule)


def view_memory(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """`num_bytes` from `address` on as uint8; whoever owns the memory must outlive the tensor."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    index = device.index if device.type == "cuda" else -1
    return from_capsule(deep_ep_cpp.make_tensor(address, num_bytes, index))


class EmptyTensors(dict[torch.dtype, Callable[..., torch.Tensor]]):
    """`empty[dtype](n, m)` is torch.empty(n, m, dtype=dtype, device=...) on one device.

    torch takes both from an example, and has less to read: 0.3 of the 2.1 us that an output costs the host.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    @outside_of_modes
    def __missing__(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        make: Callable[..., torch.Tensor] = torch.empty(0, dtype=dtype, device=self.device).new_empty
        self[dtype] = make
        return make


def num_bytes_of(spec: Spec) -> int:
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


class RowForm:
    """What a row is in each of several tensors; worked out once, since a dispatch makes five of them for each call."""

    def __init__(self, specs: Sequence[Optional[Spec]]) -> None:
        """`specs`: of one row in each tensor; None: there is no such tensor."""
        self._specs = specs
        sizes = [num_bytes_of(spec) for spec in specs if spec is not None]
        self.row_bytes = sum(sizes)
        self.can_be_lent = 0 not in sizes
        self.native = deep_ep_cpp.RowForm([spec if spec is None else _as_dlpack(spec) for spec in specs])

    def empty(self, make: EmptyTensors, num_rows: int) -> tuple[Optional[torch.Tensor], ...]:
        return tuple([None if spec is None else make[spec[1]](num_rows, *spec[0]) for spec in self._specs])


def _as_dlpack(spec: Spec) -> tuple[tuple[int, ...], int, int, Optional[torch.dtype]]:
    shape, dtype = spec
    kind = _DLPACK_TYPES.get(dtype)
    if kind is None:
        return (*shape[:-1], (shape[-1] if shape else 1) * dtype.itemsize), *_BYTES, dtype
    return shape, *kind, None


class Lender:
    """The lent memory of one Buffer."""

    def __init__(self, runtime: deep_ep_cpp.Buffer, streams: Streams) -> None:
        self._runtime = runtime
        self._streams = streams
        self.index = streams.index if isinstance(streams, CudaStreams) else -1
        self.num_bytes = runtime.num_lend_bytes
        self.noted: dict[int, bool] = {}  # streams of calls; whether what is lent can be used there
        self._last: Optional[tuple[int, int]] = None  # tokens and received rows of the last fresh dispatch

    def tensors(self, form: RowForm, num_rows: int,
                operation: Operation) -> Optional[tuple[Optional[torch.Tensor], ...]]:
        """Uninitialised tensors for the kernels of a call, or None: there is nothing to lend, or no room now for all.

        Within a capture the memory is the graph's as long as that lives.
        """
        lent = self._take(form, num_rows, operation) if num_rows and form.can_be_lent else None
        return None if lent is None else lent.tensors(num_rows, self.index)

    def reserve(self, form: RowForm, likely_rows: int, operation: Operation) -> Optional[deep_ep_cpp.LentRows]:
        """Memory for the rows that a guess has room for, before anybody knows how many come."""
        if not form.can_be_lent:
            return None
        for spare_share in SPARE_SHARES:
            num_rows = likely_rows + likely_rows // spare_share + LEAST_SPARE_ROWS
            lent = None if num_rows * form.row_bytes > self.num_bytes else self._take(form, num_rows, operation)
            if lent is not None:
                return lent
        return None

    def guess_rows(self, num_tokens: int, num_ranks: int) -> int:
        """About as many rows as a fresh dispatch will receive: as the one before it, or all tokens of equal ranks."""
        if self._last is None:
            return num_tokens * num_ranks
        last_tokens, last_rows = self._last
        return last_rows * num_tokens // last_tokens if num_tokens > last_tokens > 0 else last_rows

    def remember_rows(self, num_tokens: int, num_rows: int) -> None:
        self._last = num_tokens, num_rows

    def _take(self, form: RowForm, num_rows: int, operation: Operation) -> Optional[deep_ep_cpp.LentRows]:
        noted, stream, current = self.noted, operation.stream, operation.current
        if stream not in noted:
            self._note(stream, True)
        if not (noted[current] if current in noted else self._note(current, False)):
            return None
        if operation.is_captured:
            self._streams.wait_for_last()
        # The stream of a captured call's kernels joins the capture later than this.
        return self._runtime.lend(form.native, num_rows, current if operation.is_captured else stream,
                                  operation.is_captured)

    def tensor(self, spec: Spec) -> Optional[torch.Tensor]:
        """The same for the caller, who is not capturing: one tensor, which may be used on the current stream."""
        streams, current = self._streams, 0
        if isinstance(streams, CudaStreams):
            current = current_stream_handle(streams.index)
            self._note(current, False)
            streams.follow_last(current)
        shape, dtype = spec
        lent = self._runtime.lend(RowForm([((), dtype)]).native, math.prod(shape), current, False)
        if isinstance(streams, CudaStreams):
            streams.set_last(current)  # calls come after whatever the current stream has waited for
        return None if lent is None else lent.tensors(lent.num_rows, self.index)[0].view(shape)

    def used_on(self, operation: Operation) -> None:
        """A call is made that may use lent tensors."""
        self._note(operation.current, False)

    def _note(self, stream: int, is_ours: bool) -> bool:
        """False: the stream is not torch's. It may be gone when the memory comes back, and then nobody can ask it."""
        known = self.noted.get(stream)
        if known is not None:
            return known
        streams = self._streams
        can_be_used = True
        if isinstance(streams, CudaStreams):
            is_comm = is_ours and stream == streams.comm
            can_be_used = is_comm or is_of_torch(stream, streams.index)
            if can_be_used:
                self._runtime.note_stream(stream, is_comm)
        self.noted[stream] = can_be_used
        return can_be_used
