"""Which experts the tokens of a benchmark choose, and how many bytes that moves."""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

ROUTINGS = ("uniform", "hot-expert", "hot-rank", "dropped")

HOT_BIAS = 2.0
DROPPED_SHARE = 0.1


@dataclass(frozen=True)
class Shape:
    """The sizes of one measured workload; equal on all ranks."""

    num_ranks: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    routing: str

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks


def choose_experts(shape: Shape, rank: int, seed: int) -> torch.Tensor:
    """int64 [N, K]: distinct experts per token, drawn by random scores, so the same on every machine.

    uniform: every expert is as likely as any other. hot-expert, hot-rank: expert 0, or those of rank 0, get a higher
    score. dropped: a tenth of the entries is -1.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    scores = torch.randn(shape.num_tokens, shape.num_experts, generator=generator)
    if shape.routing == "hot-expert":
        scores[:, 0] += HOT_BIAS
    elif shape.routing == "hot-rank":
        scores[:, :shape.num_local_experts] += HOT_BIAS
    chosen = scores.topk(shape.num_topk, dim=1, sorted=False).indices
    if shape.routing == "dropped":
        chosen[torch.rand(chosen.shape, generator=generator) < DROPPED_SHARE] = -1
    return chosen


@lru_cache(maxsize=32)
def count_copies(shape: Shape, seed: int) -> torch.Tensor:
    """int64 [R, R]: tokens that rank i has for rank j, one copy per token and rank, own rank included."""
    copies = torch.zeros(shape.num_ranks, shape.num_ranks, dtype=torch.int64)
    for source in range(shape.num_ranks):
        experts = choose_experts(shape, source, seed)
        ranks = torch.where(experts >= 0, experts // shape.num_local_experts, shape.num_ranks)
        is_in_rank = torch.zeros(shape.num_tokens, shape.num_ranks + 1, dtype=torch.bool)
        is_in_rank.scatter_(1, ranks, True)
        copies[source] = is_in_rank[:, :shape.num_ranks].sum(0)
    return copies


def busiest_rail_copies(shape: Shape, seed: int, ranks_per_node: int) -> int:
    """The most copies that one rank sends to other nodes, or gets from there for its own: one of a token for each node.

    They come to the rank of a node that has the number of their source in its own.
    """
    num_nodes, experts_per_node = shape.num_ranks // ranks_per_node, shape.num_local_experts * ranks_per_node
    sent = torch.zeros(num_nodes, ranks_per_node, num_nodes, dtype=torch.int64)  # by node and number of the source
    for source in range(shape.num_ranks):
        experts = choose_experts(shape, source, seed)
        nodes = torch.where(experts >= 0, experts // experts_per_node, num_nodes)
        is_in_node = torch.zeros(shape.num_tokens, num_nodes + 1, dtype=torch.bool).scatter_(1, nodes, True)
        node, number = divmod(source, ranks_per_node)
        sent[node, number] = is_in_node[:, :num_nodes].sum(0)
        sent[node, number, node] = 0
    return int(max(sent.sum(2).max(), sent.sum(0).max()))


def busiest_remote_copies(copies: torch.Tensor) -> int:
    """The most copies that one rank sends to, or gets from, the others: what the slowest link carries."""
    remote = copies - torch.diag(torch.diag(copies))
    return int(max(remote.sum(0).max(), remote.sum(1).max()))
