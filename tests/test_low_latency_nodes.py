"""Low-latency dispatch and combine across nodes: the cases of one node, on virtual nodes joined over loopback.

    pytest tests/test_low_latency_nodes.py
"""

import contextlib
from collections.abc import Iterator

import low_latency_cases as cases
import low_latency_pressure
import pressure
import pytest
import torch
from low_latency_pending_call import FP8, UE8M0, Manner
from test_internode import Nodes, virtual_nodes
from test_low_latency import CASTS, WORKS_OF_GRAPHS, check_entries_of_another_dispatch, uneven
from utils import Pool, device
from workload import ROUTINGS, Workload

import deep_ep


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with contextlib.closing(Nodes(Pool(4, virtual_nodes(1)), Pool(8, virtual_nodes(2)))) as made:
        yield made


@pytest.mark.parametrize("topology", ["2x1", "3x1", "4x1", "2x2", "3x2", "4x2"])
def test_topology(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    work = Workload(uneven(num_ranks), seed=num_ranks)
    pool.run(cases.trips, num_ranks, [work, work.next()], Manner(FP8))


def test_nodes_of_four() -> None:
    pool = Pool(8, virtual_nodes(4))
    pool.run(cases.trips, 8, [Workload(uneven(8), num_topk=4)], Manner(UE8M0, mode="hook"))
    pool.close()


def test_any_hidden_size(two: Pool) -> None:
    hiddens = (8, 24, 120, 520, 1000, 2880, 7168)
    two.run(cases.trips, 4, [Workload((3, 1, 2, 5), hidden=hidden, seed=hidden) for hidden in hiddens])


def test_any_topk(two: Pool) -> None:
    works = [Workload((7, 9, 0, 4), hidden=64, num_topk=k, seed=k) for k in (1, 2, 6, 8, 11, 16, 33)]
    for mode in cases.MODES:
        two.run(cases.trips, 4, works, Manner(mode=mode))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(two: Pool, routing: str) -> None:
    two.run(cases.trips, 4,
            [Workload((10, 1, 16, 8), routing=routing, idx_dtype=dtype) for dtype in (torch.int64, torch.int32)])


def test_no_tokens_at_all(two: Pool) -> None:
    two.run(cases.zero_tokens_everywhere, 4)


def test_any_bits_arrive_exactly(two: Pool) -> None:
    two.run(cases.any_bits, 4, Workload((13, 8, 16, 3), hidden=512, is_bit_noise=True))


# Formats, modes and options


def test_every_format_and_mode(two: Pool) -> None:
    two.run(cases.every_manner, 4, Workload((9, 0, 16, 5), hidden=1024))


def test_fewer_tokens_than_allowed(two: Pool) -> None:
    two.run(cases.whole_trip, 4, Workload((9, 0, 5, 2)), Manner(max_tokens=40, has_stats=True))


def test_zero_copy(two: Pool) -> None:
    works = [Workload((9, 4, 5, 7), seed=seed) for seed in range(4)]
    two.run(cases.trips, 4, works, Manner(zero_copy=True, has_out=True, max_tokens=9))


@pytest.mark.parametrize("cast", ["bf16", "fp8"])
def test_two_micro_batches(two: Pool, cast: str) -> None:
    two.run(cases.two_micro_batches, 4, Workload((12, 0, 9, 7)), CASTS[cast])


def test_overlapped_layers(two: Pool) -> None:
    two.run(cases.overlapped_layers, 4, Workload((12, 5, 9, 1)))


def test_a_hook_that_is_not_called_blocks_nobody_forever(nodes: Nodes) -> None:
    nodes.of_one.run(cases.held_back_hook, 2, Workload((4, 7)))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_a_hook_needs_the_hook_of_no_other_rank(two: Pool, order: list[int]) -> None:
    two.run(cases.hooks_in_turn, 4, Workload((9, 0, 16, 5)), order)


def test_a_rank_may_go_after_its_last_call(two: Pool) -> None:
    two.run(cases.gone_after_its_last_call, 4, 6)


def test_inputs_may_be_dropped_and_overwritten(two: Pool) -> None:
    two.run(cases.freed_inputs, 4, Workload((16, 9, 12, 4), hidden=1024))
    two.run(cases.overwritten_inputs, 4, Workload((32, 9, 20, 4), hidden=1024))


@pytest.mark.parametrize(("use_logfmt", "limit"), [(False, 0.0025), (True, 0.0045)])
def test_error_of_the_weighted_sum(two: Pool, use_logfmt: bool, limit: float) -> None:
    work = Workload((20, 12, 8, 16), num_topk=8, experts_per_rank=8)
    errors = two.run(cases.weighted_sum_error, 4, work, use_logfmt)
    assert max(errors) < limit, errors


def test_logfmt(two: Pool) -> None:
    works = [Workload((5, 0, 9, 3), hidden=hidden, seed=hidden) for hidden in (8, 120, 1000, 7168)]
    for mode in cases.MODES:
        two.run(cases.trips, 4, works, Manner(mode=mode, use_logfmt=True, has_stats=True))


# Buffers


def test_buffers_side_by_side(two: Pool) -> None:
    two.run(cases.side_by_side, 4, Workload((4, 8, 2, 3)))


def test_both_modes_in_turn(two: Pool) -> None:
    two.run(cases.modes_in_turn, 4, Workload((4, 8, 2, 5)))


def test_changing_shapes_back_to_back(two: Pool) -> None:
    two.run(cases.many_shapes, 4, 12, 2)


@pytest.mark.parametrize("cast", ["bf16", "fp8"])
def test_repeats_are_bitwise_equal(two: Pool, cast: str) -> None:
    two.run(cases.bitwise_repeats, 4, Workload((14, 12, 5, 9), num_topk=6), CASTS[cast], 6)


def test_random_calls_under_pressure(two: Pool) -> None:
    sizes = pressure.Sizes(6, 512, 4, 3)
    found = two.run(low_latency_pressure.run, 4, sizes, seed=1, seconds=0.0, least_rounds=6)
    assert found == two.run(low_latency_pressure.run, 4, sizes, seed=1, seconds=0.0, least_rounds=6)


@pytest.mark.parametrize("topology", ["2x1", "3x2"])
def test_every_rank_calls_its_hooks_in_an_order_of_its_own(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(low_latency_pressure.orders_of_their_own, num_ranks, pressure.Sizes(6, 512, 4, 3), seed=7, rounds=4)


@pytest.mark.parametrize("late", [0, 3])
def test_late_rank(two: Pool, late: int) -> None:
    two.run(cases.late_rank, 4, Workload((5, 9, 2, 4), routing="spread"), late)


# Failures


def test_killed_rank_is_named_with_its_node(two: Pool) -> None:
    messages = two.run(cases.killed_rank, 4, Workload((4, 6, 2, 5)), 3, deep_ep.Error, dying=(3, ))
    assert [message is None for message in messages] == [False, False, False, True]
    assert all("rank 3" in message for message in messages[:3]), messages
    assert any("rank 3 of node 1" in message for message in messages[:3]), messages


@pytest.mark.parametrize("dies", [True, False])
def test_shrinking_without_a_rank_of_another_node(two: Pool, dies: bool) -> None:
    results = two.run(cases.shrunk_group, 4, Workload((4, 6, 2, 3)), 3, dies, dying=(3, ) if dies else ())
    assert results == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], None]


def test_cleaning_is_a_barrier(two: Pool) -> None:
    two.run(cases.clean_is_a_barrier, 4, Workload((4, 6, 2, 3)))


def test_cleaning_masks_who_does_not_come(two: Pool) -> None:
    assert two.run(cases.clean_without_a_rank, 4, 3, True) == [[0, 0, 0, 1]] * 3 + [None]
    messages = two.run(cases.clean_without_a_rank, 4, 3, False)[:3]
    assert all("rank 3 of node 1" in message for message in messages), messages
    # A rank that is told by the engine before its own wait ends knows who gave up on whom, not in which call.
    assert any("clean_low_latency_buffer, call 1" in message for message in messages), messages


def test_combine_with_the_entries_of_another_dispatch(nodes: Nodes) -> None:
    check_entries_of_another_dispatch(nodes.of_one)


# Graphs


@pytest.mark.parametrize("mode", cases.MODES)
def test_graphs_of_different_sizes(nodes: Nodes, mode: str) -> None:
    if device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU; the executor's own are replayed in internode_low_latency_test.cc")
    nodes.of_one.run(cases.graph_replays, 2, WORKS_OF_GRAPHS, mode)
