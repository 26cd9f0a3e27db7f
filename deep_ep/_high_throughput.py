"""The high-throughput mode: get_dispatch_layout, dispatch and combine, and the handle that a dispatch leaves.

Checks, allocation, and the native calls in between. The native code tells "no top-k" and "no scales" by a count of
zero, never by an address: an empty tensor's is zero.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import torch

from deep_ep import _tensors
from deep_ep._peers import DEVICE, CallCheck, HandlePart
from deep_ep._session import Session
from deep_ep._streams import Operation
from deep_ep._tensors import (
    BFLOAT16,
    FLOAT32,
    INT32,
    LEAST_SPARE_ROWS,
    SPARE_SHARES,
    KnownTensors,
    Lender,
    Payload,
    RowForm,
    Spec,
    num_bytes_of,
)
from deep_ep.utils import EventHandle, EventOverlap, find_reinterpret, is_capturing, overlap_of
from deep_ep_cpp import (
    CombineArgs,
    DirectCalls,
    DispatchArgs,
    Error,
    InternodeCombineArgs,
    InternodeDispatchArgs,
    InternodeNotifyArgs,
    LayoutArgs,
    NotifyArgs,
    has_tensor_exchange,
)

Handle = tuple[torch.Tensor, ...]

DispatchResult = tuple[Payload, Optional[torch.Tensor], Optional[torch.Tensor], Optional[list[int]], Optional[Handle],
                       EventOverlap]
CombineResult = tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]

NO_BIASES = None, None
# Of a combine whose output is lent: fewer are quicker through slots (docs/performance/intranode.md, step 39), and for
# more tokens there are no flags.
LEAST_SUMS_SMS = 14
LEAST_SUMS_TOKENS, MOST_SUMS_TOKENS = 2048, 4096
ROWS_ALONE = CombineArgs(topk_weights=None, num_topk=0, bias=NO_BIASES, combined_topk_weights=None)
MAX_ALIGNMENT = 1 << 20  # of counts that are rounded up in 32 bits


class Rail(NamedTuple):
    """Where tokens stand that go to other nodes, or come from there."""

    prefix: torch.Tensor
    send_head: torch.Tensor
    head: torch.Tensor
    recv_rank_prefix: torch.Tensor  # for callers: no later call reads it


class Places(NamedTuple):
    """The tensors that a fresh dispatch writes, and that later calls with its handle read."""

    rank_prefix_matrix: torch.Tensor
    send_head: torch.Tensor
    rail: Optional[Rail]  # None: within a node

    def read_later(self) -> tuple[torch.Tensor, ...]:
        return self[:2] if self.rail is None else (*self[:2], *self.rail[:3])

    def written(self) -> tuple[torch.Tensor, ...]:
        return self[:2] if self.rail is None else (*self[:2], *self.rail)


class Routing(NamedTuple):
    """The checked arguments that say where tokens go in a fresh dispatch."""

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_node: Optional[torch.Tensor]  # None: within a node
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor
    topk_idx: Optional[torch.Tensor]
    topk_weights: Optional[torch.Tensor]


class Outputs(NamedTuple):
    """The tensors that a dispatch fills, in this order and as its arguments are named."""

    recv_x: torch.Tensor
    recv_scales: Optional[torch.Tensor]
    recv_topk_idx: Optional[torch.Tensor]
    recv_topk_weights: Optional[torch.Tensor]
    recv_src_idx: torch.Tensor  # absent where the call has a handle, which has it

    def payload(self) -> Payload:
        return self.recv_x if self.recv_scales is None else (self.recv_x, self.recv_scales)


class Kind(NamedTuple):
    """What dispatches with rows of one kind have in common."""

    form: RowForm  # of the Outputs
    args: DispatchArgs
    notify_args: NotifyArgs


@functools.lru_cache(maxsize=64)
def kind_of(hidden: int, dtype: torch.dtype, num_scales: int, scale_dtype: Optional[torch.dtype], num_topk: int,
            idx_dtype: Optional[torch.dtype], num_experts: int) -> Kind:
    """`num_experts`: 0 where the call has a handle."""
    form = RowForm([
        ((hidden, ), dtype),
        None if scale_dtype is None else ((num_scales, ), scale_dtype),
        None if idx_dtype is None else ((num_topk, ), idx_dtype),
        None if idx_dtype is None else ((num_topk, ), torch.float32),
        ((), torch.int32) if num_experts else None,
    ])
    row_bytes = hidden * dtype.itemsize
    args = DispatchArgs(row_bytes=row_bytes,
                        num_scales=num_scales,
                        num_topk=num_topk,
                        idx_bytes=8 if idx_dtype is None else idx_dtype.itemsize,
                        num_experts=num_experts,
                        is_cached=num_experts == 0)
    notify_args = NotifyArgs(num_experts=num_experts, row_bytes=row_bytes, num_topk=num_topk, num_scales=num_scales)
    return Kind(form, args, notify_args)


Counts = tuple[Optional[torch.Tensor], Optional[torch.Tensor]]
NO_COUNTS: Counts = None, None  # they have been exchanged
HOST_DOES_NOT_WAIT = 0  # in the place of an alignment


class Dispatch:
    """One dispatch: where its rows go, and the native calls."""

    def __init__(self, session: Session, rows: torch.Tensor, scales: Optional[torch.Tensor], routing: Optional[Routing],
                 places: Places, num_sms: int, operation: Operation) -> None:
        self.session = session
        self.rows = rows
        self.scales = scales
        self.routing = routing
        self.places = places
        self.num_tokens, hidden = rows.shape
        self.topk_idx = topk_idx = None if routing is None else routing.topk_idx
        self.counts: Counts = NO_COUNTS
        num_experts = 0
        if routing is not None:
            self.counts = routing.num_tokens_per_rank, routing.num_tokens_per_expert
            num_experts = routing.num_tokens_per_expert.shape[0]
        self.kind = kind_of(hidden, rows.dtype, 0 if scales is None else scales.shape[1],
                            None if scales is None else scales.dtype, 0 if topk_idx is None else topk_idx.shape[1],
                            None if topk_idx is None else topk_idx.dtype, num_experts)
        self.num_sms = num_sms
        self.operation = operation

    def cached(self, num_rows: int) -> Outputs:
        with self.operation.allocation():
            outputs = self._outputs(num_rows)
        self.operation.start((self.rows, self.scales, *self.places.read_later()), outputs)
        # The handle may come from a worst-case dispatch: fewer rows than it has room for are no error.
        self._send(outputs, num_rows, NO_COUNTS, True)
        return outputs

    def worst_case(self, num_rows: int) -> Outputs:
        with self.operation.allocation():
            outputs = self._outputs(num_rows)
        self._start(outputs)
        if self.places.rail is None:
            self._send(outputs, num_rows, self.counts, True)
        else:
            self._exchange_counts(HOST_DOES_NOT_WAIT)
            self._send(outputs, num_rows, NO_COUNTS, True)
        return outputs

    def counted(self, expert_alignment: int) -> tuple[int, list[int], Outputs]:
        """Rows that came, those of each expert, and the outputs."""
        lender = self.session.lender
        found = None
        if lender is not None and self.places.rail is None:  # across nodes a kernel of its own exchanges the counts
            found = self._guessed(lender, expert_alignment)
        if found is None:
            found = self._counted_first(expert_alignment)
        if lender is not None:
            lender.remember_rows(self.num_tokens, found[0])
        return found

    def _guessed(self, lender: Lender, expert_alignment: int) -> Optional[tuple[int, list[int], Outputs]]:
        """The rows move while the host learns how many they are. None: there is no room for what may come."""
        likely_rows = lender.guess_rows(self.num_tokens, self.session.num_ranks)
        form = self.kind.form
        reserved = lender.reserve(form, likely_rows, self.operation)
        if reserved is None:
            return None
        self._start(())
        self._send(reserved.addresses(), reserved.num_rows, self.counts, expert_alignment=expert_alignment)
        num_rows, per_expert, _ = self.session.runtime.wait_counts()
        if num_rows > reserved.num_rows:
            del reserved  # its memory may serve now
            return num_rows, per_expert, self._sent(num_rows)
        made = reserved.tensors(num_rows, lender.index) if num_rows else form.empty(self.session.empty, 0)
        outputs = Outputs._make(made)
        self.operation.add_lent(outputs)
        return num_rows, per_expert, outputs

    def _counted_first(self, expert_alignment: int) -> tuple[int, list[int], Outputs]:
        self._start(())
        self._exchange_counts(expert_alignment)
        num_rows, per_expert, num_rail_tokens = self.session.runtime.wait_counts()
        return num_rows, per_expert, self._sent(num_rows, num_rail_tokens)

    def _exchange_counts(self, expert_alignment: int) -> None:
        args = self.kind.notify_args.replace(num_tokens_per_rank=self.counts[0],
                                             num_tokens_per_expert=self.counts[1],
                                             expert_alignment=expert_alignment,
                                             rank_prefix_matrix=self.places.rank_prefix_matrix,
                                             num_tokens=self.num_tokens)
        runtime, stream, rail, routing = self.session.runtime, self.operation.stream, self.places.rail, self.routing
        if rail is None or routing is None:
            runtime.notify_dispatch(args, stream)
            return
        runtime.internode_notify(
            InternodeNotifyArgs(args,
                                num_tokens_per_node=routing.num_tokens_per_node,
                                recv_rank_prefix=rail.recv_rank_prefix,
                                rail_prefix=rail.prefix), stream)

    def _sent(self, num_rows: int, num_rail_tokens: int = 0) -> Outputs:
        """The second half of a call, whose counts have been exchanged."""
        made: tuple[Optional[torch.Tensor], ...]
        with self.operation.allocation():
            made = outputs = self._outputs(num_rows)
            if self.places.rail is not None:
                head = self.session.empty[torch.int32](num_rail_tokens, self.session.topology.ranks_per_node)
                self.places = self.places._replace(rail=self.places.rail._replace(head=head))
                made = (*outputs, head)
        self.operation.add(made)
        self._send(outputs, num_rows, NO_COUNTS)
        return outputs

    def _start(self, outputs: tuple[Optional[torch.Tensor], ...]) -> None:
        self.operation.start((self.rows, self.scales, *(self.routing or ())), (*self.places.written(), *outputs))

    def _outputs(self, num_rows: int) -> Outputs:
        """Lent to the peers where there is room for all."""
        lender, form = self.session.lender, self.kind.form
        made = None if lender is None else lender.tensors(form, num_rows, self.operation)
        return Outputs._make(form.empty(self.session.empty, num_rows) if made is None else made)

    def _send(self,
              addresses: Iterable[Any],
              num_rows: int,
              counts: Counts,
              is_worst_case: bool = False,
              expert_alignment: int = 0) -> None:
        """`addresses`: of the Outputs. `expert_alignment` > 0: the host waits for the counts."""
        routing, scales, topk_idx = self.routing, self.scales, self.topk_idx
        stride_token, stride_scale = (0, 0) if scales is None else scales.stride()
        recv_x, recv_scales, recv_topk_idx, recv_topk_weights, recv_src_idx = addresses
        places = self.places
        args = self.kind.args.replace(x=self.rows,
                                      num_tokens=self.num_tokens,
                                      scales=scales,
                                      scale_stride_token=stride_token,
                                      scale_stride_scale=stride_scale,
                                      topk_idx=topk_idx,
                                      topk_weights=None if routing is None else routing.topk_weights,
                                      num_tokens_per_rank=counts[0],
                                      num_tokens_per_expert=counts[1],
                                      is_token_in_rank=None if routing is None else routing.is_token_in_rank,
                                      rank_prefix_matrix=places.rank_prefix_matrix,
                                      send_head=places.send_head,
                                      recv_x=recv_x,
                                      recv_scales=recv_scales,
                                      recv_topk_idx=recv_topk_idx,
                                      recv_topk_weights=recv_topk_weights,
                                      recv_src_idx=recv_src_idx,
                                      num_recv_rows=num_rows,
                                      is_worst_case=is_worst_case,
                                      expert_alignment=expert_alignment)
        runtime, stream, rail = self.session.runtime, self.operation.stream, places.rail
        if rail is None:
            runtime.dispatch(args, self.num_sms, stream)
        else:
            runtime.internode_dispatch(
                InternodeDispatchArgs(args,
                                      rail_prefix=rail.prefix,
                                      send_rail_head=rail.send_head,
                                      rail_head=rail.head,
                                      num_rail_rows=rail.head.shape[0]), self.num_sms, stream)


class Handles:
    """Makes and reads the handles of one Buffer: what a dispatch leaves for combine and for later dispatches.

    A handle is a tuple of tensors, and callers count on their order.

    R ranks, N nodes of L ranks, T tokens of this rank, M rows that it received, F tokens that it forwards to its
    node. Within a node:

      rank_prefix_matrix int32 [R, R]; [src][dst]: one past the last row that dst receives from src
      two tensors without data, of which this version has no use
      recv_src_idx int32 [M]; index of the received token at its source
      is_token_in_rank bool [T, R]
      send_head int32 [T, R]; position among the tokens sent to that rank, -1: not sent

    Across nodes:

      is_token_in_rank bool [T, R]
      a tensor without data
      send_head int32 [T, R]
      a tensor without data
      rail_prefix int32 [N]; one past the last token that this rank forwards from the nodes up to that one
      rank_prefix_matrix int32 [R, L]; of the ranks of this node alone
      recv_rank_prefix int32 [R]; one past the last row that this rank receives from the ranks up to that one
      recv_src_idx int32 [M]
      send_rail_head int32 [T, N]; position among the tokens sent to that node, -1: not sent, or the own node
      rail_head int32 [F, L]; position of the forwarded token among those of its source at each rank, -1: not there
    """

    def __init__(self, session: Session) -> None:
        topology = session.topology
        self._session = session
        self._num_ranks, self._num_nodes = session.num_ranks, topology.num_nodes
        self._ranks_per_node = topology.ranks_per_node
        self._num_fields = 6 if topology.num_nodes == 1 else 10
        self._known = KnownTensors[tuple[int, int]]()  # send_head, rank_prefix_matrix, recv_src_idx: T, M
        self._known_rails = KnownTensors[int]()  # send_rail_head, rail_prefix, rail_head: T
        # In the place of the tensors of a handle that this version has no use for; no data, so all can share it.
        self.unused = torch.empty(session.num_ranks, 0, dtype=torch.int32, device=session.streams.device)

    def new_places(self, num_tokens: int, num_rail_rows: int) -> Places:
        """For a fresh dispatch. `num_rail_rows`: that rail_head is to hold, 0 where nobody knows yet."""
        make, num_ranks, num_nodes = self._session.empty[torch.int32], self._num_ranks, self._num_nodes
        rail = None
        if num_nodes > 1:
            rail = Rail(make(num_nodes), make(num_tokens, num_nodes), make(num_rail_rows, self._ranks_per_node),
                        make(num_ranks))
        return Places(make(num_ranks, self._ranks_per_node), make(num_tokens, num_ranks), rail)

    def make(self, places: Places, is_token_in_rank: torch.Tensor, recv_src_idx: torch.Tensor, num_tokens: int,
             num_rows: int) -> Handle:
        matrix, send_head, rail = places
        unused = self.unused
        self._known.add((num_tokens, num_rows), send_head, matrix, recv_src_idx)
        if rail is None:
            return matrix, unused, unused, recv_src_idx, is_token_in_rank, send_head
        self._known_rails.add(num_tokens, rail.send_head, rail.prefix, rail.head)
        return (is_token_in_rank, unused, send_head, unused, rail.prefix, matrix, rail.recv_rank_prefix, recv_src_idx,
                rail.send_head, rail.head)

    def read(self, handle: Any) -> tuple[Places, int, int]:
        """What is in the handle of a dispatch, also after a trip through save_for_backward; T and M."""
        if not isinstance(handle, (tuple, list)):
            raise TypeError(f"handle must be the tuple that dispatch returned, got {type(handle).__name__}")
        if len(handle) != self._num_fields:
            raise ValueError(f"handle must have {self._num_fields} tensors, got {len(handle)}")
        rail = None
        if len(handle) == 6:
            matrix, _, _, recv_src_idx, _, send_head = handle
        else:
            _, _, send_head, _, prefix, matrix, recv_rank_prefix, recv_src_idx, send_rail_head, rail_head = handle
            rail = Rail(prefix, send_rail_head, rail_head, recv_rank_prefix)
        known = self._known.find(send_head, matrix, recv_src_idx)
        if known is None:
            known = self._check(handle, matrix, send_head, recv_src_idx)
        if rail is not None and self._known_rails.find(rail.send_head, rail.prefix, rail.head) != known[0]:
            self._check_rail(rail, known[0])
        return Places(matrix, send_head, rail), known[0], known[1]

    @staticmethod
    def src_idx(handle: Any) -> torch.Tensor:
        """Of a handle that has been read."""
        found: torch.Tensor = handle[3] if len(handle) == 6 else handle[7]
        return found

    def fact(self, places: Places) -> dict[str, Any]:
        """What tells a handle from others, for the comparison of calls. Waits for the device."""
        matrix = places.rank_prefix_matrix.tolist()
        if places.rail is None:
            return {"the rank_prefix_matrix of the handle": matrix}
        topology = self._session.topology
        sent = (places.send_head >= 0).sum(0).tolist()
        return {"the dispatch of the handle": HandlePart(sent, topology.nodes[topology.node][0], matrix)}

    def _check(self, handle: Any, matrix: torch.Tensor, send_head: torch.Tensor,
               recv_src_idx: torch.Tensor) -> tuple[int, int]:
        """T and M."""
        device, num_ranks = self._session.streams.device, self._num_ranks
        places = (0, 3, 5) if len(handle) == 6 else (5, 7, 2)
        for place, name, shape in zip(places, ("rank_prefix_matrix", "recv_src_idx", "send_head"),
                                      ((num_ranks, self._ranks_per_node), (None, ), (None, num_ranks))):
            _tensors.check_tensor(f"handle[{place}] ({name})", handle[place], device, shape, INT32)
        known = send_head.shape[0], recv_src_idx.shape[0]
        self._known.add(known, send_head, matrix, recv_src_idx)
        return known

    def _check_rail(self, rail: Rail, num_tokens: int) -> None:
        device, num_nodes = self._session.streams.device, self._num_nodes
        _tensors.check_tensor("handle[4] (rail_prefix)", rail.prefix, device, (num_nodes, ), INT32)
        _tensors.check_tensor("handle[8] (send_rail_head)", rail.send_head, device, (num_tokens, num_nodes), INT32)
        _tensors.check_tensor("handle[9] (rail_head)", rail.head, device, (None, self._ranks_per_node), INT32)
        self._known_rails.add(num_tokens, rail.send_head, rail.prefix, rail.head)


@functools.lru_cache(maxsize=16)
def sums_row_form(hidden: int) -> RowForm:
    """Of the output of a combine."""
    return RowForm([((hidden, ), torch.bfloat16)])


# What a call comes after, and who waits for it: its previous_event, async_finish and allocate_on_comm_stream; see
# docs/api.md, "Streams and events". (A tuple, since a record of three would take as long to make as three checks.)
Ordering = tuple[Optional[EventOverlap], bool, bool]


def open_operation(session: Session, name: str, ordering: Ordering) -> Operation:
    """Settles the stream side of a call."""
    previous_event, is_async, on_comm_stream = ordering
    previous = getattr(previous_event, "event", None)
    if previous is not None and not isinstance(previous, EventHandle):
        raise TypeError(f"{name}: previous_event.event must be an EventHandle, got {type(previous).__name__}")
    if on_comm_stream and (previous is None or not is_async):
        raise Error(f"{name}: allocate_on_comm_stream needs a previous_event with an event, and async_finish=True")
    recorded = None if previous is None else previous._recorded
    operation = session.streams.operation(recorded, is_async, on_comm_stream)
    lender = session.lender
    if lender is not None and operation.current not in lender.noted:
        lender.note(operation.current)
    return operation


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
                "reinterpret": find_reinterpret(),
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
            self, topk_idx: torch.Tensor, num_experts: int, ordering: Ordering
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, EventOverlap]:
        session = self._session
        device, num_ranks, num_nodes = session.streams.device, session.num_ranks, session.topology.num_nodes
        num_tokens, num_topk = _tensors.check_topk_idx(topk_idx, device)
        num_experts = _tensors.check_int("num_experts", num_experts, 1, maximum=_tensors.MAX_LOCAL_EXPERTS * num_ranks)
        _tensors.check_num_experts("num_experts", num_experts, num_ranks)
        with open_operation(session, "get_dispatch_layout", ordering) as operation:
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
            event = overlap_of(operation.finish())
        self._known_layouts.add(True, in_rank, per_rank, per_expert)
        return per_rank, per_node, per_expert, in_rank, event

    def dispatch_fresh(self, x: Payload, routing: Routing, expert_alignment: int, num_worst_tokens: int, num_sms: int,
                       ordering: Ordering) -> DispatchResult:
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
        with open_operation(session, "dispatch", ordering) as operation:
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
            event = overlap_of(operation.finish())
        handle = self._handles.make(call.places, routing.is_token_in_rank, outputs.recv_src_idx, num_tokens, num_rows)
        return outputs.payload(), outputs.recv_topk_idx, outputs.recv_topk_weights, per_expert, handle, event

    def dispatch_cached(self, x: Payload, handle: Any, num_sms: int, ordering: Ordering) -> DispatchResult:
        session = self._session
        places, num_tokens, num_rows = self._handles.read(handle)
        rows, scales = _tensors.check_payload(x, session.streams.device)
        if rows.shape[0] != num_tokens:
            raise ValueError(f"x must have {num_tokens} rows, the tokens of the dispatch that made the handle, got "
                             f"{rows.shape[0]}")
        if session.call_check is not None:
            self._compare_calls(session.call_check, "dispatch with a handle", rows, scales, places=places)
        with open_operation(session, "dispatch", ordering) as operation:
            call = Dispatch(session, rows, scales, None, places, num_sms, operation)
            outputs = call.cached(num_rows)
            event = overlap_of(operation.finish())
        return outputs.payload(), None, None, None, None, event

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: Optional[torch.Tensor], bias: Any, num_sms: int,
                ordering: Ordering) -> CombineResult:
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
        biases = NO_BIASES if bias is None else _tensors.check_bias(bias, device, num_tokens, hidden)
        if session.call_check is not None:
            session.call_check.compare("combine", {
                "the row size of x": hidden,
                "the columns of topk_weights": num_topk,
                **self._handles.fact(places)
            })
        with open_operation(session, "combine", ordering) as operation:
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
            event = overlap_of(operation.finish())
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
            _tensors.check_layout(per_rank, per_expert, in_rank, device, (num_tokens, session.num_ranks))
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
            fault = _tensors.find_layout_fault(routing.num_tokens_per_rank, routing.num_tokens_per_node,
                                               routing.is_token_in_rank)
            facts["the length of num_tokens_per_expert"] = routing.num_tokens_per_expert.shape[0]
            facts["the columns of topk_idx"] = 0 if routing.topk_idx is None else routing.topk_idx.shape[1]
        check.compare(operation, facts, fault)


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
