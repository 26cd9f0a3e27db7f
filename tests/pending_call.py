"""One dispatch and what follows it on this rank, each step checked against the reference."""

import functools
from dataclasses import dataclass
from typing import Any, Optional

import torch
from compare import equal, poisoned, same_bits, same_numbers
from reference import Arrival, Layout, RailPlaces, Sent, combine, dispatch, layout, positions, rail_places
from utils import Worker
from workload import Workload

from deep_ep import Config


@dataclass(frozen=True)
class How:
    """How the calls are made."""

    is_async: bool = False
    on_comm_stream: bool = False  # needs is_async
    has_previous: bool = False  # pass an event; implied by on_comm_stream
    has_topk: bool = True
    expert_alignment: int = 1
    worst_factor: int = 0  # num_worst_tokens = factor * all tokens of the group; 0: count first
    num_sms: int = 4
    lends: bool = False  # inputs of combine come from Buffer.lend


def dispatch_arguments(counted: Any) -> dict[str, Any]:
    """What `get_dispatch_layout` returned, as arguments of `dispatch`."""
    names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
    return dict(zip(names, counted))


@functools.lru_cache(maxsize=8)
def expected(work: Workload, expert_alignment: int) -> tuple[list[Sent], list[Arrival]]:
    sent = work.sent()
    return sent, [dispatch(sent, rank, work.num_experts, expert_alignment) for rank in range(work.num_ranks)]


@functools.lru_cache(maxsize=8)
def expected_rail(work: Workload, ranks_per_node: int) -> list[RailPlaces]:
    sent = work.sent()
    return [rail_places(sent, rank, work.num_experts, ranks_per_node) for rank in range(work.num_ranks)]


class PendingCall:
    """Call the steps in the order of the methods; every rank of the group must make the same ones."""

    def __init__(self, worker: Worker, buffer: Any, work: Workload, how: Optional[How] = None) -> None:
        self.buffer, self.work, self.how = buffer, work, how or How()
        self.ranks_per_node: int = buffer._session.topology.ranks_per_node
        self.rank, self.device = worker.rank, worker.device
        self.sent, self.arrivals = expected(work, self.how.expert_alignment)
        self.config: Optional[Config] = Config(self.how.num_sms, 4, 8)
        self.handle: Any = None
        self.result: Any = None

    @property
    def mine(self) -> Sent:
        return self.sent[self.rank]

    @property
    def arrival(self) -> Arrival:
        return self.arrivals[self.rank]

    @property
    def num_nodes(self) -> int:
        return self.work.num_ranks // self.ranks_per_node

    @property
    def recv_src_idx(self) -> torch.Tensor:
        """Of the handle."""
        found: torch.Tensor = self.handle[3 if self.num_nodes == 1 else 7]
        return found

    @property
    def num_worst_tokens(self) -> int:
        return self.how.worst_factor * max(1, sum(self.work.num_tokens))

    def stream_options(self) -> dict[str, Any]:
        has_previous = self.how.has_previous or self.how.on_comm_stream
        return {
            "previous_event": self.buffer.capture() if has_previous else None,
            "async_finish": self.how.is_async,
            "allocate_on_comm_stream": self.how.on_comm_stream
        }

    def landed(self, event: Any) -> None:
        assert (event.event is not None) == self.how.is_async, "an event exactly when asynchronous"
        if self.how.is_async:
            event.current_stream_wait()
        if self.device.type == "cuda":
            # The host has not waited for the kernel: only now can its failure be known.
            torch.cuda.current_stream().synchronize()
            self.buffer.check()

    def payload(self) -> Any:
        x = self.mine.x.to(self.device)
        if self.mine.scales is None:
            return x
        # .to(device) keeps the strides of a dense tensor only: lay the scales out again over there.
        scales = self.mine.scales
        moved = torch.empty(0, dtype=scales.dtype, device=self.device)
        storage = scales.untyped_storage()
        flat = torch.frombuffer(bytearray(bytes(storage)), dtype=scales.dtype) if storage.nbytes() else moved
        moved = flat.to(self.device).as_strided(scales.shape, scales.stride(), scales.storage_offset())
        return x, moved

    def layout(self) -> "PendingCall":
        self.topk_idx = self.mine.topk_idx.to(self.device)
        with poisoned():
            got = self.buffer.get_dispatch_layout(self.topk_idx, self.work.num_experts, **self.stream_options())
        self.landed(got[4])
        want: Layout = layout(self.mine.topk_idx, self.work.num_ranks, self.work.num_experts)
        same_bits("num_tokens_per_rank", got[0], want.num_tokens_per_rank)
        same_bits("num_tokens_per_rdma_rank", got[1],
                  want.num_tokens_per_node(self.ranks_per_node) if self.num_nodes > 1 else None)
        same_bits("num_tokens_per_expert", got[2], want.num_tokens_per_expert)
        same_bits("is_token_in_rank", got[3], want.is_token_in_rank)
        self.layout_tensors = dispatch_arguments(got)
        return self

    def start_dispatch(self) -> "PendingCall":
        how, topk = self.how, {}
        if how.has_topk:
            assert self.mine.topk_weights is not None
            topk = {"topk_idx": self.topk_idx, "topk_weights": self.mine.topk_weights.to(self.device)}
        with poisoned():
            self.result = self.buffer.dispatch(self.payload(),
                                               **self.layout_tensors,
                                               **topk,
                                               expert_alignment=how.expert_alignment,
                                               num_worst_tokens=self.num_worst_tokens,
                                               config=self.config,
                                               **self.stream_options())
        self.handle = self.result[4]
        return self

    def finish_dispatch(self) -> "PendingCall":
        recv_x, topk_idx, topk_weights, counts, handle, event = self.result
        self.landed(event)
        want, rows = self.arrival, self.arrival.x.shape[0]
        is_worst = self.how.worst_factor > 0
        self.check_payload(recv_x)
        equal("rows per expert", counts, [] if is_worst else want.num_tokens_per_expert)
        if self.how.has_topk:
            same_bits("recv_topk_idx", topk_idx[:rows], want.topk_idx)
            same_bits("recv_topk_weights", topk_weights[:rows], want.topk_weights)
            assert (topk_idx[rows:] == -1).all(), "unused rows of recv_topk_idx must be -1"
            assert (topk_weights[rows:] == 0).all(), "unused rows of recv_topk_weights must be 0"
        else:
            equal("top-k results", (topk_idx, topk_weights), (None, None))
        self.check_handle(handle)
        return self

    def check_payload(self, recv_x: Any) -> None:
        want = self.arrival
        recv_x, recv_scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
        if self.how.worst_factor:
            equal("rows of recv_x", recv_x.shape[0], self.num_worst_tokens)
            recv_x = recv_x[:want.x.shape[0]]
            recv_scales = recv_scales[:want.x.shape[0]] if recv_scales is not None else None
        same_bits("recv_x", recv_x, want.x)
        same_bits("recv_scales", recv_scales, want.scales)
        assert recv_scales is None or recv_scales.is_contiguous()

    def check_handle(self, handle: Any) -> None:
        equal("handle", (type(handle), len(handle)), (tuple, 6 if self.num_nodes == 1 else 10))
        assert all(isinstance(element, torch.Tensor) for element in handle)
        matrix, src_idx, in_rank, send_head = (0, 3, 4, 5) if self.num_nodes == 1 else (5, 7, 0, 2)
        node = self.rank // self.ranks_per_node
        same_bits("handle: rank_prefix_matrix", handle[matrix],
                  self.arrival.rank_prefix_matrix.split(self.ranks_per_node, 1)[node])
        same_bits("handle: recv_src_idx", handle[src_idx][:self.arrival.x.shape[0]], self.arrival.src_idx)
        sent = layout(self.mine.topk_idx, self.work.num_ranks, self.work.num_experts).is_token_in_rank
        same_bits("handle: is_token_in_rank", handle[in_rank], sent)
        same_bits("handle: send_head", handle[send_head], positions(sent))
        if self.num_nodes > 1:
            self.check_rail(handle)

    def check_rail(self, handle: Any) -> None:
        want = expected_rail(self.work, self.ranks_per_node)[self.rank]
        same_bits("handle: rail_prefix", handle[4], want.rail_prefix)
        same_bits("handle: recv_rank_prefix", handle[-4], want.recv_rank_prefix)
        same_bits("handle: send_rail_head", handle[8], want.send_rail_head)
        same_bits("handle: rail_head", handle[9][:want.rail_head.shape[0]], want.rail_head)
        if not self.how.worst_factor:
            equal("handle: rows of rail_head", handle[9].shape[0], want.rail_head.shape[0])

    def dispatch(self) -> "PendingCall":
        return self.start_dispatch().finish_dispatch()

    def cached_dispatch(self, other: Optional[Workload] = None) -> "PendingCall":
        """Other tokens with the routing of this pending."""
        numbers = PendingCall.__new__(PendingCall)
        numbers.__dict__.update(self.__dict__)
        if other is not None:
            x = [other.x(rank) for rank in range(other.num_ranks)]
            scales = [other.scales(rank) for rank in range(other.num_ranks)]
            numbers.sent = [Sent(x[r], self.sent[r].topk_idx, None, scales[r]) for r in range(len(x))]
            numbers.arrivals = [dispatch(numbers.sent, r, self.work.num_experts) for r in range(len(x))]
        with poisoned():
            got = self.buffer.dispatch(numbers.payload(), handle=self.handle, topk_idx=None, topk_weights=None,
                                       num_tokens_per_rank=None, is_token_in_rank=None, num_tokens_per_expert=None,
                                       config=self.config, **self.stream_options())  # yapf: disable
        self.landed(got[5])
        numbers.check_payload(got[0])
        equal("cached results", got[1:5], (None, None, None, None))
        return self

    def combine(self, num_biases: int = 0, has_weights: bool = True) -> "PendingCall":
        num_rows = [arrival.x.shape[0] for arrival in self.arrivals]
        returned, weights = self.work.returned(num_rows), self.work.returned_weights(num_rows)
        biases = self.work.biases(self.rank, num_biases)
        bias: Any = tuple(tensor.to(self.device) for tensor in biases)
        bias = None if num_biases == 0 else bias[0] if num_biases == 1 else bias
        rows = self.recv_src_idx.shape[0]  # more than received in the worst case: then the rest is garbage
        with poisoned():
            combined, combined_weights, event = self.buffer.combine(
                self.combine_input(self.padded(returned[self.rank], rows)), self.handle,
                self.padded(weights[self.rank], rows) if has_weights else None, bias, self.config,
                **self.stream_options())
        self.landed(event)
        num_tokens = self.mine.x.shape[0]
        nodes = self.ranks_per_node
        same_numbers("combined_x", combined, combine(returned, self.arrivals, self.rank, num_tokens, biases, nodes))
        want = combine(weights, self.arrivals, self.rank, num_tokens, (), nodes) if has_weights else None
        same_numbers("combined_topk_weights", combined_weights, want)
        return self

    def sum_of_copies(self, factor: float = 1) -> torch.Tensor:
        """What a combine makes of the rows that came, each multiplied."""
        returned = [(arrival.x.float() * factor).to(arrival.x.dtype) for arrival in self.arrivals]
        num_tokens = self.mine.x.shape[0]
        return combine(returned, self.arrivals, self.rank, num_tokens, (), self.ranks_per_node)

    def combine_input(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.how.lends:
            return rows
        lent: torch.Tensor = self.buffer.lend(rows.shape, rows.dtype)
        return lent.copy_(rows)

    def padded(self, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
        full = torch.full((num_rows, rows.shape[1]), float("nan"), dtype=rows.dtype)
        full[:rows.shape[0]] = rows
        return full.to(self.device)

    def whole_trip(self, num_biases: int = 0) -> None:
        self.layout().dispatch().combine(num_biases)
