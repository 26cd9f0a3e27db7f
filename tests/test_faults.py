"""Every kind of fault at every moment of every operation, on one node and on several.

What there is beside this: who fails with which sentence (test_intranode.py, test_low_latency.py, test_internode.py),
failures that a host finds (test_host_failures.py), failures while nobody makes a call (test_nodes.py).

A fault mostly waits for a timeout, so several are played at a time, each by processes of its own.
"""

import concurrent.futures
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import fault_cases as cases
import pytest
from failure_cases import SHORT_TIMEOUT_S
from fault_cases import HIGH_THROUGHPUT, LOW_LATENCY, SLACK_S, Fault, Outcome
from utils import Pool, device
from virtual_nodes import virtual_nodes

from deep_ep import supports

ON_CPU = device().type == "cpu"
KINDS = ("paused", "raising", "stopped", "killed")  # the last one costs the processes
MOMENTS = ("before", "in", "after")
VICTIM = 1
LOW_LATENCY_ACROSS = LOW_LATENCY if supports("low_latency_internode") else ()
ARE_ALL_WANTED = bool(os.environ.get("FAULTS_ALL"))
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

    @property
    def is_usual(self) -> bool:
        return ON_CPU or self.fault.moment == "in"

    def play(self, pools: "Pools") -> list[Any]:
        return pools.of(self).run(cases.struck,
                                  self.num_ranks,
                                  self.fault,
                                  VICTIM,
                                  dying=(VICTIM, ) if self.fault.kind == "killed" else ())


class Pools(threading.local):
    """Of one thread: processes for one node, and for several."""

    every: ClassVar[list[Pool]] = []  # of all threads

    def __init__(self) -> None:
        self._by_nodes: dict[int, Pool] = {}

    def of(self, place: Place) -> Pool:
        nodes = place.ranks_per_node
        if nodes not in self._by_nodes:
            environment = virtual_nodes(nodes) if nodes else {}
            self._by_nodes[nodes] = Pool(place.num_ranks, environment)
            self.every.append(self._by_nodes[nodes])
        return self._by_nodes[nodes]


def places() -> list[Place]:
    """All of them where asked for. Else in the middle of a call only on GPUs, where processes start slowly and wait
    longer."""
    nodes = 2 if ON_CPU else 1
    where = [(each, 0) for each in (*HIGH_THROUGHPUT, *LOW_LATENCY)]
    where += [(each, nodes) for each in (*HIGH_THROUGHPUT, *LOW_LATENCY_ACROSS)]
    every = [
        Place(Fault(kind, moment, operation), ranks_per_node) for kind in KINDS for moment in MOMENTS
        for operation, ranks_per_node in where
    ]
    return every if ARE_ALL_WANTED else [place for place in every if place.is_usual]


Played = dict[Place, "concurrent.futures.Future[list[Any]]"]


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest) -> Iterator[Played]:
    """All those that were selected, a few at a time."""
    chosen = [item.callspec.params["place"] for item in request.session.items
              if getattr(item, "originalname", None) == test_a_fault.__name__]  # yapf: disable
    pools = Pools()
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as executor:
        yield {place: executor.submit(place.play, pools) for place in chosen}
    for pool in pools.every:
        pool.close()


@pytest.mark.parametrize("place", places(), ids=str)
def test_a_fault(played: Played, place: Place) -> None:
    fault, found = place.fault, played[place].result()
    survivors: list[Outcome] = []
    for rank, outcome in enumerate(found):
        if outcome is None:
            assert (fault.kind, rank) == ("killed", VICTIM)
            continue
        assert not outcome.leaks, (rank, outcome)
        assert max(outcome.took_s) < SHORT_TIMEOUT_S + SLACK_S, outcome
        survivors += [outcome] if rank != VICTIM else []
    sentences = [sentence for outcome in survivors for sentence in (outcome.first, outcome.later)]
    if fault.kind == "paused":
        assert not any(sentences), sentences
    else:
        check_sentences(place, survivors)
    names = tuple(name for outcome in found if outcome is not None for name in outcome.names)
    assert names and cases.left_in_shared_memory(names) == []


def check_sentences(place: Place, survivors: list[Outcome]) -> None:
    """Everybody is told, at the latest by the next call, and of a rank; within a node everybody of the victim.

    An operation whose victim had done its part may be right, and its result has been looked at.
    """
    for outcome in survivors:
        assert outcome.later, outcome
        assert outcome.first or place.fault.moment != "before", outcome
        wanted = "rank " if place.ranks_per_node else f"rank {VICTIM}"
        assert wanted in outcome.later and wanted in (outcome.first or outcome.later), outcome
    assert any(f"rank {VICTIM}" in outcome.later for outcome in survivors), survivors
