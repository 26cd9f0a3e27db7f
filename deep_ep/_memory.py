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


class RowForm:
    """What a row is in each of several tensors; worked out once, since a dispatch makes five of them for each call."""

    def __init__(self, specs: Sequence[Optional[Spec]]) -> None:
        """`specs`: of one row in each tensor; None: there is no such tensor."""
        there = [spec for spec in specs if spec is not None]
        self._are_there = [spec is not None for spec in specs]
        self._specs = there
        self._kinds = [(shape[1:], code, bits)
                       for shape, code, bits in (_as_dlpack(((1, *shape), dtype)) for shape, dtype in there)]
        self._types = [None if dtype in _DLPACK_TYPES else dtype for _, dtype in there]
        self.row_bytes = [num_bytes_of(spec) for spec in there]
        self.can_be_lent = 0 not in self.row_bytes

    def over(self, pieces: deep_ep_cpp.LentPieces, num_rows: int, cuda_index: int) -> list[Optional[torch.Tensor]]:
        """Over the start of lent memory, of which there is a piece for each tensor; not without rows."""
        capsules = pieces.tensors([((num_rows, *shape), code, bits) for shape, code, bits in self._kinds], cuda_index)
        return self._placed([
            from_capsule(capsule) if dtype is None else from_capsule(capsule).view(dtype)
            for capsule, dtype in zip(capsules, self._types)
        ])

    def empty(self, make: EmptyTensors, num_rows: int) -> list[Optional[torch.Tensor]]:
        return self._placed([make[dtype](num_rows, *shape) for shape, dtype in self._specs])

    def addresses(self, pieces: deep_ep_cpp.LentPieces) -> list[int]:
        """0: there is no such tensor."""
        found = iter(pieces.addresses())
        return [next(found) if is_there else 0 for is_there in self._are_there]

    def _placed(self, tensors: list[torch.Tensor]) -> list[Optional[torch.Tensor]]:
        rest = iter(tensors)
        return [next(rest) if is_there else None for is_there in self._are_there]


class Reserved:
    """Lent memory for the rows that a guess has room for, before anybody knows how many come."""

    __slots__ = ("_cuda_index", "_form", "_pieces", "addresses", "num_rows")

    def __init__(self, pieces: deep_ep_cpp.LentPieces, form: RowForm, num_rows: int, cuda_index: int) -> None:
        self._pieces = pieces
        self._form = form
        self._cuda_index = cuda_index
        self.addresses = form.addresses(pieces)
        self.num_rows = num_rows  # that there is room for

    def tensors(self, num_rows: int) -> list[Optional[torch.Tensor]]:
        """The first rows, one at least; the memory of the others is free at once, since nobody has used it."""
        return self._form.over(self._pieces, num_rows, self._cuda_index)


class Lender:
    """The lent memory of one Buffer."""

    def __init__(self, runtime: deep_ep_cpp.Buffer, streams: Streams) -> None:
        self._runtime = runtime
        self._streams = streams
        self._index = streams.index if isinstance(streams, CudaStreams) else -1
        self.num_bytes = runtime.num_lend_bytes
        self._begin = runtime.lend_address
        self.noted: dict[int, bool] = {}  # streams of calls; whether what is lent can be used there
        self._last: Optional[tuple[int, int]] = None  # tokens and received rows of the last fresh dispatch

    def tensors(self, form: RowForm, num_rows: int, operation: Operation) -> Optional[list[Optional[torch.Tensor]]]:
        """Uninitialised tensors for the kernels of a call, or None: there is nothing to lend, or no room now for all.

        Within a capture the memory is the graph's as long as that lives.
        """
        if not num_rows or not form.can_be_lent:
            return None
        lent = self._take([num_rows * size for size in form.row_bytes], operation)
        return None if lent is None else form.over(lent, num_rows, self._index)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor begins in the memory that can be lent."""
        return self._begin <= tensor.data_ptr() < self._begin + self.num_bytes

    def reserve(self, form: RowForm, likely_rows: int, operation: Operation) -> Optional[Reserved]:
        """The same for a number of rows that is not known. What is not needed goes back."""
        if not form.can_be_lent:
            return None
        for spare_share in SPARE_SHARES:
            num_rows = likely_rows + likely_rows // spare_share + LEAST_SPARE_ROWS
            sizes = [num_rows * size for size in form.row_bytes]
            lent = None if sum(sizes) > self.num_bytes else self._take(sizes, operation)
            if lent is not None:
                return Reserved(lent, form, num_rows, self._index)
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
        noted, stream, current = self.noted, operation.stream, operation.current
        if stream not in noted:
            self._note(stream, True)
        if not (noted[current] if current in noted else self._note(current, False)):
            return None
        if operation.is_captured:
            self._streams.wait_for_last()
        # The stream of a captured call's kernels joins the capture later than this.
        return self._runtime.lend(sizes, current if operation.is_captured else stream, operation.is_captured)

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
        if lent is None:
            return None
        tensor = from_capsule(lent.tensors([_as_dlpack(spec)], self._index)[0])
        return tensor if spec[1] in _DLPACK_TYPES else tensor.view(spec[1])

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
