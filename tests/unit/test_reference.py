"""The reference against cases worked out by hand."""

import torch
from reference import Sent, combine, dispatch, layout

# Two ranks, four experts: rank 0 owns experts 0 and 1, rank 1 owns 2 and 3.
IDX_0 = torch.tensor([[0, 2], [1, 1], [-1, -1]])
IDX_1 = torch.tensor([[3, 2], [-1, 0]])


def sent() -> list[Sent]:
    return [
        Sent(torch.tensor([[10.], [11.], [12.]]), IDX_0, torch.tensor([[.1, .2], [.3, .4], [.5, .6]])),
        Sent(torch.tensor([[20.], [21.]]), IDX_1, torch.tensor([[.7, .8], [.9, 1.]]))
    ]


def test_layout_counts_entries_and_distinct_ranks() -> None:
    got = layout(IDX_0, 2, 4)
    assert got.num_tokens_per_rank.tolist() == [2, 1]
    assert got.num_tokens_per_expert.tolist() == [1, 2, 1, 0]
    assert got.is_token_in_rank.tolist() == [[True, True], [True, False], [False, False]]


def test_dispatch_orders_rows_by_source() -> None:
    first, second = dispatch(sent(), 0, 4), dispatch(sent(), 1, 4)
    assert first.x.tolist() == [[10.], [11.], [21.]]
    assert first.src_rank == [0, 0, 1]
    assert first.src_idx.tolist() == [0, 1, 1]
    assert second.x.tolist() == [[10.], [20.]]
    assert second.src_idx.tolist() == [0, 0]
    assert first.rank_prefix_matrix.tolist() == second.rank_prefix_matrix.tolist() == [[2, 1], [3, 2]]


def test_dispatch_localises_experts_and_clears_foreign_weights() -> None:
    first, second = dispatch(sent(), 0, 4), dispatch(sent(), 1, 4)
    assert first.topk_idx.tolist() == [[0, -1], [1, 1], [-1, 0]]
    assert second.topk_idx.tolist() == [[-1, 0], [1, 0]]
    assert first.topk_weights is not None
    assert torch.equal(first.topk_weights, torch.tensor([[.1, 0.], [.3, .4], [0., 1.]]))


def test_dispatch_aligns_counts() -> None:
    assert dispatch(sent(), 0, 4).num_tokens_per_expert == [2, 2]
    assert dispatch(sent(), 1, 4).num_tokens_per_expert == [2, 1]
    assert dispatch(sent(), 1, 4, expert_alignment=4).num_tokens_per_expert == [4, 4]


def test_combine_sums_over_ranks() -> None:
    arrivals = [dispatch(sent(), rank, 4) for rank in range(2)]
    returned = [torch.tensor([[1.], [2.], [4.]]), torch.tensor([[8.], [16.]])]
    assert combine(returned, arrivals, 0, 3).tolist() == [[9.], [2.], [0.]]
    assert combine(returned, arrivals, 1, 2).tolist() == [[16.], [4.]]
    assert combine(returned, arrivals, 1, 2, (torch.tensor([[.5], [.25]]), torch.ones(2, 1))).tolist() == [[17.5],
                                                                                                           [5.25]]


def test_combine_rounds_once() -> None:
    """1 + 2^-8 needs 9 bits: rounding after each addition would lose what the sum of both small parts keeps."""
    tiny = 2.0**-9
    one = Sent(torch.ones(1, 1), torch.tensor([[0, 1, 2]]))
    empty = Sent(torch.ones(0, 1), torch.zeros((0, 3), dtype=torch.int64))
    arrivals = [dispatch([one, empty, empty], rank, 3) for rank in range(3)]
    returned = [torch.tensor([[value]], dtype=torch.bfloat16) for value in (1., tiny * 2, tiny * 2)]
    assert combine(returned, arrivals, 0, 1).item() == 1 + tiny * 4
