"""One dispatch: its outputs, the native calls that fill them, and the handle that it leaves.

The native code tells "no top-k" and "no scales" by a count of zero, never by an address: an empty tensor's is zero.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional, Union

import torch

from deep_ep import _tensors
from deep_ep._peers import HandlePart
from deep_ep._session import Session
from deep_ep._streams import Operation
from deep_ep._tensors import KnownTensors, Lender, RowForm
from deep_ep_cpp import DispatchArgs, InternodeDispatchArgs, InternodeNotifyArgs, NotifyArgs

INT32 = (torch.int32, )
Handle = tuple[torch.Tensor, ...]

Payload = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


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
    """The tensors that a dispatch fills: in this order."""

    x: torch.Tensor
    scales: Optional[torch.Tensor]
    topk_idx: Optional[torch.Tensor]
    topk_weights: Optional[torch.Tensor]
    src_idx: torch.Tensor  # absent where the call has a handle, which has it

    def payload(self) -> Payload:
        return self.x if self.scales is None else (self.x, self.scales)


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
