"""Two jobs on the same hosts (pitfall 13): they share names, interfaces, SMs and /dev/shm, and nothing else."""

import concurrent.futures
from typing import Any

import low_latency_pressure
import pressure
import pytest
from utils import Pool

ONE_NODE: dict[str, str] = {}
NODES = {"DEEP_EP_RANKS_PER_NODE": "1", "DEEP_EP_RAIL_INTERFACE": "lo"}
NUM_RANKS = 2
NUM_ROUNDS = 6


def play(pool: Pool, module: Any, seed: int) -> list[tuple[int, str]]:
    """Rounds of random calls, right against the reference; and digests of their bits."""
    return pool.run(module.run,
                    NUM_RANKS,
                    pressure.Sizes(6, 512, 4, 3, 4),
                    seed=seed,
                    seconds=0.0,
                    least_rounds=NUM_ROUNDS)


@pytest.mark.parametrize(("environment", "module"), [(ONE_NODE, pressure), (ONE_NODE, low_latency_pressure),
                                                     (NODES, pressure)])
def test_two_jobs_on_the_same_hosts(environment: dict[str, str], module: Any) -> None:
    """The same calls at the same time: each job gets the bits that it gets alone."""
    jobs = [Pool(NUM_RANKS, environment) for _ in range(2)]
    try:
        alone = play(jobs[0], module, 1)
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as executor:
            found = list(executor.map(lambda job: play(job, module, 1), jobs))
        assert found == [alone, alone]
    finally:
        for job in jobs:
            job.close()
