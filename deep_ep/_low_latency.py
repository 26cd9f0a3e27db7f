"""The low-latency calls: checks, allocation, and the native launches, one for each phase or one for both."""

from typing import Any, Callable, NamedTuple, Optional, Union

import torch

from deep_ep import _tensors
from deep_ep._peers import CallCheck
from deep_ep._session import Session
from deep_ep._streams import Operation, Tensors
from deep_ep._tensors import BFLOAT16, FLOAT32, INT32, INT64, EmptyTensors, KnownTensors, Payload, view_memory
from deep_ep.utils import EventOverlap, find_reinterpret, opaque, outside_of_modes, overlap_of
from deep_ep_cpp import Buffer as NativeBuffer
from deep_ep_cpp import (
    InvalidArgument,
    LowLatencyCombineArgs,
    LowLatencyDispatchArgs,
    get_low_latency_rdma_size_hint,
)

DispatchResult = tuple[Payload, torch.Tensor, tuple[Any, ...], EventOverlap, Optional[Callable[[], None]]]
Form = tuple[bool, bool, bool]  # the three of a Format
Args = Union[LowLatencyDispatchArgs, LowLatencyCombineArgs]
CombineResult = tuple[torch.Tensor, EventOverlap, Optional[Callable[[], None]]]

NUM_HANDLE_FIELDS = 5  # (src_info, layout_range, T, hidden, E): callers count on it

MAX_TOKENS = 4096  # of one rank in one call; csrc/layout/heap.h
MAX_EXPERTS = 16384  # csrc/kernels/params_low_latency.h
BF16_ALIGNMENT = 8  # channels in 16 bytes
SCALE_GROUP = 128  # channels with one FP8 scale
PACKED_GROUP = 4 * SCALE_GROUP  # channels with one word of UE8M0 scales
INT32_BYTES = 4


class Shape(NamedTuple):
    """What every native call begins with."""

    num_max_tokens: int
    num_topk: int
    num_experts: int
    hidden: int


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


PLAIN = Format(use_fp8=False, round_scale=False, use_ue8m0=False)


def check_max_tokens(value: Any) -> int:
    return _tensors.check_int("num_max_dispatch_tokens_per_rank", value, 1, maximum=MAX_TOKENS)


def check_num_experts(name: str, value: Any, num_ranks: int) -> int:
    return _tensors.check_num_experts(name, _tensors.check_int(name, value, 1, maximum=MAX_EXPERTS), num_ranks)


# recv_x; scales, if there are any; src_info; layout_range; recv_count
DispatchOutputs = tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]


class Plan:
    """Sizes of the tensors of a call, and records with the arguments that are the same in every call of its kind.

    R ranks, El experts on each, T tokens of a rank at most, K experts of a token. One allocation holds four things,
    because each allocation costs the host more than a view: src_info, int32 [El, R * T], the index of the row's token
    at its source; row_of_entry, int32 [R, T, K], the row of each top-k entry that has its expert here, which only
    combine needs, and across nodes, where combine also needs them, the experts of the own entries [T, K]; recv_count,
    int32 [El]; the number of the call, int64, which its receive phase needs.
    """

    __slots__ = ("_empty", "_num_ranks", "combine_args", "dispatch_args", "entries_at", "expert_rows", "handle_tail",
                 "has_scales", "hidden", "num_bytes_behind_src_info", "num_local", "num_max_tokens", "num_topk",
                 "num_words", "number_at", "recv_count_view", "recv_dtype", "scale_dtype", "scale_shape",
                 "scale_strides", "src_info_view")

    def __init__(self, shape: Shape, form: Format, num_ranks: int, spans_nodes: bool, empty: EmptyTensors) -> None:
        form.check(shape.hidden)
        self.num_max_tokens, self.num_topk, num_experts, self.hidden = shape
        self.num_local = num_local = num_experts // num_ranks
        num_rows = num_ranks * shape.num_max_tokens
        self.expert_rows = (num_local, num_rows, shape.hidden)
        self.handle_tail = (shape.num_max_tokens, shape.hidden, num_experts)
        self.dispatch_args = LowLatencyDispatchArgs(**shape._asdict(),
                                                    is_fp8=form.use_fp8,
                                                    rounds_scales=form.round_scale,
                                                    packs_scales=form.use_ue8m0)
        self.combine_args = LowLatencyCombineArgs(**shape._asdict())
        self._empty = empty
        self.recv_dtype = torch.float8_e4m3fn if form.use_fp8 else torch.bfloat16
        self.has_scales = form.use_fp8
        num_scales = shape.hidden // (PACKED_GROUP if form.use_ue8m0 else SCALE_GROUP)
        self.scale_shape, self.scale_strides = (num_local, num_rows, num_scales), (num_scales * num_rows, 1, num_rows)
        self.scale_dtype = torch.int32 if form.use_ue8m0 else torch.float32
        self._num_ranks = num_ranks
        num_tables = num_ranks + 1 if spans_nodes else num_ranks
        num_indices, num_entries = num_local * num_rows, num_tables * shape.num_max_tokens * shape.num_topk
        end = num_indices + num_entries + num_local
        # Shape, strides and offset.
        self.src_info_view = (num_local, num_rows), (num_rows, 1), 0
        self.recv_count_view = (num_local, ), (1, ), end - num_local
        self.num_words = end + 3  # the number's two, one of which may have to be skipped to align them
        self.entries_at = num_indices * INT32_BYTES
        self.number_at = (end + 1) // 2 * 2 * INT32_BYTES
        self.num_bytes_behind_src_info = (self.num_words - num_indices) * INT32_BYTES

    def make_outputs(self) -> DispatchOutputs:
        empty, (num_local, num_rows, hidden) = self._empty, self.expert_rows
        recv_x, scales = empty[self.recv_dtype](num_local, num_rows, hidden), None
        if self.has_scales:
            scales = empty.strided(self.scale_dtype, self.scale_shape, self.scale_strides)
        words = empty[torch.int32](self.num_words)
        layout_range = empty[torch.int64](num_local, self._num_ranks)
        # The memory of both stays as large.
        view = find_reinterpret()
        src_info, recv_count = view(words, *self.src_info_view), view(words, *self.recv_count_view)
        return recv_x, scales, src_info, layout_range, recv_count


class Numbers:
    """Where the send phase of a combine with a hook leaves the number of its call for the receive phase: int64 [1].

    Phases of a Buffer run one after the other, on whichever streams, so a place is free again once the receive phase is
    launched; where one of the two is captured, its graph has it for good.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._free: list[torch.Tensor] = []

    def take(self, operation: Operation) -> torch.Tensor:
        return self._free.pop() if self._free and not operation.is_captured else self._session.empty[torch.int64](1)

    def give_back(self, number: torch.Tensor, operation: Operation) -> None:
        """The receive phase was launched."""
        if not operation.is_captured and not self._session.streams.is_captured(operation.stream):
            self._free.append(number)


@opaque
class Hook:
    """Launches the receive phase of a call, once: a second call does nothing.

    The peers are told when that fails, and when the last reference goes before it was called; but not of what is
    captured into a graph, which is no call yet that they could wait for. `tensors` are what the receive phase uses:
    until it is launched nobody else may get their memory, whatever the caller has dropped.
    """

    __slots__ = ("__weakref__", "_args", "_name", "_operation", "_session", "_tensors", "_ticket", "then")

    def __init__(self, session: Session, name: str, operation: Operation, args: Args, ticket: int,
                 tensors: Tensors) -> None:
        self._session = session
        self._name = name
        self._operation: Optional[Operation] = operation
        self._args = args
        self._ticket = ticket
        self._tensors = tensors
        self.then: Optional[tuple[Numbers, torch.Tensor]] = None  # what is given back when it is launched

    def __call__(self) -> None:
        operation, self._operation = self._operation, None
        _held, self._tensors = self._tensors, ()
        if operation is None:
            return
        session, name = self._session, self._name
        try:
            operation.resume()
            getattr(session.runtime, name)(self._args, self._ticket, operation.stream)
            operation.finish()
        except BaseException as error:
            session.abandon_call(f"the hook of {name}", error, 0 if operation.is_captured else self._ticket)
            raise
        if self.then is not None:
            numbers, number = self.then
            numbers.give_back(number, operation)

    def __del__(self) -> None:
        operation = self._operation
        if operation is not None and not operation.is_captured:
            self._session.abandon_hook(self._name, self._ticket)


def size_hint(num_max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    check_max_tokens(num_max_tokens)
    _tensors.check_int("hidden", hidden, BF16_ALIGNMENT, BF16_ALIGNMENT)
    _tensors.check_int("num_ranks", num_ranks, 1)
    check_num_experts("num_experts", num_experts, num_ranks)
    return int(get_low_latency_rdma_size_hint(num_max_tokens, hidden, num_ranks, num_experts))


class CombineBuffers:
    """Two tensors of one shape for zero_copy: experts may fill one while a combine still sends the other."""

    def __init__(self) -> None:
        self.lent: Optional[torch.Tensor] = None
        self._resting: list[torch.Tensor] = []

    @outside_of_modes
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
        self._device = session.streams.device
        self._is_enabled = is_enabled
        self._is_shrinkable = is_shrinkable
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._known_handles = KnownTensors[Plan]()  # src_info
        self._numbers = Numbers(session)
        self._combine_buffers: dict[tuple[int, ...], CombineBuffers] = {}  # by shape

    def require(self, name: str) -> None:
        """Raises an earlier failure, or says that the Buffer was built for the other mode."""
        self._session.begin_call()
        if not self._is_enabled:
            raise InvalidArgument(f"{name}: build the Buffer with low_latency_mode=True and num_rdma_bytes from "
                                  "get_low_latency_rdma_size_hint, got low_latency_mode=False")

    def clean(self, num_max_tokens: int, hidden: int, num_experts: int) -> None:
        """A barrier of the group. There is nothing to clear: flags carry the number of their call."""
        self.require("clean_low_latency_buffer")
        size_hint(num_max_tokens, hidden, self._session.num_ranks, num_experts)
        if self._session.call_check is not None:
            self._session.call_check.compare("clean_low_latency_buffer", {})
        with self._session.streams.low_latency_operation(is_async=False) as operation:
            operation.start((), ())
            self._session.runtime.clean_low_latency(operation.stream)
            operation.finish()

    # Dispatch

    def dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor, num_max_tokens: int, num_experts: int,
                 cumulative_stats: Optional[torch.Tensor], wait_stats: Optional[torch.Tensor], form: Form,
                 async_finish: bool, return_recv_hook: bool) -> DispatchResult:
        self.require("low_latency_dispatch")
        num_tokens, hidden = _tensors.check_rows("x", x, self._device, BFLOAT16)
        num_listed, num_topk = _tensors.check_topk_idx(topk_idx, self._device)
        plan = self._plan(num_max_tokens, num_topk, num_experts, hidden, form)
        if num_tokens > plan.num_max_tokens:
            raise ValueError(f"x must have at most num_max_dispatch_tokens_per_rank ({plan.num_max_tokens}) rows, got "
                             f"{num_tokens}")
        if num_listed != num_tokens:
            _tensors.check_topk_idx(topk_idx, self._device, num_tokens)
        session = self._session
        if cumulative_stats is not None or wait_stats is not None:
            self._check_stats("cumulative_local_expert_recv_stats", cumulative_stats, plan.num_local, INT32)
            self._check_stats("dispatch_wait_recv_cost_stats", wait_stats, session.num_ranks, INT64)
        if session.call_check is not None:
            _compare_calls(session.call_check, "low_latency_dispatch", plan, Format(*map(bool, form))._asdict())
        operation = self._open_operation("low_latency_dispatch", async_finish, return_recv_hook)
        if return_recv_hook:
            x, topk_idx = operation.snapshot(x, topk_idx)
        recv_x, scales, src_info, layout_range, recv_count = plan.make_outputs()
        src_info_ptr = src_info.data_ptr()
        args = plan.dispatch_args.replace(wait_stats=wait_stats,
                                          number=src_info_ptr + plan.number_at,
                                          x=x,
                                          topk_idx=topk_idx,
                                          idx_bytes=topk_idx.element_size(),
                                          num_tokens=num_tokens,
                                          recv_x=recv_x,
                                          recv_scales=scales,
                                          recv_count=recv_count,
                                          src_info=src_info_ptr,
                                          layout_range=layout_range,
                                          row_of_entry=src_info_ptr + plan.entries_at,
                                          cumulative_stats=cumulative_stats)
        tensors = (x, topk_idx, recv_x, scales, src_info, layout_range, cumulative_stats, wait_stats)
        event, hook = _run(self._session, "low_latency_dispatch", operation, args, tensors, return_recv_hook)
        self._know(plan, src_info)
        payload = recv_x if scales is None else (recv_x, scales)
        return payload, recv_count, (src_info, layout_range, *plan.handle_tail), event, hook

    def _plan(self, num_max_tokens: Any, num_topk: int, num_experts: Any, hidden: int, form: Form) -> Plan:
        key = (num_max_tokens, num_topk, num_experts, hidden, form)
        plan = self._plans.get(key)
        # A float or a bool may equal the number that it is taken for.
        if plan is None or type(num_max_tokens) is not int or type(num_experts) is not int:
            num_ranks = self._session.num_ranks
            num_max_tokens = check_max_tokens(num_max_tokens)
            num_experts = check_num_experts("num_experts", num_experts, num_ranks)
            shape = Shape(num_max_tokens, num_topk, num_experts, hidden)
            spans_nodes = self._session.topology.num_nodes > 1
            plan = self._plans[key] = Plan(shape, Format(*map(bool, form)), num_ranks, spans_nodes, self._session.empty)
            if self._session.direct is not None:
                self._session.direct.add_low_latency_plan(plan=plan)
        return plan

    def _check_stats(self, name: str, stats: Optional[torch.Tensor], size: int, dtypes: tuple[torch.dtype]) -> None:
        if stats is not None:
            _tensors.check_tensor(name, stats, self._device, (size, ), dtypes)

    def _open_operation(self, name: str, async_finish: bool, return_recv_hook: bool) -> Operation:
        if async_finish and return_recv_hook:
            raise InvalidArgument(f"{name}: async_finish and return_recv_hook exclude each other; the hook says when "
                                  "to receive")
        return self._session.streams.low_latency_operation(async_finish, return_recv_hook)

    # Combine

    def combine(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: Any,
                use_logfmt: bool, zero_copy: bool, async_finish: bool, return_recv_hook: bool,
                out: Optional[torch.Tensor], wait_stats: Optional[torch.Tensor]) -> CombineResult:
        self.require("low_latency_combine")
        if use_logfmt and zero_copy:
            raise InvalidArgument("low_latency_combine: use_logfmt and zero_copy exclude each other")
        device = self._device
        num_tokens, num_topk = _tensors.check_topk_idx(topk_idx, device)
        plan = self._plan_of(handle, num_topk)
        if num_tokens > plan.num_max_tokens:
            raise ValueError(f"topk_idx must have at most num_max_dispatch_tokens_per_rank ({plan.num_max_tokens}) "
                             f"rows, got {num_tokens}")
        _tensors.check_tensor("topk_weights", topk_weights, device, (num_tokens, num_topk), FLOAT32)
        src_info, hidden = handle[0], plan.hidden
        sent = self._expert_rows(x, plan, zero_copy)
        self._check_stats("combine_wait_recv_cost_stats", wait_stats, self._session.num_ranks, INT64)
        if out is not None:
            _tensors.check_tensor("out", out, device, (num_tokens, hidden), BFLOAT16)
            _tensors.check_alignment("out", out)
            _tensors.check_apart("out", out, "x", sent)
        if self._session.call_check is not None:
            _compare_calls(self._session.call_check, "low_latency_combine", plan, {"use_logfmt": bool(use_logfmt)})
        operation = self._open_operation("low_latency_combine", async_finish, return_recv_hook)
        if return_recv_hook:
            sent, topk_idx, topk_weights = operation.snapshot(sent, topk_idx, topk_weights)
        combined = self._session.empty[torch.bfloat16](num_tokens, hidden) if out is None else out
        # Several combines may be open with one handle, so that theirs cannot lie behind src_info.
        number = self._numbers.take(operation) if return_recv_hook else None
        args = plan.combine_args.replace(wait_stats=wait_stats,
                                         number=number,
                                         uses_logfmt=use_logfmt,
                                         x=sent,
                                         topk_idx=topk_idx,
                                         idx_bytes=topk_idx.element_size(),
                                         topk_weights=topk_weights,
                                         num_tokens=num_tokens,
                                         row_of_entry=src_info.data_ptr() + plan.entries_at,
                                         combined_x=combined)
        tensors = (sent, topk_idx, topk_weights, src_info, combined, wait_stats, number)
        event, hook = _run(self._session, "low_latency_combine", operation, args, tensors, return_recv_hook)
        if hook is not None and number is not None:
            hook.then = self._numbers, number
        if zero_copy:
            self._combine_buffers[plan.expert_rows].pass_on()
        return combined, event, hook

    def _plan_of(self, handle: Any, num_topk: int) -> Plan:
        """The plan of the dispatch that made `handle`, or of one like it."""
        if isinstance(handle, (tuple, list)) and len(handle) == NUM_HANDLE_FIELDS:
            plan = self._known_handles.find(handle[0])
            if plan is not None and plan.num_topk == num_topk and plan.handle_tail == (handle[2], handle[3], handle[4]):
                self._tell_direct(plan, handle[0])
                return plan
        num_max_tokens, hidden, num_experts = self._check_handle(handle)
        plan, src_info = self._plan(num_max_tokens, num_topk, num_experts, hidden, PLAIN), handle[0]
        # The rows of the entries lie behind src_info, and nothing says so but the size of the storage.
        num_bytes = src_info.untyped_storage().nbytes() - src_info.storage_offset() * INT32_BYTES - plan.entries_at
        if num_bytes != plan.num_bytes_behind_src_info:
            raise ValueError(f"handle[0] (src_info) must be the very tensor that low_latency_dispatch returned for a "
                             f"topk_idx of {num_topk} columns, not a copy: {plan.num_bytes_behind_src_info} bytes "
                             f"follow in its storage, got {num_bytes}")
        self._know(plan, src_info)
        return plan

    def _know(self, plan: Plan, src_info: torch.Tensor) -> None:
        self._known_handles.add(plan, src_info)
        self._tell_direct(plan, src_info)

    def _tell_direct(self, plan: Plan, src_info: torch.Tensor) -> None:
        if self._session.direct is not None:
            self._session.direct.add_low_latency_handle(src_info=src_info, plan=plan)

    def _check_handle(self, handle: Any) -> tuple[int, int, int]:
        """Returns (T, hidden, E)."""
        if not isinstance(handle, (tuple, list)):
            raise TypeError(f"handle must be the tuple that low_latency_dispatch returned, got {type(handle).__name__}")
        if len(handle) != NUM_HANDLE_FIELDS:
            raise ValueError(f"handle must have {NUM_HANDLE_FIELDS} elements, as low_latency_dispatch returned it, got "
                             f"{len(handle)}")
        src_info, _, num_max_tokens, hidden, num_experts = handle
        num_ranks, num_max_tokens = self._session.num_ranks, check_max_tokens(num_max_tokens)
        num_experts = check_num_experts("handle[4] (num_experts)", num_experts, num_ranks)
        hidden = _tensors.check_int("handle[3] (hidden)", hidden, BF16_ALIGNMENT, BF16_ALIGNMENT)
        _tensors.check_tensor("handle[0] (src_info)", src_info, self._device,
                              (num_experts // num_ranks, num_ranks * num_max_tokens), INT32)
        return num_max_tokens, hidden, num_experts

    def _expert_rows(self, x: Any, plan: Plan, zero_copy: bool) -> torch.Tensor:
        """What combine reads: `x`, or with zero_copy the buffer that the experts wrote to."""
        rows = _tensors.check_tensor("x", x, self._device, plan.expert_rows, BFLOAT16)
        _tensors.check_alignment("x", rows)
        if not zero_copy:
            return rows
        buffers = self._combine_buffers.get(plan.expert_rows)
        if buffers is None or buffers.lent is None:
            raise InvalidArgument(
                "low_latency_combine: zero_copy sends what get_next_low_latency_combine_buffer(handle) "
                "has lent, which must be called, and filled, before each such combine")
        return buffers.lent

    def next_combine_buffer(self, handle: Any) -> torch.Tensor:
        self.require("get_next_low_latency_combine_buffer")
        _, hidden, _ = self._check_handle(handle)
        shape = (*handle[0].shape, hidden)
        return self._combine_buffers.setdefault(shape, CombineBuffers()).lend(shape, self._device)

    # Masks

    def masked_ranks(self, name: str) -> torch.Tensor:
        """int32 [R], the native words themselves; work on them comes after all calls so far."""
        self.require(name)
        if not self._is_shrinkable:
            raise InvalidArgument(f"{name}: build the Buffer with enable_shrink=True, got enable_shrink=False")
        session = self._session
        with session.streams.low_latency_operation(is_async=False) as operation:
            operation.start((), ())
            operation.finish()
        num_bytes = session.num_ranks * INT32_BYTES
        return view_memory(session.runtime.masked_ranks_ptr, num_bytes, session.streams.device).view(torch.int32)


def _compare_calls(check: CallCheck, operation: str, plan: Plan, options: dict[str, bool]) -> None:
    """With those of the other ranks."""
    num_max_tokens, hidden, num_experts = plan.handle_tail
    shape = {
        "num_max_dispatch_tokens_per_rank": num_max_tokens,
        "the row size of x": hidden,
        "num_experts": num_experts,
        "the columns of topk_idx": plan.num_topk
    }
    check.compare(operation, {**shape, **options})


def _run(session: Session, name: str, operation: Operation, args: Args, tensors: Tensors,
         wants_hook: bool) -> tuple[EventOverlap, Optional[Hook]]:
    """Both phases in one launch, or the send phase and a hook for the other. They use `tensors`."""
    launch: Callable[..., int] = getattr(session.runtime, name)
    operation.start(tensors, ())
    try:
        ticket = launch(args, NativeBuffer.SEND_PHASE if wants_hook else NativeBuffer.BOTH_PHASES, operation.stream)
        if not wants_hook:
            return overlap_of(operation.finish(), tensors), None
        operation.pause()
    except BaseException:
        operation.abandon()
        raise
    return EventOverlap(None), Hook(session, name, operation, args, ticket, tensors)
