"""One dispatch: its outputs, and the native calls that fill them.

The native code tells "no top-k" and "no scales" by a count of zero, never by an address: an empty tensor's is zero.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple, Optional, Union

import torch

from deep_ep._handles import Places
from deep_ep._memory import Lender, RowForm
from deep_ep._session import Session
from deep_ep._streams import Operation
from deep_ep_cpp import DispatchArgs, InternodeDispatchArgs, InternodeNotifyArgs, NotifyArgs

Payload = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


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


def address_of(tensor: Optional[torch.Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=64)
def output_row_form(hidden: int, dtype: torch.dtype, num_scales: int, scale_dtype: Optional[torch.dtype], num_topk: int,
                    idx_dtype: Optional[torch.dtype], has_src_idx: bool) -> RowForm:
    """Of the Outputs of a call."""
    return RowForm([
        ((hidden, ), dtype),
        None if scale_dtype is None else ((num_scales, ), scale_dtype),
        None if idx_dtype is None else ((num_topk, ), idx_dtype),
        None if idx_dtype is None else ((num_topk, ), torch.float32),
        ((), torch.int32) if has_src_idx else None,
    ])


NO_COUNTS = 0, 0  # they have been exchanged
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
        self.num_tokens, self.hidden = rows.shape
        self.num_scales = 0 if scales is None else scales.shape[1]
        self.topk_idx = None if routing is None else routing.topk_idx
        self.num_topk = 0 if self.topk_idx is None else self.topk_idx.shape[1]
        self.num_experts = 0 if routing is None else routing.num_tokens_per_expert.shape[0]
        self.counts = NO_COUNTS
        if routing is not None:
            self.counts = routing.num_tokens_per_rank.data_ptr(), routing.num_tokens_per_expert.data_ptr()
        self.num_sms = num_sms
        self.operation = operation

    def cached(self, num_rows: int) -> Outputs:
        with self.operation.allocation():
            outputs = self._outputs(num_rows)
        self.operation.start((self.rows, self.scales, *self.places.read_later()), outputs)
        # The handle may come from a worst-case dispatch: fewer rows than it has room for are no error.
        self._send(map(address_of, outputs), num_rows, NO_COUNTS, True)
        return outputs

    def worst_case(self, num_rows: int) -> Outputs:
        with self.operation.allocation():
            outputs = self._outputs(num_rows)
        self._start(outputs)
        if self.places.rail is None:
            self._send(map(address_of, outputs), num_rows, self.counts, True)
        else:
            self._exchange_counts(HOST_DOES_NOT_WAIT)
            self._send(map(address_of, outputs), num_rows, NO_COUNTS, True)
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
        form = self._row_form()
        reserved = lender.reserve(form, likely_rows, self.operation)
        if reserved is None:
            return None
        self._start(())
        self._send(reserved.addresses, reserved.num_rows, self.counts, expert_alignment=expert_alignment)
        num_rows, per_expert, _ = self.session.runtime.wait_counts()
        if num_rows > reserved.num_rows:
            del reserved  # its memory may serve now
            return num_rows, per_expert, self._sent(num_rows)
        made = reserved.tensors(num_rows) if num_rows else form.empty(self.session.empty, 0)
        outputs = Outputs(*made)  # type: ignore[arg-type]
        self.operation.add_lent(outputs)
        return num_rows, per_expert, outputs

    def _counted_first(self, expert_alignment: int) -> tuple[int, list[int], Outputs]:
        self._start(())
        self._exchange_counts(expert_alignment)
        num_rows, per_expert, num_rail_tokens = self.session.runtime.wait_counts()
        return num_rows, per_expert, self._sent(num_rows, num_rail_tokens)

    def _exchange_counts(self, expert_alignment: int) -> None:
        args = NotifyArgs(num_tokens_per_rank=self.counts[0],
                          num_tokens_per_expert=self.counts[1],
                          num_experts=self.num_experts,
                          expert_alignment=expert_alignment,
                          rank_prefix_matrix=self.places.rank_prefix_matrix.data_ptr(),
                          num_tokens=self.num_tokens,
                          row_bytes=self.hidden * self.rows.element_size(),
                          num_topk=self.num_topk,
                          num_scales=self.num_scales)
        runtime, stream, rail, routing = self.session.runtime, self.operation.stream, self.places.rail, self.routing
        if rail is None or routing is None:
            runtime.notify_dispatch(args, stream)
            return
        runtime.internode_notify(
            InternodeNotifyArgs(args,
                                num_tokens_per_node=address_of(routing.num_tokens_per_node),
                                recv_rank_prefix=rail.recv_rank_prefix.data_ptr(),
                                rail_prefix=rail.prefix.data_ptr()), stream)

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
        self._send(map(address_of, outputs), num_rows, NO_COUNTS)
        return outputs

    def _start(self, outputs: tuple[Optional[torch.Tensor], ...]) -> None:
        self.operation.start((self.rows, self.scales, *(self.routing or ())), (*self.places.written(), *outputs))

    def _outputs(self, num_rows: int) -> Outputs:
        """Lent to the peers where there is room for all."""
        lender, form = self.session.lender, self._row_form()
        made = None if lender is None else lender.tensors(form, num_rows, self.operation)
        if made is None:
            made = form.empty(self.session.empty, num_rows)
        return Outputs(*made)  # type: ignore[arg-type]

    def _row_form(self) -> RowForm:
        scales, topk_idx = self.scales, self.topk_idx
        return output_row_form(self.hidden, self.rows.dtype, self.num_scales, None if scales is None else scales.dtype,
                               self.num_topk, None if topk_idx is None else topk_idx.dtype, self.routing is not None)

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
                            scales=address_of(scales),
                            num_scales=self.num_scales,
                            scale_stride_token=stride_token,
                            scale_stride_scale=stride_scale,
                            topk_idx=address_of(topk_idx),
                            topk_weights=0 if routing is None else address_of(routing.topk_weights),
                            num_topk=self.num_topk,
                            idx_bytes=8 if topk_idx is None else topk_idx.element_size(),
                            num_experts=self.num_experts,
                            is_cached=routing is None,
                            num_tokens_per_rank=counts[0],
                            num_tokens_per_expert=counts[1],
                            is_token_in_rank=0 if routing is None else routing.is_token_in_rank.data_ptr(),
                            rank_prefix_matrix=self.places.rank_prefix_matrix.data_ptr(),
                            send_head=self.places.send_head.data_ptr(),
                            recv_x=recv_x,
                            recv_scales=recv_scales,
                            recv_topk_idx=recv_topk_idx,
                            recv_topk_weights=recv_topk_weights,
                            recv_src_idx=recv_src_idx,
                            num_recv_rows=num_rows,
                            is_worst_case=is_worst_case,
                            expert_alignment=expert_alignment)
        runtime, stream, rail = self.session.runtime, self.operation.stream, self.places.rail
        if rail is None:
            runtime.dispatch(args, self.num_sms, stream)
        else:
            runtime.internode_dispatch(
                InternodeDispatchArgs(args,
                                      rail_prefix=rail.prefix.data_ptr(),
                                      send_rail_head=rail.send_head.data_ptr(),
                                      rail_head=rail.head.data_ptr(),
                                      num_rail_rows=rail.head.shape[0]), self.num_sms, stream)
