"""Low-latency dispatch and combine across nodes: the cases of one node, on virtual nodes joined over loopback.

    pytest tests/test_low_latency_nodes.py
"""

import low_latency_cases as cases
import low_latency_pressure
import pressure
import pytest
from low_latency_pending_call import FP8, UE8M0, Manner
from low_latency_trips import Trips, uneven
from utils import Group, Pool
from virtual_nodes import Nodes, virtual_nodes
from workload import Workload

import deep_ep


class TestTrips(Trips):

    @pytest.fixture
    def group(self, two: Pool) -> Group:
        return Group(two, 4)

    @pytest.fixture
    def pair(self, nodes: Nodes) -> Group:
        return Group(nodes.of_one, 2)


@pytest.mark.parametrize("topology", ["2x1", "3x1", "4x1", "2x2", "3x2", "4x2"])
def test_topology(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    work = Workload(uneven(num_ranks), seed=num_ranks)
    pool.run(cases.trips, num_ranks, [work, work.next()], Manner(FP8))


def test_nodes_of_four() -> None:
    pool = Pool(8, virtual_nodes(4))
    pool.run(cases.trips, 8, [Workload(uneven(8), num_topk=4)], Manner(UE8M0, mode="hook"))
    pool.close()


# Formats, modes and options


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_a_hook_needs_the_hook_of_no_other_rank(two: Pool, order: list[int]) -> None:
    two.run(cases.hooks_in_turn, 4, Workload((9, 0, 16, 5)), order)


def test_a_rank_may_go_after_its_last_call(two: Pool) -> None:
    two.run(cases.gone_after_its_last_call, 4, 6)


# Buffers


def test_changing_shapes_back_to_back(two: Pool) -> None:
    two.run(cases.many_shapes, 4, 12, 2)


@pytest.mark.parametrize("topology", ["2x1", "3x2"])
def test_every_rank_calls_its_hooks_in_an_order_of_its_own(nodes: Nodes, topology: str) -> None:
    pool, num_ranks = nodes.pool(topology)
    pool.run(low_latency_pressure.orders_of_their_own, num_ranks, pressure.Sizes(6, 512, 4, 3), seed=7, rounds=4)


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


def test_cleaning_masks_who_does_not_come(two: Pool) -> None:
    assert two.run(cases.clean_without_a_rank, 4, 3, True) == [[0, 0, 0, 1]] * 3 + [None]
    messages = two.run(cases.clean_without_a_rank, 4, 3, False)[:3]
    assert all("rank 3 of node 1" in message for message in messages), messages
    # A rank that is told by the engine before its own wait ends knows who gave up on whom, not in which call.
    assert any("clean_low_latency_buffer, call 1" in message for message in messages), messages
