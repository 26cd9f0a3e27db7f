"""The reference against cases worked out by hand."""

import torch
from reference import (
    Cast,
    Sent,
    combine,
    dispatch,
    layout,
    low_latency_combine,
    low_latency_dispatch,
    rail_places,
)

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


# Two nodes of two ranks, an expert on each: what each rank's tokens are for.
NODES_IDX = [[[0, 2], [3, 2], [1, -1]], [[2, -1]], [[0, 1], [-1, -1], [1, 3]], [[3, -1]]]


def sent_over_nodes() -> list[Sent]:
    return [Sent(torch.zeros(len(idx), 1), torch.tensor(idx)) for idx in NODES_IDX]


def test_layout_counts_a_token_once_for_each_node() -> None:
    got = layout(torch.tensor(NODES_IDX[0]), 4, 4)
    assert got.num_tokens_per_node(2).tolist() == [2, 2]
    assert got.num_tokens_per_node(1).tolist() == got.num_tokens_per_rank.tolist() == [1, 1, 2, 1]
    assert got.is_token_in_node(2).tolist() == [[True, True], [False, True], [True, False]]


def test_rail_places_by_hand() -> None:
    """Rank 2 forwards two tokens of rank 0: the first to itself alone, the second to both ranks of its node."""
    got = rail_places(sent_over_nodes(), 2, 4, 2)
    assert got.rail_prefix.tolist() == [2, 2]
    assert got.recv_rank_prefix.tolist() == [2, 3, 3, 3]
    assert got.send_rail_head.tolist() == [[0, -1], [-1, -1], [1, -1]]
    assert got.rail_head.tolist() == [[0, -1], [1, 0]]
    got = rail_places(sent_over_nodes(), 1, 4, 2)  # rank 3 has nothing for its node
    assert (got.rail_prefix.tolist(), got.rail_head.tolist()) == ([0, 0], [])
    assert got.send_rail_head.tolist() == [[-1, 0]]


def test_rail_places_of_several_nodes_follow_each_other() -> None:
    got = rail_places(sent_over_nodes(), 0, 4, 1)
    assert got.rail_prefix.tolist() == [0, 0, 1, 1]
    assert got.rail_head.tolist() == [[0]]
    assert got.send_rail_head.tolist() == [[-1, -1, 0, -1], [-1, -1, 1, 0], [-1, 0, -1, -1]]


def test_combine_over_nodes_rounds_the_sum_of_each_other_node() -> None:
    """1 + 2^-8: lost where node 1 sums and rounds, kept where node 0, which owns the token, does."""
    tiny = 2.0**-8
    for owner, want in ((0, 1 + 2 * tiny), (2, 1.0)):
        group = [Sent(torch.ones(0, 1), torch.zeros((0, 4), dtype=torch.int64))] * 4
        group[owner] = Sent(torch.ones(1, 1), torch.tensor([[0, 1, 2, 3]]))
        arrivals = [dispatch(group, rank, 4) for rank in range(4)]
        returned = [torch.tensor([[value]], dtype=torch.bfloat16) for value in (1., tiny, tiny, 0.)]
        assert combine(returned, arrivals, owner, 1, (), 2).item() == want
        assert combine(returned, arrivals, owner, 1).item() == 1 + 2 * tiny


def test_low_latency_dispatch_gives_every_expert_its_rows_once() -> None:
    """A token that names an expert twice is one row of it."""
    first = low_latency_dispatch(sent(), 0, 4, Cast())
    assert [expert.rows for expert in first] == [[(0, 0), (1, 1)], [(0, 1)]]
    assert first[0].x.tolist() == [[10.], [21.]]
    assert first[0].layout_range.tolist() == [0 << 32 | 1, 1 << 32 | 1]
    assert first[1].layout_range.tolist() == [0 << 32 | 1, 1 << 32 | 0]
    assert [expert.rows for expert in low_latency_dispatch(sent(), 1, 4, Cast())] == [[(0, 0), (1, 0)], [(1, 0)]]


def test_low_latency_combine_weighs_entries_and_sums_over_ranks() -> None:
    arrivals = [low_latency_dispatch(sent(), rank, 4, Cast()) for rank in range(2)]
    answers = [[torch.tensor([[1.], [2.]]), torch.tensor([[4.]])], [torch.tensor([[8.], [16.]]), torch.tensor([[32.]])]]
    halves = torch.tensor([[.5, .25], [.5, 1.], [1., 1.]])
    mine = Sent(sent()[0].x, IDX_0, halves)
    # Token 0: experts 0 and 2; token 1: expert 1 twice; token 2: nobody.
    assert low_latency_combine(answers, arrivals, mine, 0).flatten().tolist() == [.5 * 1 + .25 * 8, 1.5 * 4, 0.]


def test_low_latency_combine_rounds_each_part() -> None:
    """1 + 2^-9 is lost where one rank sums both, and 2^-9 alone is not."""
    tiny, one = 2.0**-9, torch.ones(1, 1)
    mine = Sent(one, torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    for num_ranks, want in ((1, 1 + 4 * tiny), (3, 1 + 4 * tiny)):
        group = [mine] + [Sent(torch.ones(0, 1), torch.zeros((0, 3), dtype=torch.int64))] * (num_ranks - 1)
        arrivals = [low_latency_dispatch(group, rank, 3, Cast()) for rank in range(num_ranks)]
        values = [torch.tensor([[value]]) for value in (1., 2 * tiny, 2 * tiny)]
        answers = [[value] for value in values] if num_ranks == 3 else [values]
        assert low_latency_combine(answers, arrivals, mine, 0).item() == want
    # The part of experts 0 and 1, on one rank, is rounded to 1 before expert 2's comes to it.
    parts = [[torch.tensor([1 + tiny]), torch.tensor([tiny])]]
    assert sum(part.bfloat16().float() for part in parts[0]).bfloat16().item() == 1


def test_fp8_cast_by_hand() -> None:
    x = torch.zeros(1, 256)
    x[0, 0], x[0, 1], x[0, 255] = 896., -2., 3.
    rows, scales = Cast(use_fp8=True)(x.bfloat16())
    assert scales is not None
    assert scales.tolist() == [[2., torch.tensor(3.) / torch.tensor(448.)]]
    assert rows[0, :2].float().tolist() == [448., -1.]
    assert rows[0, 255].item() == 448.
    _, rounded = Cast(True, True)(x.bfloat16())
    assert rounded is not None
    assert rounded.tolist() == [[2., 2.**-7]]


def test_ue8m0_packs_four_exponents() -> None:
    x = torch.zeros(1, 512)
    x[0, ::128] = torch.tensor([448., 896., 449., 224.])
    _, packed = Cast(True, True, True)(x.bfloat16())
    assert packed is not None
    # 449 is no bfloat16: it becomes 448.
    assert packed.view(torch.uint8).tolist() == [[127, 128, 127, 126]]
