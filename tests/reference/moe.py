"""Layout, dispatch and combine, one token at a time. Checked by hand-written cases in tests/unit/test_reference.py."""

from dataclasses import dataclass
from typing import Optional

import torch


@dataclass
class Layout:
    num_tokens_per_rank: torch.Tensor  # int32 [R]
    num_tokens_per_expert: torch.Tensor  # int32 [E]; counts entries of topk_idx, so a duplicate counts twice
    is_token_in_rank: torch.Tensor  # bool [N, R]

    def num_tokens_per_node(self, ranks_per_node: int) -> torch.Tensor:
        """int32 [R / ranks_per_node]"""
        return self.is_token_in_node(ranks_per_node).sum(0).int()

    def is_token_in_node(self, ranks_per_node: int) -> torch.Tensor:
        """bool [N, R / ranks_per_node]"""
        return torch.stack([ranks.any(1) for ranks in self.is_token_in_rank.split(ranks_per_node, 1)], 1)


@dataclass
class Sent:
    """What one rank gives to dispatch."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: Optional[torch.Tensor] = None
    scales: Optional[torch.Tensor] = None


@dataclass
class Arrival:
    """What one rank gets from dispatch."""

    x: torch.Tensor
    scales: Optional[torch.Tensor]
    topk_idx: torch.Tensor
    topk_weights: Optional[torch.Tensor]
    src_rank: list[int]
    src_idx: torch.Tensor  # int32 [M]
    num_tokens_per_expert: list[int]
    rank_prefix_matrix: torch.Tensor  # int32 [R, R]


def layout(topk_idx: torch.Tensor, num_ranks: int, num_experts: int) -> Layout:
    experts_per_rank = num_experts // num_ranks
    per_rank, per_expert = [0] * num_ranks, [0] * num_experts
    in_rank = torch.zeros((topk_idx.shape[0], num_ranks), dtype=torch.bool)
    for token, experts in enumerate(topk_idx.tolist()):
        for expert in experts:
            if expert >= 0:
                per_expert[expert] += 1
        for rank in {expert // experts_per_rank for expert in experts if expert >= 0}:
            in_rank[token, rank] = True
            per_rank[rank] += 1
    return Layout(torch.tensor(per_rank, dtype=torch.int32), torch.tensor(per_expert, dtype=torch.int32), in_rank)


def dispatch(sent: list[Sent], rank: int, num_experts: int, expert_alignment: int = 1) -> Arrival:
    """What `rank` receives when rank i sends `sent[i]`."""
    num_ranks = len(sent)
    experts_per_rank = num_experts // num_ranks
    first = rank * experts_per_rank
    layouts = [layout(one.topk_idx, num_ranks, num_experts) for one in sent]
    sources = [(src, token) for src in range(num_ranks) for token in range(sent[src].x.shape[0])
               if layouts[src].is_token_in_rank[token, rank]]
    local = [[
        expert - first if first <= expert < first + experts_per_rank else -1
        for expert in sent[src].topk_idx[token].tolist()
    ] for src, token in sources]
    topk_idx = torch.tensor(local, dtype=sent[rank].topk_idx.dtype).reshape(len(sources), sent[rank].topk_idx.shape[1])
    weights = _gather([one.topk_weights for one in sent], sources)
    if weights is not None:
        weights = torch.where(topk_idx >= 0, weights, torch.zeros_like(weights))
    entries = torch.stack([one.num_tokens_per_expert
                           for one in layouts]).sum(0)[first:first + experts_per_rank].tolist()
    x = _gather([one.x for one in sent], sources)
    assert x is not None
    return Arrival(x=x,
                   scales=_gather([one.scales for one in sent], sources),
                   topk_idx=topk_idx,
                   topk_weights=weights,
                   src_rank=[src for src, _ in sources],
                   src_idx=torch.tensor([token for _, token in sources], dtype=torch.int32),
                   num_tokens_per_expert=[-(-count // expert_alignment) * expert_alignment for count in entries],
                   rank_prefix_matrix=torch.stack([one.num_tokens_per_rank for one in layouts]).cumsum(0).int())


def _gather(tensors: list[Optional[torch.Tensor]], sources: list[tuple[int, int]]) -> Optional[torch.Tensor]:
    """Row `token` of `tensors[src]` for each (src, token), as bits."""
    if tensors[0] is None:
        return None
    out = torch.empty((len(sources), tensors[0].shape[1]), dtype=tensors[0].dtype)
    for row, (src, token) in enumerate(sources):
        tensor = tensors[src]
        assert tensor is not None
        out[row] = tensor[token]
    return out


def combine(returned: list[torch.Tensor],
            arrivals: list[Arrival],
            rank: int,
            num_tokens: int,
            biases: tuple[torch.Tensor, ...] = (),
            ranks_per_node: int = 0) -> torch.Tensor:
    """What `rank` gets back for its tokens when rank i returns row j of `returned[i]` for row j of `arrivals[i]`.

    Sums in float32 in the order of the ranks, then adds the biases, and rounds once to the dtype of `returned`. Where
    there are several nodes (of `ranks_per_node`, 0: one node), every other node sums its own rows so, rounds them
    once, and these sums come after the rows of the own node, in the order of the nodes.
    """
    num_ranks = len(arrivals)
    size = ranks_per_node or num_ranks
    total = torch.zeros((num_tokens, returned[0].shape[1]), dtype=torch.float32)
    _add_rows(total, returned, arrivals, rank, rank // size, size)
    for node in range(num_ranks // size):
        if node != rank // size:
            of_node = torch.zeros_like(total)
            _add_rows(of_node, returned, arrivals, rank, node, size)
            total += of_node.to(returned[0].dtype).float()
    for bias in biases:
        total += bias.float()
    return total.to(returned[0].dtype)


def _add_rows(total: torch.Tensor, returned: list[torch.Tensor], arrivals: list[Arrival], owner: int, node: int,
              ranks_per_node: int) -> None:
    """What the ranks of one node have for the tokens of `owner`."""
    for worker in range(node * ranks_per_node, (node + 1) * ranks_per_node):
        for row, (src, token) in enumerate(zip(arrivals[worker].src_rank, arrivals[worker].src_idx.tolist())):
            if src == owner:
                total[token] += returned[worker][row].float()
