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

Spec = tuple[tuple[int, ...], torch.dtype]  # of a tensor to be made; bare, because a dispatch makes five of them
Specs = Sequence[Optional[Spec]]  # None: no such tensor

deep_ep_cpp.set_current_stream_function(current_stream_handle)


def view_memory(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """`num_bytes` from `address` on as uint8; whoever owns the memory must outlive the tensor."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    index = device.index if device.type == "cuda" else -1
    return from_capsule(deep_ep_cpp.make_tensor(address, [num_bytes], _BYTES, index, None))


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


def _as_dlpack(spec: Spec) -> tuple[tuple[int, ...], int, int]:
    shape, dtype = spec
    kind = _DLPACK_TYPES.get(dtype)
    return ((*shape[:-1], shape[-1] * dtype.itemsize), *_BYTES) if kind is None else (shape, *kind)


class Reserved:
    """Lent memory for the rows that a guess has room for, before anybody knows how many come."""

    __slots__ = ("_lender", "_pieces", "_row", "addresses", "num_rows")

    def __init__(self, lender: "Lender", pieces: deep_ep_cpp.LentPieces, row: Specs, num_rows: int) -> None:
        addresses = iter(pieces.addresses())
        self._lender = lender
        self._row = row
        self._pieces = pieces
        self.addresses = [next(addresses) if spec else 0 for spec in row]
        self.num_rows = num_rows  # that there is room for

    def tensors(self, num_rows: int) -> list[Optional[torch.Tensor]]:
        """The first rows; the memory of the others is free at once, since nobody has used it."""
        return self._lender.over(self._pieces, [spec and ((num_rows, *spec[0][1:]), spec[1]) for spec in self._row])


class Lender:
    """The lent memory of one Buffer."""

    def __init__(self, runtime: deep_ep_cpp.Buffer, streams: Streams) -> None:
        self._runtime = runtime
        self._streams = streams
        self._index = streams.index if isinstance(streams, CudaStreams) else -1
        self.num_bytes = runtime.num_lend_bytes
        self._noted: dict[int, bool] = {}  # streams of calls; whether what is lent can be used there
        self._last: Optional[tuple[int, int]] = None  # tokens and received rows of the last fresh dispatch

    def tensors(self, specs: Specs, operation: Operation) -> Optional[list[Optional[torch.Tensor]]]:
        """Uninitialised tensors for the kernels of a call, or None: there is no room now for all of them.

        Within a capture the memory is the graph's as long as that lives.
        """
        sizes = [num_bytes_of(spec) for spec in specs if spec]
        if 0 in sizes:
            sizes = [size for size in sizes if size]
        lent = self._take(sizes, operation) if sizes else None
        return None if lent is None else self.over(lent, specs)

    def over(self, pieces: deep_ep_cpp.LentPieces, specs: Specs) -> list[Optional[torch.Tensor]]:
        """Tensors over the start of lent memory: a piece for each that has elements, or else all of them have none."""
        lent = [spec for spec in specs if spec and 0 not in spec[0]]
        made = iter(pieces.tensors([_as_dlpack(spec) for spec in lent], self._index) if lent else ())
        return [spec and self._tensor(next(made) if 0 not in spec[0] else None, spec) for spec in specs]

    def reserve(self, row: Specs, likely_rows: int, operation: Operation) -> Optional[Reserved]:
        """The same for a number of rows that is not known; `row` has one of each. What is not needed goes back."""
        row_bytes = [num_bytes_of(spec) for spec in row if spec]
        if 0 in row_bytes:
            return None
        for spare_share in SPARE_SHARES:
            num_rows = likely_rows + likely_rows // spare_share + LEAST_SPARE_ROWS
            sizes = [num_rows * size for size in row_bytes]
            lent = None if sum(sizes) > self.num_bytes else self._take(sizes, operation)
            if lent is not None:
                return Reserved(self, lent, row, num_rows)
        return None

    def guess_rows(self, num_tokens: int, num_ranks: int) -> int:
        """About as many rows as a fresh dispatch will receive: as the one before it, or all tokens of equal ranks."""
        if self._last is None:
            return num_tokens * num_ranks
        last_tokens, last_rows = self._last
        return last_rows * num_tokens // last_tokens if num_tokens > last_tokens > 0 else last_rows

    def remember_rows(self, num_tokens: int, num_rows: int) -> None:
        self._last = num_tokens, num_rows

    def _take(self, sizes: list[int], operation: Operation) -> Optional[deep_ep_cpp.LentPieces]:
        self._note(operation.stream, True)
        if not self._note(operation.current, False):
            return None
        if operation.is_captured:
            self._streams.wait_for_last()
        # The stream of a captured call's kernels joins the capture later than this.
        stream = operation.current if operation.is_captured else operation.stream
        return self._runtime.lend(sizes, stream, operation.is_captured)

    def tensor(self, spec: Spec) -> Optional[torch.Tensor]:
        """The same for the caller, who is not capturing: one tensor, which may be used on the current stream."""
        streams, current = self._streams, 0
        if isinstance(streams, CudaStreams):
            current = current_stream_handle(streams.index)
            self._note(current, False)
            streams.follow_last(current)
        lent = self._runtime.lend([num_bytes_of(spec)], current, False)
        if isinstance(streams, CudaStreams):
            streams.set_last(current)  # calls come after whatever the current stream has waited for
        return None if lent is None else self.over(lent, [spec])[0]

    def used_on(self, operation: Operation) -> None:
        """A call is made that may use lent tensors."""
        self._note(operation.current, False)

    def _tensor(self, capsule: Optional[object], spec: Spec) -> torch.Tensor:
        shape, dtype = spec
        if capsule is None:
            return torch.empty(shape, dtype=dtype, device=self._streams.device)
        tensor = from_capsule(capsule)
        return tensor if dtype in _DLPACK_TYPES else tensor.view(dtype)

    def _note(self, stream: int, is_ours: bool) -> bool:
        """False: the stream is not torch's. It may be gone when the memory comes back, and then nobody can ask it."""
        known = self._noted.get(stream)
        if known is not None:
            return known
        streams = self._streams
        can_be_used = True
        if isinstance(streams, CudaStreams):
            is_comm = is_ours and stream == streams.comm
            can_be_used = is_comm or is_of_torch(stream, streams.index)
            if can_be_used:
                self._runtime.note_stream(stream, is_comm)
        self._noted[stream] = can_be_used
        return can_be_used
