"""Dispatch and combine within a node, against the reference.

    pytest tests/test_intranode.py
    python tests/test_intranode.py --num-processes 4 --num-tokens 128 --hidden 7168 --num-topk 8 --num-experts 64
    python tests/test_intranode.py --num-processes 4 --pressure-test 600
"""

from pathlib import Path

import failure_cases as failures
import intranode_cases as cases
import modes
import pressure
import pytest
import torch
from high_throughput_trips import FP8, Trips, even, uneven
from pending_call import How
from utils import Group, Pool
from workload import ROUTINGS, Workload


class TestTrips(Trips):

    @pytest.fixture
    def group(self, pool: Pool) -> Group:
        return Group(pool, 3)


# Shapes


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 7, 8])
def test_any_rank_count(pool: Pool, num_ranks: int) -> None:
    pool.run(cases.whole_trip, num_ranks, Workload(uneven(num_ranks), seed=num_ranks))


def test_any_topk(pool: Pool) -> None:
    """Also more than 32 and more than there are experts."""
    pool.run(cases.trips, 2,
             [Workload((7, 9), hidden=64, num_topk=k, seed=k) for k in (1, 2, 4, 6, 8, 9, 11, 16, 33, 70)])


@pytest.mark.parametrize("experts_per_rank", [1, 3, 64, 256])
def test_any_expert_count(pool: Pool, experts_per_rank: int) -> None:
    pool.run(cases.whole_trip, 3, Workload((11, 6, 8), 128, 2, experts_per_rank, seed=experts_per_rank))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(pool: Pool, routing: str) -> None:
    """Pitfall 26: -1, duplicates, all tokens to one rank, all top-k on one rank, nothing at all."""
    pool.run(cases.whole_trip, 4, Workload((20, 1, 33, 8), routing=routing))


# Modes


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_worst_case_rows_are_marked(pool: Pool, num_ranks: int) -> None:
    pool.run(cases.worst_case_tail, num_ranks, Workload(uneven(num_ranks, 15), hidden=64))


def test_worst_case_with_scales(pool: Pool) -> None:
    pool.run(cases.scaled_trip, 3, Workload((6, 0, 9), dtype=FP8, num_scales=4), How(worst_factor=2))


def test_cached_after_worst_case(pool: Pool) -> None:
    pool.run(cases.cached_after_worst_case, 3, Workload((4, 0, 11)))


def test_too_few_worst_rows_is_an_error(pool: Pool) -> None:
    messages = pool.run(failures.too_few_worst_rows, 2)
    # Who reports first aborts the others, which then name that rank.
    assert any("num_worst_tokens" in message for message in messages), messages


def test_handle_serves_combine_and_cached_dispatch(pool: Pool) -> None:
    pool.run(cases.reused_handle, 4, Workload(uneven(4)))


# Events


def test_results_may_be_dropped(pool: Pool) -> None:
    pool.run(cases.dropped_event, 3, Workload((9, 4, 7)))


def test_outputs_filled_by_torch(pool: Pool) -> None:
    pool.run(cases.poisoned_alloc_order, 2, Workload((40, 31), hidden=1024))


# Rings and repetition


@pytest.mark.parametrize(("num_ranks", "num_slots"), [(2, 1), (2, 2), (3, 1), (4, 3)])
def test_rings_wrap(pool: Pool, num_ranks: int, num_slots: int) -> None:
    pool.run(cases.tiny_window, num_ranks, Workload(even(num_ranks, 70), hidden=72, num_topk=2), num_slots)


def test_too_small_buffer_is_an_error(pool: Pool) -> None:
    pool.run(failures.too_small_buffer, 2)


@pytest.mark.parametrize(("num_ranks", "seed", "num_nvl_bytes"), [(2, 1, 1 << 22), (4, 2, 1 << 22), (4, 3, 1 << 17)])
def test_changing_shapes_back_to_back(pool: Pool, num_ranks: int, seed: int, num_nvl_bytes: int) -> None:
    pool.run(cases.many_shapes, num_ranks, 25, seed, num_nvl_bytes)


def test_random_calls_under_pressure(pool: Pool) -> None:
    found = pool.run(pressure.run, 3, pressure.Sizes(9, 128, 4, 3, 4), seed=1, seconds=0.0, least_rounds=8)
    assert [rounds for rounds, _ in found] == [8, 8, 8]
    # Other ranks have other outputs; another run has the same.
    again = pool.run(pressure.run, 3, pressure.Sizes(9, 128, 4, 3, 4), seed=1, seconds=0.0, least_rounds=8)
    assert found == again


def test_pressure_notices_other_bits() -> None:
    digests = pressure.Digests("a call")
    digests.add(torch.tensor([1.0, 0.0]), None)
    digests.add(torch.tensor([1.0, 0.0]), None)
    with pytest.raises(AssertionError, match="other bits"):
        digests.add(torch.tensor([1.0, -0.0]), None)


# Groups and lateness


@pytest.mark.parametrize("ranks", [(1, 3), (6, ), (0, 2, 5), (1, 2, 4, 7)])
def test_sub_groups(pool: Pool, ranks: tuple[int, ...]) -> None:
    """Pitfall 35: global ranks that are neither contiguous nor from zero."""
    pool.run(cases.sub_groups, len(ranks), Workload(even(len(ranks), 6)), ranks=ranks)


def test_mpi_communicator(pool: Pool) -> None:
    pool.run(cases.other_communicator, 3, Workload((5, 0, 2)))


def test_local_buffer_views(pool: Pool) -> None:
    pool.run(cases.local_buffer_views, 2)


# Failures


@pytest.mark.parametrize("step", ["dispatch", "combine"])
def test_absent_rank_is_named(pool: Pool, step: str) -> None:
    messages = pool.run(failures.absent_rank, 3, Workload((4, 6, 5)), 1, step)
    assert messages[1] is None


def test_a_timeout_may_be_infinite(pool: Pool) -> None:
    pool.run(failures.endless_patience, 2, Workload((4, 6)))


def test_absent_rank_in_async_call(pool: Pool) -> None:
    pool.run(failures.absent_in_async, 2, Workload((4, 6)))


def test_killed_rank(pool: Pool) -> None:
    pool.run(failures.killed_rank, 3, Workload((4, 6, 2)), 2, dying=(2, ))


def test_one_rank_with_a_bad_argument(pool: Pool) -> None:
    own, *others = pool.run(failures.failing_constructor, 3, 0, "bad")
    assert own.startswith("ValueError: num_nvl_bytes must be a multiple of 128")
    assert all(other.startswith("Error: ") and "rank 0" in other for other in others)


def test_different_arguments_are_named(pool: Pool) -> None:
    for message in pool.run(failures.failing_constructor, 3, 1, "different"):
        assert message.startswith("ValueError: ")
        assert "num_nvl_bytes must be the same on every rank, got 4096 on rank(s) 0, 2; 8192 on rank(s) 1" in message


def test_bad_expert_is_reported(pool: Pool) -> None:
    for message in pool.run(failures.bad_expert, 2):
        assert "token 2" in message
        assert "1000" in message


def test_late_rank_is_named_in_the_log_before_anything_fails(tmp_path: Path) -> None:
    pool = Pool(2, {"DEEP_EP_WARN_SECS": "0.1"})
    waiting, _ = pool.run(failures.late_rank_is_logged, 2, Workload((3, 4)), 1, tmp_path / "logged")
    assert any("rank 1" in message and "Still waiting" in message for message in waiting), waiting
    pool.close()


@pytest.mark.parametrize("explicitly", [False, True])
def test_destructor(pool: Pool, explicitly: bool) -> None:
    for printed in pool.run(failures.leave_without_destroy, 2, explicitly):
        assert ("WARNING: destroy() was not called" in printed) == explicitly


def main() -> None:
    parser = modes.make_parser("Dispatch and combine within a node, checked against the reference")
    modes.run(parser.parse_args(), parser)


if __name__ == "__main__":
    main()
