"""Every kind of fault at every moment of every operation, on one node and on several.

What there is beside this: who fails with which sentence (test_intranode.py, test_low_latency.py, test_internode.py),
failures that a host finds (test_host_failures.py), failures while nobody makes a call (test_nodes.py).

A fault mostly waits for a timeout, so several are played at a time, each by processes of its own.
"""

import concurrent.futures
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fault_cases as cases
import pytest
from failure_cases import SHORT_TIMEOUT_S
from fault_cases import HIGH_THROUGHPUT, LOW_LATENCY, SLACK_S, Fault, Outcome
from utils import Pool, device

ON_CPU = device().type == "cpu"
KINDS = ("killed", "raising", "stopped", "paused")
MOMENTS = ("before", "in", "after")
VICTIM = 1
AT_A_TIME = int(os.environ.get("FAULTS_AT_A_TIME", "4"))


@dataclass(frozen=True)
class Place:
    """Where a fault strikes."""

    fault: Fault
    ranks_per_node: int  # 0: one node

    def __str__(self) -> str:
        return f"{'nodes' if self.ranks_per_node else 'node'}-{self.fault}"

    @property
    def num_ranks(self) -> int:
        if not ON_CPU:
            return 2
        return 4 if self.ranks_per_node else 3

    def play(self) -> list[Any]:
        environment = {"DEEP_EP_RANKS_PER_NODE": str(self.ranks_per_node), "DEEP_EP_RAIL_INTERFACE": "lo"}
        pool = Pool(self.num_ranks, environment if self.ranks_per_node else {})
        try:
            return pool.run(cases.struck,
                            self.num_ranks,
                            self.fault,
                            VICTIM,
                            dying=(VICTIM, ) if self.fault.kind == "killed" else ())
        finally:
            pool.close()


def places() -> list[Place]:
    nodes = 2 if ON_CPU else 1
    return [
        Place(Fault(kind, moment, operation), ranks_per_node) for kind in KINDS for moment in MOMENTS
        for operation, ranks_per_node in
        [*((each, 0) for each in (*HIGH_THROUGHPUT, *LOW_LATENCY)), *((each, nodes) for each in HIGH_THROUGHPUT)]
    ]


Played = dict[Place, "concurrent.futures.Future[list[Any]]"]


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest) -> Iterator[Played]:
    """All those that were selected, a few at a time."""
    chosen = [item.callspec.params["place"] for item in request.session.items
              if "place" in getattr(getattr(item, "callspec", None), "params", {})]  # yapf: disable
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as executor:
        yield {place: executor.submit(place.play) for place in chosen}


@pytest.mark.parametrize("place", places(), ids=str)
def test_a_fault(played: Played, place: Place) -> None:
    fault, found = place.fault, played[place].result()
    names: list[str] = []
    for rank, outcome in enumerate(found):
        if outcome is None:
            assert (fault.kind, rank) == ("killed", VICTIM)
            continue
        assert not outcome.leaks, (rank, outcome)
        names += outcome.names
        if rank != VICTIM:
            check_survivor(fault, outcome)
    assert cases.left_in_shared_memory(tuple(names)) == []


def check_survivor(fault: Fault, outcome: Outcome) -> None:
    assert max(outcome.took_s) < SHORT_TIMEOUT_S + SLACK_S, outcome
    if fault.kind == "paused":
        assert (outcome.first, outcome.later) == ("", ""), outcome
        return
    # Where the victim had done its part, the operation is right for whoever got all of it.
    if fault.moment == "before" or outcome.first:
        assert f"rank {VICTIM}" in outcome.first, outcome
    assert f"rank {VICTIM}" in outcome.later, outcome
