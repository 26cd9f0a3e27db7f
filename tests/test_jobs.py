"""Two jobs on the same hosts (pitfall 13): they share names, interfaces, SMs and /dev/shm, and nothing else."""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import low_latency_pressure
import pressure
import pytest
from utils import Pool
from virtual_nodes import virtual_nodes

ROOT = Path(__file__).resolve().parents[1]
ONE_NODE: dict[str, str] = {}
NODES = virtual_nodes(1)
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


def test_a_full_shared_memory_mount_ends_no_process(tmp_path: Path) -> None:
    """Mailboxes are then found under /proc. A store to a page that the mount had no room for was a SIGBUS."""
    in_a_mount_of_its_own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"']
    if subprocess.run([*in_a_mount_of_its_own, "sh", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this process may not mount")
    script = tmp_path / "trip.py"
    script.write_text("from deep_ep.bench.round_trip import round_trip\n"
                      "if __name__ == '__main__':\n    print(round_trip('cpu', [0, 0]).failures)\n")
    run = subprocess.run([*in_a_mount_of_its_own, "sh", sys.executable, str(script)], check=False, capture_output=True,
                         text=True, timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)})  # yapf: disable
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n", run.stdout
