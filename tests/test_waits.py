"""Which rank was late, at which stage, how often: `Buffer.get_wait_counters` and `Buffer.dump_waits`."""

import re

import pytest
import wait_cases as cases
from utils import Pool, device

LATE = 1


@pytest.mark.parametrize("mode", ["high-throughput", "low-latency"])
def test_a_late_rank_is_named_by_the_others(pool: Pool, mode: str) -> None:
    for rank, (waited_s, text, most) in enumerate(pool.run(cases.late_rank, 3, LATE, mode)):
        if rank == LATE:
            continue
        assert max(range(3), key=waited_s.__getitem__) == LATE, waited_s
        assert waited_s[LATE] > 0.5 * cases.NUM_CALLS * cases.DELAY_S, waited_s
        assert most <= cases.NUM_CALLS
        assert re.search(rf"for rank {LATE} to .* in {cases.NUM_CALLS} calls, \d+\.\d us each", text), text
        calls = re.match(rf"rank {rank} has waited, in (\d+) high-throughput and (\d+) low-latency calls", text)
        assert calls is not None, text
        expected = (0, 2 * cases.NUM_CALLS) if mode == "low-latency" else (2 * cases.NUM_CALLS, 0)
        assert tuple(map(int, calls.groups())) == expected


@pytest.mark.skipif(device().type != "cuda", reason="graphs are CUDA's; on the executor: late_rank_test.cc")
def test_replays_count_and_are_read_while_they_wait(pool: Pool) -> None:
    for rank, (waited_s, text) in enumerate(pool.run(cases.late_replays, 2, LATE)):
        if rank == LATE:
            continue
        assert waited_s[LATE] > 0.5 * cases.NUM_CALLS * cases.DELAY_S, waited_s
        assert f"for rank {LATE} to " in text
