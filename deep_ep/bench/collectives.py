"""The same layer without this library, as its user would write it with torch.distributed: what to compare with.

`Exchange` sends each token once to every rank that has one of its experts: sort, all-to-all of the counts, then of the
rows, and back. `Gather` sends every token to every rank: all-gather, and reduce-scatter of the ranks' parts.
tests/unit/test_bench.py checks that both give what the library gives.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deep_ep.bench.routing import Shape

# The names of torch 2.13; the older ones warn there.
_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_rows = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Plan:
    """Who gets what: known once the counts have been exchanged, and used again on the way back."""

    token_idx: torch.Tensor  # of every row sent, sorted by rank, then token
    sent: list[int]  # rows, by rank
    received: list[int]


def pack_topk(topk_idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Both as one float32 tensor [N, 2 K], so that they travel in one message."""
    return torch.cat([topk_idx.to(torch.int32).view(torch.float32), weights], dim=1)


def unpack_topk(packed: torch.Tensor, shape: Shape, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Local expert numbers, -1 with weight 0 for experts elsewhere."""
    local = packed[:, :shape.num_topk].contiguous().view(torch.int32).long() - rank * shape.num_local_experts
    is_here = (local >= 0) & (local < shape.num_local_experts)
    return torch.where(is_here, local, -1), torch.where(is_here, packed[:, shape.num_topk:], 0.0)


def as_parts(x: Any) -> list[torch.Tensor]:
    """The tensors of a payload as types that every backend sends."""
    tensors = x if isinstance(x, tuple) else (x, )
    return [tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor for tensor in tensors]


class _Routed:
    """What either way knows of a batch."""

    def __init__(self, group: dist.ProcessGroup, shape: Shape, topk_idx: torch.Tensor, weights: torch.Tensor) -> None:
        self._group = group
        self._shape = shape
        self._topk_idx = topk_idx
        self._weights = weights


class Exchange(_Routed):
    """All-to-all."""

    def plan(self) -> Plan:
        shape, idx = self._shape, self._topk_idx
        ranks = torch.where(idx >= 0, idx // shape.num_local_experts, shape.num_ranks)
        is_in_rank = torch.zeros((idx.shape[0], shape.num_ranks + 1), dtype=torch.bool, device=idx.device)
        is_in_rank = is_in_rank.scatter_(1, ranks, True)[:, :shape.num_ranks]
        sent = is_in_rank.sum(0)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        token_idx = is_in_rank.t().nonzero()[:, 1]
        counts = torch.stack([sent, received]).tolist()
        return Plan(token_idx, counts[0], counts[1])

    def dispatch(self, x: Any) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, Plan]:
        """Rows (and scales) in the order of source rank, then token; experts, weights."""
        plan = self.plan()
        rows = self.send(x, plan)
        packed = self._send(pack_topk(self._topk_idx, self._weights), plan)
        return (rows, *unpack_topk(packed, self._shape, self._group.rank()), plan)

    def send(self, x: Any, plan: Plan) -> list[torch.Tensor]:
        return [self._send(part, plan) for part in as_parts(x)]

    def _send(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        arrived = x.new_empty((sum(plan.received), x.shape[1]))
        rows = x.index_select(0, plan.token_idx)
        dist.all_to_all_single(arrived, rows, plan.received, plan.sent, group=self._group)
        return arrived

    def combine(self, rows: torch.Tensor, plan: Plan) -> torch.Tensor:
        """The sum of what came back for each token, in float32, rounded once."""
        back = rows.new_empty((len(plan.token_idx), rows.shape[1]))
        dist.all_to_all_single(back, rows, plan.sent, plan.received, group=self._group)
        total = torch.zeros((self._topk_idx.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
        return total.index_add_(0, plan.token_idx, back.float()).to(rows.dtype)


class Gather(_Routed):
    """All-gather and reduce-scatter. What a rank does not need is not taken out, which is in this one's favour."""

    def dispatch(self, x: Any) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Every token of every rank; experts, weights."""
        rows = [self._gather(part) for part in as_parts(x)]
        packed = self._gather(pack_topk(self._topk_idx, self._weights))
        return (rows, *unpack_topk(packed, self._shape, self._group.rank()))

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty((self._shape.num_ranks * x.shape[0], x.shape[1]))
        _gather_rows(gathered, x, group=self._group)
        return gathered

    def combine(self, parts: torch.Tensor) -> torch.Tensor:
        """parts: this rank's share of every token of every rank, zero where it has none. Summed in their own type."""
        total = parts.new_empty((parts.shape[0] // self._shape.num_ranks, parts.shape[1]))
        _reduce_rows(total, parts, group=self._group)
        return total
