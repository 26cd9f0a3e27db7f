"""get_dispatch_layout, dispatch and combine within a node: checks, allocation, and the native calls in between.

The native code tells "no top-k" and "no scales" by a count of zero, never by an address: an empty tensor's is zero.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Optional, Union

import torch

from deep_ep import _checks
from deep_ep._checks import KnownTensors
from deep_ep._env import is_capturing
from deep_ep._memory import Lender, Spec, num_bytes_of
from deep_ep._peers import handle_fact
from deep_ep._session import Session
from deep_ep._streams import Operation
from deep_ep.utils import EventHandle, EventOverlap
from deep_ep_cpp import CombineArgs, DispatchArgs, Error, LayoutArgs, NotifyArgs

Payload = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
DispatchResult = tuple[Payload, Optional[torch.Tensor], Optional[torch.Tensor], Optional[list[int]],
                       Optional[tuple[torch.Tensor, ...]], EventOverlap]

BFLOAT16 = (torch.bfloat16, )
FLOAT32 = (torch.float32, )
INT32 = (torch.int32, )

# A handle is what a dispatch leaves for combine and for later dispatches with the same routing (R ranks, N tokens of
# this rank, M rows received), in this order, on which callers count:
#   rank_prefix_matrix int32 [R, R]; [src][dst]: one past the last row that dst receives from src
#   two tensors without data, of which this version has no use
#   recv_src_idx int32 [M]; index of the received token at its source
#   is_token_in_rank bool [N, R]
#   send_head int32 [N, R]; position among the tokens sent to that rank, -1: not sent
NUM_HANDLE_FIELDS = 6

NO_BIASES = None, None
MAX_ALIGNMENT = 1 << 20  # of counts that are rounded up in 32 bits


class Routing(NamedTuple):
    """The checked arguments that say where tokens go in a fresh dispatch."""

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor
    topk_idx: Optional[torch.Tensor]
    topk_weights: Optional[torch.Tensor]


class Outputs(NamedTuple):
    """The tensors that a dispatch fills: in this order."""

    x: torch.Tensor
    scales: Optional[torch.Tensor]
    topk_idx: Optional[torch.Tensor]
    topk_weights: Optional[torch.Tensor]
    src_idx: torch.Tensor  # absent where the call has a handle, which has it

    def payload(self) -> Payload:
        return self.x if self.scales is None else (self.x, self.scales)


def open_operation(session: Session, name: str, previous_event: Optional[EventOverlap], async_finish: bool,
                   allocate_on_comm_stream: bool) -> Operation:
    """Settles the stream side of a call."""
    previous = getattr(previous_event, "event", None)
    if previous is not None and not isinstance(previous, EventHandle):
        raise TypeError(f"{name}: previous_event.event must be an EventHandle, got {type(previous).__name__}")
    if allocate_on_comm_stream and (previous is None or not async_finish):
        raise Error(f"{name}: allocate_on_comm_stream needs a previous_event with an event, and async_finish=True")
    recorded = None if previous is None else previous._recorded
    operation = session.streams.operation(recorded, async_finish, allocate_on_comm_stream)
    if session.lender is not None:
        session.lender.used_on(operation)
    return operation


def close_operation(operation: Operation) -> EventOverlap:
    recorded = operation.finish()
    return EventOverlap(EventHandle._wrap(recorded) if operation.is_async else None)


def _ptr(tensor: Optional[torch.Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class HighThroughput:
    """The high-throughput side of one Buffer."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known_handles = KnownTensors[tuple[int, int]]()  # send_head, rank_prefix_matrix, recv_src_idx: N, M
        self._known_layouts = KnownTensors[bool]()  # is_token_in_rank, num_tokens_per_rank, num_tokens_per_expert
        # In the place of the two matrices of a handle that this version has no use for; no data, so all can share it.
        self._unused_matrix = torch.empty(session.num_ranks, 0, dtype=torch.int32, device=session.streams.device)

    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int, previous_event: Optional[EventOverlap], async_finish: bool,
        allocate_on_comm_stream: bool
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, EventOverlap]:
        session = self._session
        device, num_ranks = session.streams.device, session.num_ranks
        num_tokens, num_topk = _checks.check_topk_idx(topk_idx, device)
        num_experts = _checks.check_int("num_experts", num_experts, 1, maximum=_checks.MAX_LOCAL_EXPERTS * num_ranks)
        _checks.check_num_experts("num_experts", num_experts, num_ranks)
        with open_operation(session, "get_dispatch_layout", previous_event, async_finish,
                            allocate_on_comm_stream) as operation:
            with operation.allocation():
                per_rank = session.empty[torch.int32](num_ranks)
                per_expert = session.empty[torch.int32](num_experts)
                in_rank = session.empty[torch.bool](num_tokens, num_ranks)
            operation.start((topk_idx, ), (per_rank, per_expert, in_rank))
            args = LayoutArgs(topk_idx=topk_idx.data_ptr(),
                              idx_bytes=topk_idx.element_size(),
                              num_tokens=num_tokens,
                              num_topk=num_topk,
                              num_experts=num_experts,
                              num_tokens_per_rank=per_rank.data_ptr(),
                              num_tokens_per_expert=per_expert.data_ptr(),
                              is_token_in_rank=in_rank.data_ptr())
            session.runtime.get_dispatch_layout(args, operation.stream)
            event = close_operation(operation)
        self._known_layouts.add(True, in_rank, per_rank, per_expert)
        return per_rank, None, per_expert, in_rank, event

    def dispatch_fresh(self, x: Payload, routing: Routing, expert_alignment: int, num_worst_tokens: int, num_sms: int,
                       previous_event: Optional[EventOverlap], async_finish: bool,
                       allocate_on_comm_stream: bool) -> DispatchResult:
        session = self._session
        rows, scales = _checks.check_payload(x, session.streams.device)
        num_tokens = rows.shape[0]
        self._check_routing(routing, num_tokens)
        expert_alignment = _checks.check_int("expert_alignment", expert_alignment, 1, maximum=MAX_ALIGNMENT)
        num_worst_tokens = _checks.check_int("num_worst_tokens", num_worst_tokens, 0)
        if num_worst_tokens and routing.topk_idx is None:
            raise ValueError(
                "num_worst_tokens needs topk_idx and topk_weights: -1 in recv_topk_idx marks the unused rows")
        num_experts = routing.num_tokens_per_expert.shape[0]
        self._compare_calls("dispatch", rows, scales, routing)
        with open_operation(session, "dispatch", previous_event, async_finish, allocate_on_comm_stream) as operation:
            if operation.is_captured and not num_worst_tokens:
                raise Error(
                    "dispatch: inside a CUDA graph the host cannot learn the receive count; pass num_worst_tokens, "
                    "or the handle of an earlier dispatch")
            with operation.allocation():
                rank_prefix_matrix, send_head = _notify_outputs(session, num_tokens)
            call = _Dispatch(session, rows, scales, routing, rank_prefix_matrix, send_head, num_experts, num_sms,
                             operation)
            if num_worst_tokens:
                num_rows, outputs = num_worst_tokens, call.worst_case(num_worst_tokens)
                per_expert: list[int] = []
            else:
                num_rows, per_expert, outputs = call.counted(expert_alignment)
            event = close_operation(operation)
        unused = self._unused_matrix
        handle = (rank_prefix_matrix, unused, unused, outputs.src_idx, routing.is_token_in_rank, send_head)
        self._known_handles.add((num_tokens, num_rows), send_head, rank_prefix_matrix, outputs.src_idx)
        return outputs.payload(), outputs.topk_idx, outputs.topk_weights, per_expert, handle, event

    def dispatch_cached(self, x: Payload, handle: Any, num_sms: int, previous_event: Optional[EventOverlap],
                        async_finish: bool, allocate_on_comm_stream: bool) -> DispatchResult:
        session = self._session
        device = session.streams.device
        rank_prefix_matrix, send_head, num_tokens, num_rows = self._read_handle(handle)
        rows, scales = _checks.check_payload(x, device)
        if rows.shape[0] != num_tokens:
            raise ValueError(f"x must have {num_tokens} rows, the tokens of the dispatch that made the handle, got "
                             f"{rows.shape[0]}")
        self._compare_calls("dispatch with a handle", rows, scales, rank_prefix_matrix=rank_prefix_matrix)
        with open_operation(session, "dispatch", previous_event, async_finish, allocate_on_comm_stream) as operation:
            call = _Dispatch(session, rows, scales, None, rank_prefix_matrix, send_head, 0, num_sms, operation)
            outputs = call.cached(num_rows)
            event = close_operation(operation)
        return outputs.payload(), None, None, None, None, event

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: Optional[torch.Tensor], bias: Any, num_sms: int,
                previous_event: Optional[EventOverlap], async_finish: bool,
                allocate_on_comm_stream: bool) -> tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        session = self._session
        device = session.streams.device
        rank_prefix_matrix, send_head, num_tokens, num_rows = self._read_handle(handle)
        given_rows, hidden = _checks.check_rows("x", x, device, BFLOAT16)
        if given_rows != num_rows:
            raise ValueError(f"x must have {num_rows} rows, those that the dispatch of this handle received, got "
                             f"{given_rows}")
        num_topk = 0
        if topk_weights is not None:
            _, num_topk = _checks.check_matrix("topk_weights", topk_weights, device, FLOAT32, num_rows)
        biases = NO_BIASES if bias is None else _check_bias(bias, device, num_tokens, hidden)
        if session.call_check is not None:
            session.call_check.compare("combine", {
                "the row size of x": hidden,
                "the columns of topk_weights": num_topk,
                **handle_fact(rank_prefix_matrix)
            })
        with open_operation(session, "combine", previous_event, async_finish, allocate_on_comm_stream) as operation:
            with operation.allocation():
                combined = session.empty[torch.bfloat16](num_tokens, hidden)
                weights = None if topk_weights is None else session.empty[torch.float32](num_tokens, num_topk)
            operation.start((x, topk_weights, *biases, rank_prefix_matrix, send_head), (combined, weights))
            args = CombineArgs(x=x.data_ptr(),
                               num_rows=num_rows,
                               hidden=hidden,
                               topk_weights=_ptr(topk_weights),
                               num_topk=num_topk,
                               bias=(_ptr(biases[0]), _ptr(biases[1])),
                               rank_prefix_matrix=rank_prefix_matrix.data_ptr(),
                               send_head=send_head.data_ptr(),
                               num_tokens=num_tokens,
                               combined_x=combined.data_ptr(),
                               combined_topk_weights=_ptr(weights))
            session.runtime.combine(args, num_sms, operation.stream)
            event = close_operation(operation)
        return combined, weights, event

    def lend(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        session = self._session
        lender = session.lender
        spec: Spec = _checks.check_sizes("shape", shape), _checks.check_dtype("dtype", dtype)
        num_bytes = num_bytes_of(spec)
        if lender is None and session.num_ranks > 1:
            raise Error("lend: this Buffer lends nothing; build it with a larger num_nvl_bytes, or with num_lend_bytes")
        if lender is None or num_bytes == 0:  # one rank reads its own input in place, wherever it is
            return torch.empty(spec[0], dtype=dtype, device=session.streams.device)
        if is_capturing():
            raise Error("lend: not while a CUDA graph is captured; take the tensor before the capture begins")
        made = lender.tensor(spec)
        if made is None:
            raise Error(f"lend: no room for {num_bytes} bytes; num_lend_bytes is {lender.num_bytes}, and the tensors "
                        "of earlier calls hold a part of it until they are dropped")
        return made

    def _read_handle(self, handle: Any) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """(rank_prefix_matrix, send_head, N, M) of a dispatch's handle, also after a trip through save_for_backward."""
        session = self._session
        if not isinstance(handle, (tuple, list)):
            raise TypeError(f"handle must be the tuple that dispatch returned, got {type(handle).__name__}")
        if len(handle) != NUM_HANDLE_FIELDS:
            raise ValueError(f"handle must have {NUM_HANDLE_FIELDS} tensors, got {len(handle)}")
        rank_prefix_matrix, _, _, recv_src_idx, _, send_head = handle
        known = self._known_handles.find(send_head, rank_prefix_matrix, recv_src_idx)
        if known is None:
            device, num_ranks = session.streams.device, session.num_ranks
            _checks.check_tensor("handle[0] (rank_prefix_matrix)", rank_prefix_matrix, device, (num_ranks, num_ranks),
                                 INT32)
            _checks.check_tensor("handle[3] (recv_src_idx)", recv_src_idx, device, (None, ), INT32)
            _checks.check_tensor("handle[5] (send_head)", send_head, device, (None, num_ranks), INT32)
            known = send_head.shape[0], recv_src_idx.shape[0]
            self._known_handles.add(known, send_head, rank_prefix_matrix, recv_src_idx)
        return rank_prefix_matrix, send_head, *known

    def _check_routing(self, routing: Routing, num_tokens: int) -> None:
        session = self._session
        device = session.streams.device
        per_rank, per_expert, in_rank = routing[:3]
        if not self._known_layouts.find(in_rank, per_rank, per_expert) or in_rank.shape[0] != num_tokens:
            _check_layout(per_rank, per_expert, in_rank, device, (num_tokens, session.num_ranks))
            self._known_layouts.add(True, in_rank, per_rank, per_expert)
        if routing.topk_idx is not None:
            shape = _checks.check_topk_idx(routing.topk_idx, device, num_tokens)
            _checks.check_tensor("topk_weights", routing.topk_weights, device, shape, FLOAT32)

    def _compare_calls(self,
                       operation: str,
                       rows: torch.Tensor,
                       scales: Optional[torch.Tensor],
                       routing: Optional[Routing] = None,
                       rank_prefix_matrix: Optional[torch.Tensor] = None) -> None:
        """With the other ranks, where that was asked for."""
        session = self._session
        if session.call_check is None:
            return
        facts: dict[str, Any] = {
            "the row size of x": rows.shape[1],
            "the dtype of x": str(rows.dtype),
            "the columns of the scales": 0 if scales is None else scales.shape[1]
        }
        fault = None
        if rank_prefix_matrix is not None:
            facts.update(handle_fact(rank_prefix_matrix))
        if routing is not None:
            fault = _find_layout_fault(routing)
            facts["the length of num_tokens_per_expert"] = routing.num_tokens_per_expert.shape[0]
            facts["the columns of topk_idx"] = 0 if routing.topk_idx is None else routing.topk_idx.shape[1]
        session.call_check.compare(operation, facts, fault)


def _find_layout_fault(routing: Routing) -> Optional[str]:
    """Waits for the device."""
    given, counted = routing.num_tokens_per_rank.tolist(), routing.is_token_in_rank.sum(0).tolist()
    if given == counted:
        return None
    return f"num_tokens_per_rank must count the tokens in is_token_in_rank, which are {counted}, got {given}"


def copies_per_token(num_ranks: int, num_topk: int) -> float:
    """Ranks that a token goes to, on average, when its experts are drawn evenly."""
    return num_ranks * (1 - (1 - 1 / num_ranks)**num_topk)


def make_routing(num_tokens_per_rank: Optional[torch.Tensor], num_tokens_per_expert: Optional[torch.Tensor],
                 is_token_in_rank: Optional[torch.Tensor], topk_idx: Optional[torch.Tensor],
                 topk_weights: Optional[torch.Tensor]) -> Routing:
    """Checks that everything a fresh dispatch needs is there."""
    if num_tokens_per_rank is None or num_tokens_per_expert is None or is_token_in_rank is None:
        layout = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "num_tokens_per_expert": num_tokens_per_expert,
            "is_token_in_rank": is_token_in_rank
        }
        absent = [name for name, tensor in layout.items() if tensor is None]
        raise ValueError(f"{', '.join(absent)} must be given (take it from get_dispatch_layout) when handle is None")
    if (topk_idx is None) != (topk_weights is None):
        given, missing = ("topk_idx", "topk_weights") if topk_weights is None else ("topk_weights", "topk_idx")
        raise ValueError(f"topk_idx and topk_weights must be given together, got {given} without {missing}")
    return Routing(num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank, topk_idx, topk_weights)


def _check_layout(per_rank: torch.Tensor, per_expert: torch.Tensor, in_rank: torch.Tensor, device: torch.device,
                  shape: tuple[int, int]) -> None:
    _, num_ranks = shape
    _checks.check_tensor("num_tokens_per_rank", per_rank, device, (num_ranks, ), INT32)
    _checks.check_tensor("is_token_in_rank", in_rank, device, shape, (torch.bool, ))
    _checks.check_tensor("num_tokens_per_expert", per_expert, device, (None, ), INT32)
    _checks.check_num_experts("the length of num_tokens_per_expert", per_expert.shape[0], num_ranks)


def _check_bias(bias: Any, device: torch.device, num_tokens: int,
                hidden: int) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    given = bias if isinstance(bias, tuple) else (bias, )
    if not 1 <= len(given) <= 2:
        raise ValueError(f"bias must be a tensor or a tuple of two, got a tuple of {len(given)}")
    for i, tensor in enumerate(given):
        name = f"bias[{i}]" if isinstance(bias, tuple) else "bias"
        _checks.check_tensor(name, tensor, device, (num_tokens, hidden), BFLOAT16)
        _checks.check_alignment(name, tensor)
    return given[0], given[1] if len(given) == 2 else None


def _notify_outputs(session: Session, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """rank_prefix_matrix and send_head."""
    make, num_ranks = session.empty[torch.int32], session.num_ranks
    return make(num_ranks, num_ranks), make(num_tokens, num_ranks)


NO_COUNTS = 0, 0  # they have been exchanged


class _Dispatch:
    """One dispatch: where its rows go, and the native calls."""

    def __init__(self, session: Session, rows: torch.Tensor, scales: Optional[torch.Tensor], routing: Optional[Routing],
                 rank_prefix_matrix: torch.Tensor, send_head: torch.Tensor, num_experts: int, num_sms: int,
                 operation: Operation) -> None:
        self.session = session
        self.rows = rows
        self.scales = scales
        self.routing = routing
        self.matrix = rank_prefix_matrix
        self.send_head = send_head
        self.num_tokens, self.hidden = rows.shape
        self.num_scales = 0 if scales is None else scales.shape[1]
        self.topk_idx = None if routing is None else routing.topk_idx
        self.num_topk = 0 if self.topk_idx is None else self.topk_idx.shape[1]
        self.num_experts = num_experts
        self.counts = NO_COUNTS
        if routing is not None:
            self.counts = routing.num_tokens_per_rank.data_ptr(), routing.num_tokens_per_expert.data_ptr()
        self.num_sms = num_sms
        self.operation = operation

    def cached(self, num_rows: int) -> Outputs:
        with self.operation.allocation():
            outputs = self._outputs(num_rows)
        self.operation.start((self.rows, self.scales, self.matrix, self.send_head), outputs)
        # The handle may come from a worst-case dispatch: fewer rows than it has room for are no error.
        self._send(map(_ptr, outputs), num_rows, NO_COUNTS, True)
        return outputs

    def worst_case(self, num_rows: int) -> Outputs:
        with self.operation.allocation():
            outputs = self._outputs(num_rows)
        self._start(outputs)
        self._send(map(_ptr, outputs), num_rows, self.counts, True)
        return outputs

    def counted(self, expert_alignment: int) -> tuple[int, list[int], Outputs]:
        """Rows that came, those of each expert, and the outputs."""
        lender = self.session.lender
        found = None if lender is None else self._guessed(lender, expert_alignment)
        if found is None:
            found = self._counted_first(expert_alignment)
        if lender is not None:
            lender.remember_rows(self.num_tokens, found[0])
        return found

    def _guessed(self, lender: Lender, expert_alignment: int) -> Optional[tuple[int, list[int], Outputs]]:
        """The rows move while the host learns how many they are. None: there is no room for what may come."""
        likely_rows = lender.guess_rows(self.num_tokens, self.session.num_ranks)
        reserved = lender.reserve(self._output_specs(1), likely_rows, self.operation)
        if reserved is None:
            return None
        self._start(())
        self._send(reserved.addresses, reserved.num_rows, self.counts, expert_alignment=expert_alignment)
        num_rows, per_expert, _ = self.session.runtime.wait_counts()
        if num_rows > reserved.num_rows:
            del reserved  # its memory may serve now
            return num_rows, per_expert, self._sent(num_rows)
        outputs = Outputs(*reserved.tensors(num_rows))  # type: ignore[arg-type]
        self.operation.add_lent(outputs)
        return num_rows, per_expert, outputs

    def _counted_first(self, expert_alignment: int) -> tuple[int, list[int], Outputs]:
        self._start(())
        args = NotifyArgs(num_tokens_per_rank=self.counts[0],
                          num_tokens_per_expert=self.counts[1],
                          num_experts=self.num_experts,
                          expert_alignment=expert_alignment,
                          rank_prefix_matrix=self.matrix.data_ptr(),
                          num_tokens=self.num_tokens,
                          row_bytes=self.hidden * self.rows.element_size(),
                          num_topk=self.num_topk,
                          num_scales=self.num_scales)
        self.session.runtime.notify_dispatch(args, self.operation.stream)
        num_rows, per_expert, _ = self.session.runtime.wait_counts()
        return num_rows, per_expert, self._sent(num_rows)

    def _sent(self, num_rows: int) -> Outputs:
        """The second half of a call, whose counts have been exchanged."""
        with self.operation.allocation():
            outputs = self._outputs(num_rows)
        self.operation.add(outputs)
        self._send(map(_ptr, outputs), num_rows, NO_COUNTS)
        return outputs

    def _start(self, outputs: tuple[Optional[torch.Tensor], ...]) -> None:
        self.operation.start((self.rows, self.scales, *(self.routing or ())), (self.matrix, self.send_head, *outputs))

    def _outputs(self, num_rows: int) -> Outputs:
        """Lent to the peers where there is room for all."""
        lender, empty = self.session.lender, self.session.empty
        specs = self._output_specs(num_rows)
        made = None if lender is None else lender.tensors(specs, self.operation)
        if made is None:
            made = [spec and empty[spec[1]](*spec[0]) for spec in specs]
        return Outputs(*made)  # type: ignore[arg-type]

    def _output_specs(self, num_rows: int) -> list[Optional[Spec]]:
        """Of each of the Outputs; None where the call has no such output."""
        scales, topk_idx, topk_shape = self.scales, self.topk_idx, (num_rows, self.num_topk)
        return [
            ((num_rows, self.hidden), self.rows.dtype),
            None if scales is None else ((num_rows, self.num_scales), scales.dtype),
            None if topk_idx is None else (topk_shape, topk_idx.dtype),
            None if topk_idx is None else (topk_shape, torch.float32),
            None if self.routing is None else ((num_rows, ), torch.int32),
        ]

    def _send(self,
              addresses: Iterable[int],
              num_rows: int,
              counts: tuple[int, int],
              is_worst_case: bool = False,
              expert_alignment: int = 0) -> None:
        """`addresses`: of the Outputs. `expert_alignment` > 0: the host waits for the counts."""
        routing, scales, topk_idx = self.routing, self.scales, self.topk_idx
        stride_token, stride_scale = (0, 0) if scales is None else scales.stride()
        recv_x, recv_scales, recv_topk_idx, recv_topk_weights, recv_src_idx = addresses
        args = DispatchArgs(x=self.rows.data_ptr(),
                            num_tokens=self.num_tokens,
                            row_bytes=self.hidden * self.rows.element_size(),
                            scales=_ptr(scales),
                            num_scales=self.num_scales,
                            scale_stride_token=stride_token,
                            scale_stride_scale=stride_scale,
                            topk_idx=_ptr(topk_idx),
                            topk_weights=0 if routing is None else _ptr(routing.topk_weights),
                            num_topk=self.num_topk,
                            idx_bytes=8 if topk_idx is None else topk_idx.element_size(),
                            num_experts=self.num_experts,
                            is_cached=routing is None,
                            num_tokens_per_rank=counts[0],
                            num_tokens_per_expert=counts[1],
                            is_token_in_rank=0 if routing is None else routing.is_token_in_rank.data_ptr(),
                            rank_prefix_matrix=self.matrix.data_ptr(),
                            send_head=self.send_head.data_ptr(),
                            recv_x=recv_x,
                            recv_scales=recv_scales,
                            recv_topk_idx=recv_topk_idx,
                            recv_topk_weights=recv_topk_weights,
                            recv_src_idx=recv_src_idx,
                            num_recv_rows=num_rows,
                            is_worst_case=is_worst_case,
                            expert_alignment=expert_alignment)
        self.session.runtime.dispatch(args, self.num_sms, self.operation.stream)
