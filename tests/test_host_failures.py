"""Failures that a host finds, waits that it must not sleep through, and ranks that go: nobody is left in the dark."""

from collections.abc import Callable

import host_failure_cases as cases
import pytest
import torch
from utils import Pool, device

ON_CPU = device().type == "cpu"


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("simulated"), KeyboardInterrupt("simulated")])
@pytest.mark.parametrize("is_direct", [False, True], ids=["", "direct"])
def test_an_unfinished_dispatch_fails_every_rank(pool: Pool, error: BaseException, num_ranks: int,
                                                 is_direct: bool) -> None:
    for message in pool.run(cases.unfinished_dispatch, num_ranks, error, 0, is_direct):
        assert f"{type(error).__name__}: simulated" in message
        assert "rank 0" in message


@pytest.mark.parametrize(("case", "num_ranks", "parts"), [
    (cases.interrupted_after_launch, 3, ("combine: KeyboardInterrupt", "rank 1")),
    (cases.dropped_hook, 2, ("low_latency_dispatch: its hook was dropped without being called", )),
    (cases.bad_expert_stops_peers, 3, ("topk_idx of token", "got 1000")),
])
def test_a_failure_of_one_rank_fails_every_rank(pool: Pool, case: Callable[..., str], num_ranks: int,
                                                parts: tuple[str, ...]) -> None:
    for message in pool.run(case, num_ranks, 1):
        for part in parts:
            assert part in message


def test_a_refused_call_is_quoted_by_who_waited_for_it(pool: Pool) -> None:
    quoting = pool.run(cases.refused_call, 2, 0, False)[1]
    assert "never entered this call: rank 0" in quoting
    assert "it refused a call: dispatch: TypeError: x must be" in quoting


def test_a_refused_call_may_be_made_good(pool: Pool) -> None:
    pool.run(cases.refused_call, 2, 0, True)


@pytest.mark.parametrize("where", ["dispatch", "combine"] if ON_CPU else ["dispatch"])
def test_ctrl_c_is_heard_where_a_call_waits(pool: Pool, where: str) -> None:
    for message in pool.run(cases.interrupted_wait, 2, 0, where):
        assert f"{where}: KeyboardInterrupt" in message


def test_the_watcher_tells_of_a_peer_that_failed(pool: Pool) -> None:
    """Nobody but the failing rank makes a call."""
    for rank, (written, message, reported) in enumerate(pool.run(cases.watched_without_calls, 3, 1)):
        assert "MemoryError: simulated" in message
        assert reported == [message]
        assert (message in written) == (rank != 1), "the rank that raised has said it already"


def test_the_watcher_tells_of_a_kernel_that_gave_up(pool: Pool) -> None:
    written, message = pool.run(cases.watched_kernel, 2, 1)[0]
    assert "rank 1" in message
    assert message in written


@pytest.mark.parametrize("where",
                         ["environment", "lend_bytes", "qp_depth", "capture", "streams", "cost_model", "session"])
def test_a_rank_that_cannot_build_is_named(pool: Pool, where: str) -> None:
    messages = pool.run(cases.failing_alone, 3, 1, where)
    assert "Buffer: " in messages[0]
    assert "failed on 1 of 3 ranks; rank 1: " in messages[0]
    assert messages[2] == messages[0]


def test_ranks_that_count_nodes_differently_are_told(pool: Pool) -> None:
    for message in pool.run(cases.different_nodes, 3, 1):
        assert "ranks_per_node must be the same on every rank" in message


@pytest.mark.gpu
@pytest.mark.skipif(ON_CPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("operation", ["low_latency_dispatch", "dispatch"])
def test_a_loop_that_only_replays_learns_of_a_failure(pool: Pool, operation: str) -> None:
    found = pool.run(cases.replayed_graph, 2, 1, operation)[0]
    assert found["message"] in found["written"]
    assert "never entered this call: rank 1" in found["message"]
    if operation == "dispatch":  # what low-latency calls leave: test_low_latency.py
        assert found["rows"].isnan().all(), "what five more replays left looks like results"
        assert (found["topk_idx"] == -1).all()


# Last: these cost the processes.


def test_a_dead_peer_keeps_nothing_mapped(pool: Pool) -> None:
    num_left, took_s = pool.run(cases.gone_peer, 2, 1, dying=(1, ))[0]
    assert num_left == 0
    assert took_s < 4, "destroy() waited for a process that has ended"


def test_a_dead_peer_is_called_dead(pool: Pool) -> None:
    message = pool.run(cases.gone_peer_is_named, 2, 1, dying=(1, ))[0]
    assert "its process has ended" in message
