"""Handles of one dispatch over several nodes are told from those of two, though no rank has the matrix of all ranks."""
from __future__ import annotations

import torch

from deep_ep._peers import HandlePart


def parts_of(sent: torch.Tensor, ranks_per_node: int) -> list[HandlePart]:
    """Of a dispatch in which rank s sends `sent[s][d]` tokens to rank d."""
    matrix = sent.cumsum(0)
    found = []
    for rank in range(len(sent)):
        first = rank // ranks_per_node * ranks_per_node
        found.append(HandlePart(sent[rank].tolist(), first, matrix[:, first:first + ranks_per_node].tolist()))
    return found


ONE = torch.tensor([[1, 2, 0, 4], [0, 0, 3, 1], [5, 1, 1, 1], [0, 0, 0, 0]])
OTHER = ONE + torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])


def test_the_parts_of_one_dispatch_agree() -> None:
    for size in (1, 2, 4):
        assert HandlePart.describe_contradictions(parts_of(ONE, size)) is None


def test_a_rank_with_the_handle_of_another_dispatch_contradicts() -> None:
    one, other = parts_of(ONE, 2), parts_of(OTHER, 2)
    said = HandlePart.describe_contradictions([*one[:3], other[3]])
    # It has sent more to rank 0, and to itself: node 0 has not received that, nor has rank 2's handle the second.
    assert said == "one by which other rows come to rank(s) 0, 1, 2 than the ranks send by theirs"
    said = HandlePart.describe_contradictions([*one[:2], *other[2:]])  # a node each
    assert said == "one by which other rows come to rank(s) 0, 1 than the ranks send by theirs"
