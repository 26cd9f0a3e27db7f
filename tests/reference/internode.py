"""What a dispatch across nodes leaves beside its rows, one token at a time."""

from dataclasses import dataclass

import torch

from reference.moe import Layout, Sent, layout


@dataclass
class RailPlaces:
    """Of one rank: the parts of its handle that a handle within a node does not have."""

    rail_prefix: torch.Tensor  # int32 [N]; one past the last token that it forwards from the nodes up to each
    recv_rank_prefix: torch.Tensor  # int32 [R]; one past the last row that it receives from the ranks up to each
    send_rail_head: torch.Tensor  # int32 [T, N]; place of a token in the stream to that node; -1: none
    rail_head: torch.Tensor  # int32 [M_rail, L]; position of a forwarded token at each rank here; -1: not there


def positions(is_sent: torch.Tensor) -> torch.Tensor:
    """int32; of each token (a row) among those that go where the column says. -1: it does not go there."""
    return torch.where(is_sent, is_sent.cumsum(0) - 1, -1).int()


def rail_places(sent: list[Sent], rank: int, num_experts: int, ranks_per_node: int) -> RailPlaces:
    num_ranks = len(sent)
    node, index = divmod(rank, ranks_per_node)
    layouts: list[Layout] = [layout(one.topk_idx, num_ranks, num_experts) for one in sent]
    here = slice(node * ranks_per_node, (node + 1) * ranks_per_node)
    forwarded: list[torch.Tensor] = []
    ends = []
    for source_node in range(num_ranks // ranks_per_node):
        source = layouts[source_node * ranks_per_node + index]
        if source_node != node:
            is_forwarded = source.is_token_in_node(ranks_per_node)[:, node]
            forwarded.append(positions(source.is_token_in_rank)[is_forwarded, here])
        ends.append(sum(rows.shape[0] for rows in forwarded))
    is_on_rail = layouts[rank].is_token_in_node(ranks_per_node).clone()
    is_on_rail[:, node] = False
    return RailPlaces(rail_prefix=torch.tensor(ends, dtype=torch.int32),
                      recv_rank_prefix=torch.stack([one.num_tokens_per_rank[rank] for one in layouts]).cumsum(0).int(),
                      send_rail_head=positions(is_on_rail),
                      rail_head=torch.cat([torch.zeros((0, ranks_per_node), dtype=torch.int32), *forwarded]))
