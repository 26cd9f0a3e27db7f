"""get_dispatch_layout, dispatch and combine: checks, allocation, and the native calls in between."""

import functools
from typing import Any, Optional

import torch

from deep_ep import _tensors
from deep_ep._dispatch import INT32, Dispatch, Handle, Handles, Payload, Places, Routing, kind_of
from deep_ep._peers import DEVICE, CallCheck
from deep_ep._session import Session
from deep_ep._streams import Operation
from deep_ep._tensors import LEAST_SPARE_ROWS, SPARE_SHARES, KnownTensors, RowForm, Spec, num_bytes_of
from deep_ep.utils import EventHandle, EventOverlap, is_capturing
from deep_ep_cpp import (
    CombineArgs,
    DirectCalls,
    Error,
    InternodeCombineArgs,
    LayoutArgs,
    has_tensor_exchange,
)

DispatchResult = tuple[Payload, Optional[torch.Tensor], Optional[torch.Tensor], Optional[list[int]], Optional[Handle],
                       EventOverlap]
CombineResult = tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]

BFLOAT16 = (torch.bfloat16, )
FLOAT32 = (torch.float32, )

NO_BIASES = None, None
# Of a combine whose output is lent: fewer are quicker through slots (docs/performance/intranode.md, step 39), and for
# more tokens there are no flags.
LEAST_SUMS_SMS = 14
LEAST_SUMS_TOKENS, MOST_SUMS_TOKENS = 2048, 4096
ROWS_ALONE = CombineArgs(topk_weights=None, num_topk=0, bias=NO_BIASES, combined_topk_weights=None)
MAX_ALIGNMENT = 1 << 20  # of counts that are rounded up in 32 bits


@functools.lru_cache(maxsize=16)
def sums_row_form(hidden: int) -> RowForm:
    """Of the output of a combine."""
    return RowForm([((hidden, ), torch.bfloat16)])


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
    lender = session.lender
    if lender is not None and operation.current not in lender.noted:
        lender.used_on(operation)
    return operation


def close_operation(operation: Operation) -> EventOverlap:
    recorded = operation.finish()
    return EventOverlap(EventHandle._wrap(recorded) if operation.is_async else None)


class HighThroughput:
    """The high-throughput side of one Buffer."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._handles = Handles(session)
        self._known_layouts = KnownTensors[bool]()  # is_token_in_rank, num_tokens_per_rank, num_tokens_per_expert

    def make_direct(self) -> None:
        """From now on the usual calls are made in one step, where that can be; the others come here."""
        session = self._session
        if session.topology.num_nodes > 1 or session.call_check is not None or not has_tensor_exchange():
            return
        has_sums = session.num_ranks == 2 and session.heap == DEVICE
        session.direct = DirectCalls(
            session, {
                "event_class": EventOverlap,
                "find_kind": kind_of,
                "unused": self._handles.unused,
                "int32": torch.int32,
                "int64": torch.int64,
                "float32": torch.float32,
                "bfloat16": torch.bfloat16,
                "least_sums_sms": LEAST_SUMS_SMS,
                "least_sums_tokens": LEAST_SUMS_TOKENS if has_sums else MOST_SUMS_TOKENS + 1,
                "most_sums_tokens": MOST_SUMS_TOKENS,
                "spare_shares": SPARE_SHARES,
                "least_spare_rows": LEAST_SPARE_ROWS
            })

    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int, previous_event: Optional[EventOverlap], async_finish: bool,
        allocate_on_comm_stream: bool
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, EventOverlap]:
        session = self._session
        device, num_ranks, num_nodes = session.streams.device, session.num_ranks, session.topology.num_nodes
        num_tokens, num_topk = _tensors.check_topk_idx(topk_idx, device)
        num_experts = _tensors.check_int("num_experts", num_experts, 1, maximum=_tensors.MAX_LOCAL_EXPERTS * num_ranks)
        _tensors.check_num_experts("num_experts", num_experts, num_ranks)
        with open_operation(session, "get_dispatch_layout", previous_event, async_finish,
                            allocate_on_comm_stream) as operation:
            with operation.allocation():
                per_rank = session.empty[torch.int32](num_ranks)
                per_node = session.empty[torch.int32](num_nodes) if num_nodes > 1 else None
                per_expert = session.empty[torch.int32](num_experts)
                in_rank = session.empty[torch.bool](num_tokens, num_ranks)
            operation.start((topk_idx, ), (per_rank, per_node, per_expert, in_rank))
            args = LayoutArgs(topk_idx=topk_idx,
                              idx_bytes=topk_idx.element_size(),
                              num_tokens=num_tokens,
                              num_topk=num_topk,
                              num_experts=num_experts,
                              num_nodes=num_nodes,
                              num_tokens_per_rank=per_rank,
                              num_tokens_per_node=per_node,
                              num_tokens_per_expert=per_expert,
                              is_token_in_rank=in_rank)
            session.runtime.get_dispatch_layout(args, operation.stream)
            event = close_operation(operation)
        self._known_layouts.add(True, in_rank, per_rank, per_expert)
        return per_rank, per_node, per_expert, in_rank, event

    def dispatch_fresh(self, x: Payload, routing: Routing, expert_alignment: int, num_worst_tokens: int, num_sms: int,
                       previous_event: Optional[EventOverlap], async_finish: bool,
                       allocate_on_comm_stream: bool) -> DispatchResult:
        session = self._session
        rows, scales = _tensors.check_payload(x, session.streams.device)
        num_tokens = rows.shape[0]
        self._check_routing(routing, num_tokens)
        expert_alignment = _tensors.check_int("expert_alignment", expert_alignment, 1, maximum=MAX_ALIGNMENT)
        num_worst_tokens = _tensors.check_int("num_worst_tokens", num_worst_tokens, 0)
        if num_worst_tokens and routing.topk_idx is None:
            raise ValueError(
                "num_worst_tokens needs topk_idx and topk_weights: -1 in recv_topk_idx marks the unused rows")
        if session.call_check is not None:
            self._compare_calls(session.call_check, "dispatch", rows, scales, routing)
        with open_operation(session, "dispatch", previous_event, async_finish, allocate_on_comm_stream) as operation:
            if operation.is_captured and not num_worst_tokens:
                raise Error(
                    "dispatch: inside a CUDA graph the host cannot learn the receive count; pass num_worst_tokens, "
                    "or the handle of an earlier dispatch")
            with operation.allocation():
                places = self._handles.new_places(num_tokens, num_worst_tokens)
            call = Dispatch(session, rows, scales, routing, places, num_sms, operation)
            if num_worst_tokens:
                num_rows, outputs = num_worst_tokens, call.worst_case(num_worst_tokens)
                per_expert: list[int] = []
            else:
                num_rows, per_expert, outputs = call.counted(expert_alignment)
            event = close_operation(operation)
        handle = self._handles.make(call.places, routing.is_token_in_rank, outputs.src_idx, num_tokens, num_rows)
        return outputs.payload(), outputs.topk_idx, outputs.topk_weights, per_expert, handle, event

    def dispatch_cached(self, x: Payload, handle: Any, num_sms: int, previous_event: Optional[EventOverlap],
                        async_finish: bool, allocate_on_comm_stream: bool) -> DispatchResult:
        session = self._session
        places, num_tokens, num_rows = self._handles.read(handle)
        rows, scales = _tensors.check_payload(x, session.streams.device)
        if rows.shape[0] != num_tokens:
            raise ValueError(f"x must have {num_tokens} rows, the tokens of the dispatch that made the handle, got "
                             f"{rows.shape[0]}")
        if session.call_check is not None:
            self._compare_calls(session.call_check, "dispatch with a handle", rows, scales, places=places)
        with open_operation(session, "dispatch", previous_event, async_finish, allocate_on_comm_stream) as operation:
            call = Dispatch(session, rows, scales, None, places, num_sms, operation)
            outputs = call.cached(num_rows)
            event = close_operation(operation)
        return outputs.payload(), None, None, None, None, event

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: Optional[torch.Tensor], bias: Any, num_sms: int,
                previous_event: Optional[EventOverlap], async_finish: bool,
                allocate_on_comm_stream: bool) -> CombineResult:
        session = self._session
        device = session.streams.device
        places, num_tokens, num_rows = self._handles.read(handle)
        src_idx = self._handles.src_idx(handle)
        given_rows, hidden = _tensors.check_rows("x", x, device, BFLOAT16)
        if given_rows != num_rows:
            raise ValueError(f"x must have {num_rows} rows, those that the dispatch of this handle received, got "
                             f"{given_rows}")
        num_topk = 0
        if topk_weights is not None:
            _, num_topk = _tensors.check_matrix("topk_weights", topk_weights, device, FLOAT32, num_rows)
        biases = NO_BIASES if bias is None else _check_bias(bias, device, num_tokens, hidden)
        if session.call_check is not None:
            session.call_check.compare("combine", {
                "the row size of x": hidden,
                "the columns of topk_weights": num_topk,
                **self._handles.fact(places)
            })
        with open_operation(session, "combine", previous_event, async_finish, allocate_on_comm_stream) as operation:
            with operation.allocation():
                combined = None
                if biases is NO_BIASES and num_sms >= LEAST_SUMS_SMS:
                    combined = self._lent_sums(x, num_tokens, hidden, operation)
                if combined is None:
                    combined = session.empty[torch.bfloat16](num_tokens, hidden)
                weights = None if topk_weights is None else session.empty[torch.float32](num_tokens, num_topk)
            operation.start((x, topk_weights, src_idx, *biases, *places.read_later()), (combined, weights))
            args = ROWS_ALONE.replace(x=x,
                                      num_rows=num_rows,
                                      hidden=hidden,
                                      rank_prefix_matrix=places.rank_prefix_matrix,
                                      send_head=places.send_head,
                                      src_idx=src_idx,
                                      num_tokens=num_tokens,
                                      combined_x=combined)
            if weights is not None or bias is not None:
                args = args.replace(topk_weights=topk_weights,
                                    num_topk=num_topk,
                                    bias=biases,
                                    combined_topk_weights=weights)
            rail = places.rail
            if rail is None:
                session.runtime.combine(args, num_sms, operation.stream)
            else:
                session.runtime.internode_combine(
                    InternodeCombineArgs(args,
                                         rail_prefix=rail.prefix,
                                         send_rail_head=rail.send_head,
                                         rail_head=rail.head,
                                         num_rail_tokens=rail.head.shape[0]), num_sms, operation.stream)
            event = close_operation(operation)
        return combined, weights, event

    def _lent_sums(self, x: torch.Tensor, num_tokens: int, hidden: int, operation: Operation) -> Optional[torch.Tensor]:
        """Between two ranks: an output where the peer writes its rows and this rank adds its own, or None."""
        session = self._session
        lender = session.lender
        if (lender is None or session.num_ranks != 2 or session.topology.num_nodes != 1 or session.heap != DEVICE
                or not LEAST_SUMS_TOKENS <= num_tokens <= MOST_SUMS_TOKENS or lender.owns(x)):
            return None
        made = lender.tensors(sums_row_form(hidden), num_tokens, operation)
        return None if made is None else made[0]

    def lend(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        session = self._session
        lender = session.lender
        spec: Spec = _tensors.check_sizes("shape", shape), _tensors.check_dtype("dtype", dtype)
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

    def _check_routing(self, routing: Routing, num_tokens: int) -> None:
        session = self._session
        device = session.streams.device
        per_rank, per_node, per_expert, in_rank = routing[:4]
        if not self._known_layouts.find(in_rank, per_rank, per_expert) or in_rank.shape[0] != num_tokens:
            _check_layout(per_rank, per_expert, in_rank, device, (num_tokens, session.num_ranks))
            self._known_layouts.add(True, in_rank, per_rank, per_expert)
        if per_node is not None:
            _tensors.check_tensor("num_tokens_per_rdma_rank", per_node, device, (session.topology.num_nodes, ), INT32)
        if routing.topk_idx is not None:
            shape = _tensors.check_topk_idx(routing.topk_idx, device, num_tokens)
            _tensors.check_tensor("topk_weights", routing.topk_weights, device, shape, FLOAT32)

    def _compare_calls(self,
                       check: CallCheck,
                       operation: str,
                       rows: torch.Tensor,
                       scales: Optional[torch.Tensor],
                       routing: Optional[Routing] = None,
                       places: Optional[Places] = None) -> None:
        """With the other ranks."""
        facts: dict[str, Any] = {
            "the row size of x": rows.shape[1],
            "the dtype of x": str(rows.dtype),
            "the columns of the scales": 0 if scales is None else scales.shape[1]
        }
        fault = None
        if places is not None:
            facts.update(self._handles.fact(places))
        if routing is not None:
            fault = _find_layout_fault(routing)
            facts["the length of num_tokens_per_expert"] = routing.num_tokens_per_expert.shape[0]
            facts["the columns of topk_idx"] = 0 if routing.topk_idx is None else routing.topk_idx.shape[1]
        check.compare(operation, facts, fault)


def _find_layout_fault(routing: Routing) -> Optional[str]:
    """Waits for the device."""
    in_rank, per_node = routing.is_token_in_rank, routing.num_tokens_per_node
    counts = {"num_tokens_per_rank": (routing.num_tokens_per_rank, in_rank)}
    if per_node is not None:
        (num_tokens, num_ranks), num_nodes = in_rank.shape, per_node.shape[0]
        in_node = in_rank.view(num_tokens, num_nodes, num_ranks // num_nodes).any(2)
        counts["num_tokens_per_rdma_rank"] = per_node, in_node
    for name, (tensor, is_sent) in counts.items():
        given, counted = tensor.tolist(), is_sent.sum(0).tolist()
        if given != counted:
            return f"{name} must count the tokens in is_token_in_rank, which are {counted}, got {given}"
    return None


def copies_per_token(num_ranks: int, num_topk: int) -> float:
    """Ranks that a token goes to, on average, when its experts are drawn evenly."""
    return num_ranks * (1 - (1 - 1 / num_ranks)**num_topk)


def make_routing(num_tokens_per_rank: Optional[torch.Tensor], num_tokens_per_node: Optional[torch.Tensor],
                 num_tokens_per_expert: Optional[torch.Tensor], is_token_in_rank: Optional[torch.Tensor],
                 topk_idx: Optional[torch.Tensor], topk_weights: Optional[torch.Tensor], num_nodes: int) -> Routing:
    """Checks that everything a fresh dispatch needs is there."""
    if num_nodes == 1:
        num_tokens_per_node = None
    if (num_tokens_per_rank is None or num_tokens_per_expert is None or is_token_in_rank is None
            or (num_tokens_per_node is None and num_nodes > 1)):
        layout = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "num_tokens_per_rdma_rank": num_tokens_per_node if num_nodes > 1 else (),
            "num_tokens_per_expert": num_tokens_per_expert,
            "is_token_in_rank": is_token_in_rank
        }
        absent = [name for name, tensor in layout.items() if tensor is None]
        raise ValueError(f"{', '.join(absent)} must be given (take it from get_dispatch_layout) when handle is None")
    if (topk_idx is None) != (topk_weights is None):
        given, missing = ("topk_idx", "topk_weights") if topk_weights is None else ("topk_weights", "topk_idx")
        raise ValueError(f"topk_idx and topk_weights must be given together, got {given} without {missing}")
    return Routing(num_tokens_per_rank, num_tokens_per_node, num_tokens_per_expert, is_token_in_rank, topk_idx,
                   topk_weights)


def _check_layout(per_rank: torch.Tensor, per_expert: torch.Tensor, in_rank: torch.Tensor, device: torch.device,
                  shape: tuple[int, int]) -> None:
    _, num_ranks = shape
    _tensors.check_tensor("num_tokens_per_rank", per_rank, device, (num_ranks, ), INT32)
    _tensors.check_tensor("is_token_in_rank", in_rank, device, shape, (torch.bool, ))
    _tensors.check_tensor("num_tokens_per_expert", per_expert, device, (None, ), INT32)
    _tensors.check_num_experts("the length of num_tokens_per_expert", per_expert.shape[0], num_ranks)


def _check_bias(bias: Any, device: torch.device, num_tokens: int,
                hidden: int) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    given = bias if isinstance(bias, tuple) else (bias, )
    if not 1 <= len(given) <= 2:
        raise ValueError(f"bias must be a tensor or a tuple of two, got a tuple of {len(given)}")
    for i, tensor in enumerate(given):
        name = f"bias[{i}]" if isinstance(bias, tuple) else "bias"
        _tensors.check_tensor(name, tensor, device, (num_tokens, hidden), BFLOAT16)
        _tensors.check_alignment(name, tensor)
    return given[0], given[1] if len(given) == 2 else None
