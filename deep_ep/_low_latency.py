"""The low-latency calls: checks, allocation, and the native launches, one for each phase or one for both."""

import functools
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional, Union

import torch

from deep_ep import _checks
from deep_ep._bootstrap import Session
from deep_ep._memory import view_memory
from deep_ep._phases import PhaseOrder, Phases, open_phases
from deep_ep.utils import EventHandle, EventOverlap
from deep_ep_cpp import Buffer as NativeBuffer
from deep_ep_cpp import InvalidArgument, get_low_latency_rdma_size_hint

Payload = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
DispatchResult = tuple[Payload, torch.Tensor, tuple[Any, ...], EventOverlap, Optional[Callable[[], None]]]
CombineResult = tuple[torch.Tensor, EventOverlap, Optional[Callable[[], None]]]

MAX_TOKENS = 4096  # of one rank in one call; csrc/layout/low_latency.h
BF16_ALIGNMENT = 8  # channels in 16 bytes
SCALE_GROUP = 128  # channels with one FP8 scale
PACKED_GROUP = 4 * SCALE_GROUP  # channels with one word of UE8M0 scales
INT32_BYTES = 4


class Shape(NamedTuple):
    """What every native call begins with (R ranks, El experts on each, T tokens of a rank at most)."""

    num_max_tokens: int
    num_topk: int
    num_experts: int
    hidden: int


class Handle(NamedTuple):
    """What a dispatch leaves for its combine.

    Behind src_info, in the same storage, lies row_of_entry, int32 [R, T, K]: the row of each top-k entry that has its
    expert here. Combine needs it, and callers count on a handle of these five.
    """

    src_info: torch.Tensor  # int32 [El, R * T]; index of the row's token at its source
    layout_range: torch.Tensor  # int64 [El, R]; rows of each source: first << 32 | count
    num_max_tokens: int
    hidden: int
    num_experts: int


class Format(NamedTuple):
    """How rows travel in a dispatch."""

    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool

    def check(self, hidden: int) -> None:
        if self.use_ue8m0 and not (self.round_scale and self.use_fp8):
            raise ValueError("use_ue8m0 needs use_fp8=True and round_scale=True: it packs exponents, and only then are "
                             f"the scales powers of two; got use_fp8={self.use_fp8}, round_scale={self.round_scale}")
        unit = PACKED_GROUP if self.use_ue8m0 else SCALE_GROUP if self.use_fp8 else BF16_ALIGNMENT
        if hidden <= 0 or hidden % unit:
            kind = "use_ue8m0" if self.use_ue8m0 else "use_fp8" if self.use_fp8 else "bfloat16 rows"
            raise ValueError(f"x must have a hidden size of a positive multiple of {unit} with {kind}, got {hidden}")


class Hook:
    """Launches the receive phase of a call, once: a second call does nothing."""

    def __init__(self, receive: Callable[[], None]) -> None:
        self._receive: Optional[Callable[[], None]] = receive

    def __call__(self) -> None:
        receive, self._receive = self._receive, None
        if receive is not None:
            receive()


def size_hint(num_max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    check_max_tokens(num_max_tokens)
    _checks.check_int("hidden", hidden, BF16_ALIGNMENT, BF16_ALIGNMENT)
    _checks.check_int("num_ranks", num_ranks, 1)
    _checks.check_num_experts("num_experts", _checks.check_int("num_experts", num_experts, 1), num_ranks)
    return int(get_low_latency_rdma_size_hint(num_max_tokens, hidden, num_ranks, num_experts))


def check_max_tokens(value: Any) -> int:
    number = _checks.check_int("num_max_dispatch_tokens_per_rank", value, 1)
    if number > MAX_TOKENS:
        raise ValueError(f"num_max_dispatch_tokens_per_rank must be at most {MAX_TOKENS}, got {number}")
    return number


def _ptr(tensor: Optional[torch.Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_modes(name: str, async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise InvalidArgument(f"{name}: async_finish and return_recv_hook exclude each other; the hook says when to "
                              "receive")


class CombineBuffers:
    """Two tensors of one shape for zero_copy: experts may fill one while a combine still sends the other."""

    def __init__(self) -> None:
        self.lent: Optional[torch.Tensor] = None
        self._resting: list[torch.Tensor] = []

    def lend(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The same tensor until a combine has taken it."""
        if self.lent is None:
            self.lent = (self._resting.pop(0)
                         if len(self._resting) == 2 else torch.empty(shape, dtype=torch.bfloat16, device=device))
        return self.lent

    def pass_on(self) -> None:
        if self.lent is not None:
            self._resting.append(self.lent)
        self.lent = None


class LowLatency:
    """The low-latency side of one Buffer."""

    def __init__(self, session: Session, is_enabled: bool, is_shrinkable: bool) -> None:
        self._session = session
        self._is_enabled = is_enabled
        self._is_shrinkable = is_shrinkable
        self._order = PhaseOrder()
        session.before_close = functools.partial(self._order.join, session.streams)
        self._combine_buffers: dict[tuple[int, ...], CombineBuffers] = {}  # by shape

    def require(self, name: str) -> None:
        """Raises an earlier failure, or says that the Buffer was built for the other mode."""
        if not self._is_enabled:
            raise InvalidArgument(f"{name}: build the Buffer with low_latency_mode=True and num_rdma_bytes from "
                                  "get_low_latency_rdma_size_hint, got low_latency_mode=False")
        self._session.raise_failure()

    def clean(self, num_max_tokens: int, hidden: int, num_experts: int) -> None:
        """Only checks: flags carry the number of their call and are never cleared."""
        self.require("clean_low_latency_buffer")
        size_hint(num_max_tokens, hidden, self._session.num_ranks, num_experts)

    # Dispatch

    def dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor, num_max_tokens: int, num_experts: int,
                 cumulative_stats: Optional[torch.Tensor], wait_stats: Optional[torch.Tensor], form: Format,
                 async_finish: bool, return_recv_hook: bool) -> DispatchResult:
        self.require("low_latency_dispatch")
        _check_modes("low_latency_dispatch", async_finish, return_recv_hook)
        shape = self._check_dispatch(x, topk_idx, num_max_tokens, num_experts, form)
        self._check_stats("cumulative_local_expert_recv_stats", cumulative_stats, self._num_local(shape), torch.int32)
        self._check_stats("dispatch_wait_recv_cost_stats", wait_stats, self._session.num_ranks, torch.int64)
        phases = open_phases(self._session.streams, self._order, async_finish)
        recv_x, scales = self._payload_outputs(shape, form)
        recv_count, handle = self._index_outputs(shape)
        row_of_entry = handle.src_info.data_ptr() + handle.src_info.numel() * INT32_BYTES
        runtime = self._session.runtime

        def launch(ticket: int) -> int:
            return runtime.low_latency_dispatch(ticket, *shape, *form, _ptr(x), _ptr(topk_idx), topk_idx.element_size(),
                                                x.shape[0], _ptr(recv_x), _ptr(scales), _ptr(recv_count),
                                                _ptr(handle.src_info), _ptr(handle.layout_range), row_of_entry,
                                                _ptr(cumulative_stats), _ptr(wait_stats), phases.stream)

        tensors = (x, topk_idx, recv_x, scales, recv_count, handle.src_info, handle.layout_range, cumulative_stats,
                   wait_stats)
        # One launch for both phases was measured slower here, and quicker for combine: docs/performance/low_latency.md.
        event, hook = _run(phases, launch, tensors, return_recv_hook, is_one_launch=False)
        payload = recv_x if scales is None else (recv_x, scales.transpose(1, 2))
        return payload, recv_count, tuple(handle), event, hook

    def _check_dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor, num_max_tokens: int, num_experts: int,
                        form: Format) -> Shape:
        num_max_tokens = check_max_tokens(num_max_tokens)
        num_experts = _checks.check_int("num_experts", num_experts, 1)
        _checks.check_num_experts("num_experts", num_experts, self._session.num_ranks)
        device = self._session.streams.device
        rows = _checks.check_rows("x", x, device, (torch.bfloat16, ))
        if rows.shape[0] > num_max_tokens:
            raise ValueError(f"x must have at most num_max_dispatch_tokens_per_rank ({num_max_tokens}) rows, got "
                             f"{rows.shape[0]}")
        form.check(rows.shape[1])
        _checks.check_topk_idx(topk_idx, device, rows.shape[0])
        return Shape(num_max_tokens, topk_idx.shape[1], num_experts, rows.shape[1])

    def _num_local(self, shape: Shape) -> int:
        return shape.num_experts // self._session.num_ranks

    def _check_stats(self, name: str, stats: Optional[torch.Tensor], size: int, dtype: torch.dtype) -> None:
        if stats is not None:
            _checks.check_tensor(name, stats, self._session.streams.device, (size, ), (dtype, ))

    def _payload_outputs(self, shape: Shape, form: Format) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        device, num_rows = self._session.streams.device, self._session.num_ranks * shape.num_max_tokens
        num_local = self._num_local(shape)
        dtype = torch.float8_e4m3fn if form.use_fp8 else torch.bfloat16
        recv_x = torch.empty((num_local, num_rows, shape.hidden), dtype=dtype, device=device)
        if not form.use_fp8:
            return recv_x, None
        num_words = shape.hidden // (PACKED_GROUP if form.use_ue8m0 else SCALE_GROUP)
        scale_dtype = torch.int32 if form.use_ue8m0 else torch.float32
        return recv_x, torch.empty((num_local, num_words, num_rows), dtype=scale_dtype, device=device)

    def _index_outputs(self, shape: Shape) -> tuple[torch.Tensor, Handle]:
        """recv_count and the handle."""
        device, num_ranks = self._session.streams.device, self._session.num_ranks
        num_local, num_rows = self._num_local(shape), num_ranks * shape.num_max_tokens
        words = torch.empty(num_local * num_rows + num_rows * shape.num_topk, dtype=torch.int32, device=device)
        src_info = words[:num_local * num_rows].view(num_local, num_rows)
        layout_range = torch.empty((num_local, num_ranks), dtype=torch.int64, device=device)
        recv_count = torch.empty(num_local, dtype=torch.int32, device=device)
        return recv_count, Handle(src_info, layout_range, shape.num_max_tokens, shape.hidden, shape.num_experts)

    # Combine

    def combine(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: Any,
                use_logfmt: bool, zero_copy: bool, async_finish: bool, return_recv_hook: bool,
                out: Optional[torch.Tensor], wait_stats: Optional[torch.Tensor]) -> CombineResult:
        self.require("low_latency_combine")
        _check_modes("low_latency_combine", async_finish, return_recv_hook)
        if use_logfmt and zero_copy:
            raise InvalidArgument("low_latency_combine: use_logfmt and zero_copy exclude each other")
        checked = self._check_handle(handle)
        shape = self._check_combine(checked, topk_idx, topk_weights)
        rows_of_entries = self._rows_of_entries(checked, shape)
        sent = self._expert_rows(x, checked, zero_copy)
        device, num_tokens = self._session.streams.device, topk_idx.shape[0]
        self._check_stats("combine_wait_recv_cost_stats", wait_stats, self._session.num_ranks, torch.int64)
        if out is not None:
            _checks.check_rows("out", out, device, (torch.bfloat16, ), (num_tokens, shape.hidden))
        phases = open_phases(self._session.streams, self._order, async_finish)
        combined = out
        if combined is None:
            combined = torch.empty((num_tokens, shape.hidden), dtype=torch.bfloat16, device=device)
        runtime = self._session.runtime

        def launch(ticket: int) -> int:
            return runtime.low_latency_combine(ticket, *shape, use_logfmt, _ptr(sent), _ptr(topk_idx),
                                               topk_idx.element_size(), _ptr(topk_weights), num_tokens, rows_of_entries,
                                               _ptr(combined), _ptr(wait_stats), phases.stream)

        tensors = (sent, topk_idx, topk_weights, checked.src_info, combined, wait_stats)
        event, hook = _run(phases, launch, tensors, return_recv_hook, is_one_launch=True)
        if zero_copy:
            self._combine_buffers[tuple(sent.shape)].pass_on()
        return combined, event, hook

    def _check_handle(self, handle: Any) -> Handle:
        if not isinstance(handle, (tuple, list)):
            raise TypeError(f"handle must be the tuple that low_latency_dispatch returned, got {type(handle).__name__}")
        if len(handle) != len(Handle._fields):
            raise ValueError(
                f"handle must have {len(Handle._fields)} elements, as low_latency_dispatch returned it, got "
                f"{len(handle)}")
        checked = Handle(*handle)
        check_max_tokens(checked.num_max_tokens)
        num_ranks = self._session.num_ranks
        _checks.check_num_experts("handle[4] (num_experts)",
                                  _checks.check_int("handle[4] (num_experts)", checked.num_experts, 1), num_ranks)
        _checks.check_int("handle[3] (hidden)", checked.hidden, BF16_ALIGNMENT, BF16_ALIGNMENT)
        _checks.check_tensor("handle[0] (src_info)", checked.src_info, self._session.streams.device,
                             (checked.num_experts // num_ranks, num_ranks * checked.num_max_tokens), (torch.int32, ))
        return checked

    def _check_combine(self, handle: Handle, topk_idx: Any, topk_weights: Any) -> Shape:
        device = self._session.streams.device
        num_tokens, num_topk = _checks.check_topk_idx(topk_idx, device).shape
        if num_tokens > handle.num_max_tokens:
            raise ValueError(f"topk_idx must have at most num_max_dispatch_tokens_per_rank ({handle.num_max_tokens}) "
                             f"rows, got {num_tokens}")
        _checks.check_tensor("topk_weights", topk_weights, device, (num_tokens, num_topk), (torch.float32, ))
        return Shape(handle.num_max_tokens, num_topk, handle.num_experts, handle.hidden)

    def _rows_of_entries(self, handle: Handle, shape: Shape) -> int:
        """The address of row_of_entry, behind src_info."""
        src_info = handle.src_info
        num_words = self._session.num_ranks * shape.num_max_tokens * shape.num_topk
        num_bytes = src_info.untyped_storage().nbytes() - (src_info.storage_offset() + src_info.numel()) * INT32_BYTES
        if num_bytes != num_words * INT32_BYTES:
            raise ValueError(
                f"handle[0] (src_info) must be the very tensor that low_latency_dispatch returned for a "
                f"topk_idx of {shape.num_topk} columns, not a copy: {num_words * INT32_BYTES} bytes follow "
                f"in its storage, got {num_bytes}")
        return src_info.data_ptr() + src_info.numel() * INT32_BYTES

    def _expert_rows(self, x: Any, handle: Handle, zero_copy: bool) -> torch.Tensor:
        """What combine reads: `x`, or with zero_copy the buffer that the experts wrote to."""
        shape = (*handle.src_info.shape, handle.hidden)
        rows = _checks.check_tensor("x", x, self._session.streams.device, shape, (torch.bfloat16, ))
        _checks.check_alignment("x", rows)
        if not zero_copy:
            return rows
        buffers = self._combine_buffers.get(shape)
        if buffers is None or buffers.lent is None:
            raise InvalidArgument(
                "low_latency_combine: zero_copy sends what get_next_low_latency_combine_buffer(handle) "
                "has lent, which must be called, and filled, before each such combine")
        return buffers.lent

    def next_combine_buffer(self, handle: Any) -> torch.Tensor:
        self.require("get_next_low_latency_combine_buffer")
        checked = self._check_handle(handle)
        shape = (*checked.src_info.shape, checked.hidden)
        return self._combine_buffers.setdefault(shape, CombineBuffers()).lend(shape, self._session.streams.device)

    # Masks

    def masked_ranks(self, name: str) -> torch.Tensor:
        """int32 [R], the native words themselves; work on them comes after all phases so far."""
        self.require(name)
        if not self._is_shrinkable:
            raise InvalidArgument(f"{name}: build the Buffer with enable_shrink=True, got enable_shrink=False")
        session = self._session
        phases = open_phases(session.streams, self._order, is_async=False)
        phases.begin()
        phases.finish(())
        num_bytes = session.num_ranks * INT32_BYTES
        return view_memory(session.runtime.masked_ranks_ptr, num_bytes, session.streams.device).view(torch.int32)


def _run(phases: Phases, launch: Callable[[int], int], tensors: Sequence[Optional[torch.Tensor]], wants_hook: bool,
         is_one_launch: bool) -> tuple[EventOverlap, Optional[Hook]]:
    """Both phases, in one launch or two, or the send phase and a hook for the other. `tensors` live until they end."""
    kept = tuple(tensor for tensor in tensors if tensor is not None)
    phases.begin()
    if is_one_launch and not wants_hook:
        launch(NativeBuffer.BOTH_PHASES)
    else:
        ticket = launch(0)
        if wants_hook:
            phases.pause(kept)

            def receive() -> None:
                phases.resume()
                launch(ticket)
                phases.finish(kept)

            return EventOverlap(None), Hook(receive)
        try:
            launch(ticket)
        except BaseException:
            phases.pause(kept)  # the send phase may still run
            raise
    is_async, recorded = phases.finish(kept)
    if not is_async:
        return EventOverlap(None), None
    return EventOverlap(EventHandle._wrap(recorded), kept), None
