"""Which rank was late, at which stage, how often: `Buffer.get_wait_counters` and `Buffer.dump_waits`."""

import contextlib
import re
from collections.abc import Iterator

import pytest
import wait_cases as cases
from utils import Pool, device
from virtual_nodes import virtual_nodes

LATE = 1
MODES = ("high-throughput", "low-latency")


def check_late_rank_is_named(pool: Pool, num_ranks: int, late: int, mode: str) -> None:
    for rank, (waited_s, text, most) in enumerate(pool.run(cases.late_rank, num_ranks, late, mode)):
        if rank == late:
            continue
        assert max(range(num_ranks), key=waited_s.__getitem__) == late, waited_s
        assert waited_s[late] > 0.5 * cases.NUM_CALLS * cases.DELAY_S, waited_s
        assert most <= cases.NUM_CALLS
        assert re.search(rf"for rank {late} to .* in {cases.NUM_CALLS} calls, \d+\.\d us each", text), text
        calls = re.match(rf"rank {rank} has waited, in (\d+) high-throughput and (\d+) low-latency calls", text)
        assert calls is not None, text
        expected = (0, 2 * cases.NUM_CALLS) if mode == "low-latency" else (2 * cases.NUM_CALLS, 0)
        assert tuple(map(int, calls.groups())) == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_late_rank_is_named_by_the_others(pool: Pool, mode: str) -> None:
    check_late_rank_is_named(pool, 3, LATE, mode)


@pytest.fixture(scope="module")
def nodes_of_two() -> Iterator[Pool]:
    made = Pool(4, virtual_nodes(2))
    yield made
    made.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_late_rank_is_named_in_other_nodes_too(nodes_of_two: Pool, mode: str) -> None:
    """By its neighbour, by its rail peer, and by the rank that hears of it through another."""
    check_late_rank_is_named(nodes_of_two, 4, 3, mode)


@pytest.mark.skipif(device().type != "cuda", reason="graphs are CUDA's; on the executor: late_rank_test.cc")
@pytest.mark.parametrize("are_nodes", [False, True])
def test_replays_count_and_are_read_while_they_wait(pool: Pool, are_nodes: bool) -> None:
    with contextlib.ExitStack() as stack:
        chosen = stack.enter_context(contextlib.closing(Pool(2, virtual_nodes(1)))) if are_nodes else pool
        for rank, (waited_s, text) in enumerate(chosen.run(cases.late_replays, 2, LATE)):
            if rank == LATE:
                continue
            assert waited_s[LATE] > 0.5 * cases.NUM_CALLS * cases.DELAY_S, waited_s
            assert f"for rank {LATE} to " in text
