"""Tensors: checks of those that callers give, and the memory of those that calls make.

Each error of a check names the argument, what was expected and what was got. TypeError: not the kind of object, or not
the dtype, that is expected. ValueError: a wrong shape, device, layout, range or combination.

Every tensor that a caller gives goes through `check_tensor` or `check_matrix` before its address is taken. Several are
checked in every call, and reading an attribute of a tensor takes about 0.1 us. So a check asks first, natively, whether
all is well, and looks for what is wrong only when it is not.
"""

import math
import numbers
import weakref
from collections.abc import Sequence
from typing import Any, Callable, Generic, Optional, TypeVar, Union

import torch

import deep_ep_cpp
from deep_ep._streams import CudaStreams, Operation, Streams
from deep_ep.utils import (
    current_device,
    current_stream_handle,
    find_empty_strided,
    from_capsule,
    is_of_torch,
    outside_of_modes,
)
from deep_ep_cpp import TensorMaker, has_tensor_exchange, matrix_shape, shape_in_memory, use_tensor_class

T = TypeVar("T")
Reference = weakref.ref[Any]
Payload = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]  # rows, or rows and their scales

ROW_ALIGNMENT_BYTES = 16
BUFFER_ALIGNMENT_BYTES = 128
# What `dtypes` of a check may be.
INT32 = (torch.int32, )
INT64 = (torch.int64, )
BFLOAT16 = (torch.bfloat16, )
FLOAT32 = (torch.float32, )
INDEX_DTYPES = (torch.int64, torch.int32)
MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1  # what the native code takes counts and bytes as
MAX_LOCAL_EXPERTS = 1024  # of the high-throughput mode; csrc/layout/heap.h


def _name_dtypes(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).replace("torch.", "") for dtype in dtypes)


def _describe(tensor: torch.Tensor) -> str:
    kind = "" if tensor.is_contiguous() else f", strides {list(tensor.stride())}"
    return f"{str(tensor.dtype).replace('torch.', '')} {list(tensor.shape)} on {tensor.device}{kind}"


def _has_shape(got: Sequence[int], wanted: Sequence[Optional[int]]) -> bool:
    if len(got) != len(wanted):
        return False
    # A plain loop, because this runs several times in every call, and all() would make a generator.
    for size, extent in zip(got, wanted):  # noqa: SIM110
        if size != extent and extent is not None:
            return False
    return True


def _is_plain_class(value: Any) -> bool:
    """Whether an operation on this tensor reads the memory that the tensor names, as kernels here do."""
    # Classes that mean something else (DTensor, FakeTensor, other wrappers) have a __torch_dispatch__ of their own.
    return isinstance(value, torch.Tensor) and type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


use_tensor_class(torch.Tensor, _is_plain_class)


def check_tensor(name: str,
                 value: Any,
                 device: torch.device,
                 shape: Sequence[Optional[int]],
                 dtypes: tuple[torch.dtype, ...] = (),
                 is_contiguous: bool = True) -> torch.Tensor:
    """A tensor of `shape` (None: any extent), of one of `dtypes` (empty: any), in memory on `device`."""
    got = shape_in_memory(value, device, dtypes, is_contiguous)
    if got is not None and (got == shape or _has_shape(got, shape)):
        checked: torch.Tensor = value
        return checked
    raise _find_fault(name, value, device, shape, dtypes)


def check_matrix(name: str,
                 value: Any,
                 device: torch.device,
                 dtypes: tuple[torch.dtype, ...] = (),
                 num_rows: Optional[int] = None) -> torch.Size:
    """The shape of a contiguous 2-D tensor of one of `dtypes` (empty: any), in memory on `device`."""
    shape: Optional[torch.Size] = matrix_shape(value, device, dtypes, num_rows)
    if shape is None:
        raise _find_fault(name, value, device, (num_rows, None), dtypes)
    return shape


def _find_fault(name: str, value: Any, device: torch.device, shape: Sequence[Optional[int]],
                dtypes: tuple[torch.dtype, ...]) -> Exception:
    if not isinstance(value, torch.Tensor):
        return TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    fault = _find_fault_of_kind(name, value)
    if fault is not None:
        return fault
    if dtypes and value.dtype not in dtypes:
        return TypeError(f"{name} must have dtype {_name_dtypes(dtypes)}, got {_describe(value)}")
    if not _has_shape(value.shape, shape):
        wanted = ", ".join("*" if extent is None else str(extent) for extent in shape)
        return ValueError(f"{name} must have shape [{wanted}], got {_describe(value)}")
    if value.device != device:
        return ValueError(f"{name} must be on {device}, the device of this Buffer, got {_describe(value)}")
    if value.data_ptr() == 0 and value.numel() > 0:
        return ValueError(f"{name} must have memory of its own, got {_describe(value)} without any: its storage was "
                          "freed, or it stands for another tensor")
    return ValueError(f"{name} must be contiguous (row-major), got {_describe(value)}")


def _find_fault_of_kind(name: str, value: torch.Tensor) -> Optional[Exception]:
    """Why the elements do not stand in plain memory. Asks for nothing that such a tensor refuses to tell."""
    if not _is_plain_class(value):
        return TypeError(f"{name} must be a plain torch.Tensor with memory of its own, got {type(value).__name__}; "
                         "pass the local tensor behind it (of a DTensor: to_local())")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        return TypeError(f"{name} must be a dense tensor, got {kind}; pass {name}.to_dense() or its parts")
    if value.is_quantized:
        return TypeError(f"{name} must not be quantized by torch, whose scale would stay behind, got {value.dtype}")
    for is_lazy, state, remedy in ((value.is_conj(), "conjugated", "resolve_conj"), (value.is_neg(), "negated",
                                                                                     "resolve_neg")):
        if is_lazy:
            return ValueError(f"{name} must hold its values, got a view that is lazily {state}; pass {name}.{remedy}()")
    try:
        value.data_ptr()
    except RuntimeError:
        return TypeError(f"{name} must be a plain torch.Tensor with memory of its own, got one that torch.func (vmap, "
                         "grad, functionalize) wraps: make the call outside of the transformed function")
    return None


def check_int(name: str, value: Any, minimum: int, multiple_of: int = 1, maximum: int = MAX_INT32) -> int:
    if type(value) is int and minimum <= value <= maximum and value % multiple_of == 0:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value.__index__())
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    if number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {number}")
    if number % multiple_of:
        raise ValueError(f"{name} must be a multiple of {multiple_of}, got {number}")
    return number


def check_positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not number > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")
    return number


def check_rows(name: str,
               value: Any,
               device: torch.device,
               dtypes: tuple[torch.dtype, ...] = (),
               num_rows: Optional[int] = None) -> torch.Size:
    """The shape of token rows: 2-D, contiguous, with whole 16-byte units in a row."""
    shape = check_matrix(name, value, device, dtypes, num_rows)
    row_bytes = shape[1] * value.element_size()
    if row_bytes == 0 or row_bytes % ROW_ALIGNMENT_BYTES:
        raise ValueError(f"{name} must have rows of a positive multiple of {ROW_ALIGNMENT_BYTES} bytes, got "
                         f"{row_bytes} bytes ({_describe(value)})")
    if value.data_ptr() % ROW_ALIGNMENT_BYTES:
        check_alignment(name, value)
    return shape


def check_alignment(name: str, rows: torch.Tensor) -> None:
    if rows.data_ptr() % ROW_ALIGNMENT_BYTES:
        raise ValueError(f"{name} must start at a multiple of {ROW_ALIGNMENT_BYTES} bytes, got a view that does not")


def check_apart(name: str, written: torch.Tensor, other_name: str, read: torch.Tensor) -> None:
    """Both are contiguous."""
    first, other = written.data_ptr(), read.data_ptr()
    if first < other + read.nbytes and other < first + written.nbytes:
        raise ValueError(
            f"{name} must not overlap {other_name}: results would be written over rows that are still read")


def check_payload(x: Any, device: torch.device) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """`x` of dispatch: rows, or (rows of 1-byte elements, scales)."""
    if not isinstance(x, tuple):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a torch.Tensor or a tuple (data, scales), got {type(x).__name__}")
        check_rows("x", x, device)
        return x, None
    if len(x) != 2:
        raise ValueError(f"x must be a tensor or a tuple (data, scales), got a tuple of {len(x)}")
    rows, scales = x
    num_tokens, _ = check_rows("x[0]", rows, device)
    if rows.element_size() != 1:
        raise TypeError(f"x[0] must have a 1-byte dtype when scales are given, got {_describe(rows)}")
    check_tensor("x[1] (scales)", scales, device, (num_tokens, None), (torch.float32, torch.int32), False)
    return rows, scales


def check_dtype(name: str, value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {type(value).__name__}")
    return value


def check_sizes(name: str, value: Any) -> tuple[int, ...]:
    """The extents of a tensor."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a torch.Size, or a tuple or list of ints, got {type(value).__name__}")
    return tuple(check_int(f"{name}[{i}]", size, 0, maximum=MAX_INT64) for i, size in enumerate(value))


def check_topk_idx(topk_idx: Any, device: torch.device, num_tokens: Optional[int] = None) -> torch.Size:
    shape: Optional[torch.Size] = matrix_shape(topk_idx, device, INDEX_DTYPES, num_tokens)
    if shape is None:
        raise _find_fault("topk_idx", topk_idx, device, (num_tokens, None), INDEX_DTYPES)
    if shape[1] == 0:
        raise ValueError(f"topk_idx must have at least one column, got {_describe(topk_idx)}")
    return shape


def check_num_experts(name: str, num_experts: int, num_ranks: int) -> int:
    if num_experts <= 0 or num_experts % num_ranks:
        raise ValueError(f"{name} must be a positive multiple of the number of ranks ({num_ranks}), got {num_experts}")
    return num_experts


def check_layout(per_rank: torch.Tensor, per_expert: torch.Tensor, in_rank: torch.Tensor, device: torch.device,
                 shape: tuple[int, int]) -> None:
    _, num_ranks = shape
    check_tensor("num_tokens_per_rank", per_rank, device, (num_ranks, ), INT32)
    check_tensor("is_token_in_rank", in_rank, device, shape, (torch.bool, ))
    check_tensor("num_tokens_per_expert", per_expert, device, (None, ), INT32)
    check_num_experts("the length of num_tokens_per_expert", per_expert.shape[0], num_ranks)


def find_layout_fault(per_rank: torch.Tensor, per_node: Optional[torch.Tensor], in_rank: torch.Tensor) -> Optional[str]:
    """Waits for the device."""
    counts = {"num_tokens_per_rank": (per_rank, in_rank)}
    if per_node is not None:
        (num_tokens, num_ranks), num_nodes = in_rank.shape, per_node.shape[0]
        in_node = in_rank.view(num_tokens, num_nodes, num_ranks // num_nodes).any(2)
        counts["num_tokens_per_rdma_rank"] = per_node, in_node
    for name, (tensor, is_sent) in counts.items():
        given, counted = tensor.tolist(), is_sent.sum(0).tolist()
        if given != counted:
            return f"{name} must count the tokens in is_token_in_rank, which are {counted}, got {given}"
    return None


def check_bias(bias: Any, device: torch.device, num_tokens: int,
               hidden: int) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    given = bias if isinstance(bias, tuple) else (bias, )
    if not 1 <= len(given) <= 2:
        raise ValueError(f"bias must be a tensor or a tuple of two, got a tuple of {len(given)}")
    for i, tensor in enumerate(given):
        name = f"bias[{i}]" if isinstance(bias, tuple) else "bias"
        check_tensor(name, tensor, device, (num_tokens, hidden), BFLOAT16)
        check_alignment(name, tensor)
    return given[0], given[1] if len(given) == 2 else None


class _NoneGiven:
    """Stands for a tensor where there are fewer than three."""


NONE_GIVEN = _NoneGiven()


class KnownTensors(Generic[T]):
    """Tensors that were checked together or made here, known again by their identity; this does not keep them alive.

    A layout is used once for each dispatch and a handle at least once, and the checks of either take 2 us. With the
    tensors goes what was found out about them.
    """

    MOST = 256

    def __init__(self) -> None:
        self._entries: dict[int, tuple[T, Reference, Reference, Reference]] = {}  # by id of the first tensor

    def add(self, finding: T, first: object, second: object = NONE_GIVEN, third: object = NONE_GIVEN) -> None:
        if len(self._entries) >= self.MOST:  # most of them are dead; those that are not are checked once more
            self._entries.clear()
        self._entries[id(first)] = finding, weakref.ref(first), weakref.ref(second), weakref.ref(third)

    def find(self, first: object, second: object = NONE_GIVEN, third: object = NONE_GIVEN) -> Optional[T]:
        """What is known of exactly these tensors, if anything is."""
        entry = self._entries.get(id(first))
        if entry is None:
            return None
        finding, first_ref, second_ref, third_ref = entry
        return finding if first_ref() is first and second_ref() is second and third_ref() is third else None


# Tensors over memory that torch did not allocate, lent memory above all, and a quicker torch.empty.
#
# Lent tensors are in the memory that peers reach: outputs of dispatch that they write, inputs of combine that they
# read. Such a tensor is an ordinary one; when its last view is gone, its memory may be lent again. torch's allocator
# knows nothing of it, so `Tensor.record_stream` has no effect. Instead the memory waits for every stream on which the
# Buffer has been called, and for the one that is current where the tensor is dropped, on whichever thread that is.

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
    """`empty[dtype](n, m)` is torch.empty(n, m, dtype=dtype, device=...) on one device, for less: see D3.31."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    @outside_of_modes
    def __missing__(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        example = torch.empty(0, dtype=dtype, device=self.device)
        make: Callable[..., torch.Tensor] = example.new_empty
        if has_tensor_exchange():
            asks = current_device if self.device.type == "cuda" else None
            make = TensorMaker(example, find_empty_strided(self.device), asks)
        self[dtype] = make
        return make

    def strided(self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        make = self[dtype]
        if not isinstance(make, TensorMaker):
            return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
        made: torch.Tensor = make.strided(shape, strides)
        return made


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
        self._begin = runtime.lend_address
        self.noted: dict[int, bool] = {}  # streams of calls; whether what is lent can be used there
        self._last: Optional[tuple[int, int]] = None  # tokens and received rows of the last fresh dispatch

    def tensors(self, form: RowForm, num_rows: int,
                operation: Operation) -> Optional[tuple[Optional[torch.Tensor], ...]]:
        """Uninitialised tensors for the kernels of a call, or None: there is nothing to lend, or no room now for all.

        Within a capture the memory is the graph's as long as that lives.
        """
        lent = self._take(form, num_rows, operation) if num_rows and form.can_be_lent else None
        return None if lent is None else lent.tensors(num_rows, self.index)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor begins in the memory that can be lent."""
        return self._begin <= tensor.data_ptr() < self._begin + self.num_bytes

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
            self.note(stream, True)
        if not (noted[current] if current in noted else self.note(current)):
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
            self.note(current)
            streams.follow_last(current)
        shape, dtype = spec
        lent = self._runtime.lend(RowForm([((), dtype)]).native, math.prod(shape), current, False)
        if isinstance(streams, CudaStreams):
            streams.set_last(current)  # calls come after whatever the current stream has waited for
        return None if lent is None else lent.tensors(lent.num_rows, self.index)[0].view(shape)

    def note(self, stream: int, is_ours: bool = False) -> bool:
        """Lent tensors may be used there. False: the stream is not torch's. It may be gone when the memory comes back,
        and then nobody can ask it."""
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
