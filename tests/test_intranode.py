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
from pending_call import How
from utils import Pool, device
from workload import ROUTINGS, SCALE_LAYOUTS, Workload, one_token_of

FP8 = torch.float8_e4m3fn


def uneven(num_ranks: int, most: int = 24) -> tuple[int, ...]:
    """Different numbers of tokens, the last of several ranks with none."""
    if num_ranks == 1:
        return (most, )
    return tuple(most * (num_ranks - 1 - rank) // (num_ranks - 1) + (rank % 2 if rank < num_ranks - 1 else 0)
                 for rank in range(num_ranks))


def even(num_ranks: int, tokens: int = 16) -> tuple[int, ...]:
    return (tokens, ) * num_ranks


# Shapes


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 7, 8])
def test_any_rank_count(pool: Pool, num_ranks: int) -> None:
    pool.run(cases.whole_trip, num_ranks, Workload(uneven(num_ranks), seed=num_ranks))


def test_any_hidden_size(pool: Pool) -> None:
    """Pitfall 22: not a multiple of a tile, not of a warp, and the smallest."""
    hiddens = (8, 16, 24, 120, 504, 520, 1000, 1536, 2048, 2560, 2880, 3072, 4096, 5120, 6144, 7168, 8192)
    pool.run(cases.trips, 3, [Workload((5, 3, 4), hidden=hidden, seed=hidden) for hidden in hiddens])


def test_any_topk(pool: Pool) -> None:
    """Also more than 32 and more than there are experts."""
    pool.run(cases.trips, 2,
             [Workload((7, 9), hidden=64, num_topk=k, seed=k) for k in (1, 2, 4, 6, 8, 9, 11, 16, 33, 70)])


@pytest.mark.parametrize("experts_per_rank", [1, 3, 64, 256])
def test_any_expert_count(pool: Pool, experts_per_rank: int) -> None:
    pool.run(cases.whole_trip, 3, Workload((11, 6, 8), 128, 2, experts_per_rank, seed=experts_per_rank))


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("has_topk", [True, False])
def test_topk_dtypes_and_none(pool: Pool, idx_dtype: torch.dtype, has_topk: bool) -> None:
    pool.run(cases.whole_trip, 4, Workload(uneven(4), idx_dtype=idx_dtype, routing="holes"), How(has_topk=has_topk))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(pool: Pool, routing: str) -> None:
    """Pitfall 26: -1, duplicates, all tokens to one rank, all top-k on one rank, nothing at all."""
    pool.run(cases.whole_trip, 4, Workload((20, 1, 33, 8), routing=routing))


@pytest.mark.parametrize("expert_alignment", [1, 2, 16, 128])
def test_expert_alignment(pool: Pool, expert_alignment: int) -> None:
    pool.run(cases.whole_trip, 3, Workload((9, 14, 2)), How(expert_alignment=expert_alignment))


# Empty ranks


def test_every_subset_of_empty_ranks(pool: Pool) -> None:
    pool.run(cases.empty_subsets, 4, Workload((5, 2, 9, 1), hidden=64))


@pytest.mark.parametrize("owner", [0, 2])
def test_one_token_in_total(pool: Pool, owner: int) -> None:
    """Pitfall 25."""
    pool.run(cases.trips, 4, one_token_of(owner, num_ranks=4))


# Payloads


def test_random_bits_arrive_exactly(pool: Pool) -> None:
    """NaN payloads, infinities and denormals included."""
    work = Workload((13, 8, 21), hidden=512, is_bit_noise=True)
    pool.run(cases.raw_rows, 3, 512, "bfloat16")
    pool.run(cases.scaled_trip, 3, work)


@pytest.mark.parametrize("dtype_name", ["uint8", "int32", "float32", "float16", "float64"])
def test_dispatch_moves_any_dtype(pool: Pool, dtype_name: str) -> None:
    pool.run(cases.raw_rows, 2, 48, dtype_name)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
def test_scales_of_any_layout(pool: Pool, scale_dtype: torch.dtype) -> None:
    works = [
        Workload((6, 0, 9), hidden, 3, 4, "random", num_scales, FP8, torch.int64, num_scales, scale_dtype, layout)
        for layout in SCALE_LAYOUTS for hidden, num_scales in ((128, 1), (2880, 23), (7168, 56))
    ]
    pool.run(cases.one_byte_trip, 3, works)


def test_scales_without_topk(pool: Pool) -> None:
    pool.run(cases.scaled_trip, 2, Workload((6, 4), dtype=torch.uint8, num_scales=3), How(has_topk=False))


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


@pytest.mark.parametrize("num_biases", [1, 2])
def test_combine_adds_bias(pool: Pool, num_biases: int) -> None:
    pool.run(cases.whole_trip, 3, Workload((9, 0, 17), hidden=264), None, num_biases)


def test_handle_serves_combine_and_cached_dispatch(pool: Pool) -> None:
    pool.run(cases.reused_handle, 4, Workload(uneven(4)))


@pytest.mark.parametrize("is_async", [False, True])
def test_two_dispatches_in_flight(pool: Pool, is_async: bool) -> None:
    pool.run(cases.two_in_flight, 3, Workload((12, 5, 9)), is_async)


def test_two_buffers_side_by_side(pool: Pool) -> None:
    pool.run(cases.two_buffers, 3, Workload((4, 8, 2)))


def test_autograd_round_trip(pool: Pool) -> None:
    pool.run(cases.autograd_round_trip, 3, Workload((4, 8, 0), hidden=64))


# Events


@pytest.mark.parametrize("on_comm_stream", [False, True])
def test_async(pool: Pool, on_comm_stream: bool) -> None:
    pool.run(cases.whole_trip, 3, Workload((8, 3, 12)), How(is_async=True, on_comm_stream=on_comm_stream), 1)


def test_chained_events(pool: Pool) -> None:
    pool.run(cases.chained_events, 4, Workload(uneven(4), routing="holes"))


def test_inputs_may_be_freed_after_an_async_call(pool: Pool) -> None:
    pool.run(cases.freed_inputs, 3, Workload((30, 20, 25), hidden=1024))


def test_results_may_be_dropped(pool: Pool) -> None:
    pool.run(cases.dropped_event, 3, Workload((9, 4, 7)))


def test_outputs_filled_by_torch(pool: Pool) -> None:
    pool.run(cases.poisoned_alloc_order, 2, Workload((40, 31), hidden=1024))


@pytest.mark.gpu
def test_graph_replays(pool: Pool) -> None:
    if device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    pool.run(cases.graph_replays, 2, Workload((12, 12), hidden=256))


# Rings and repetition


@pytest.mark.parametrize(("num_ranks", "num_slots"), [(2, 1), (2, 2), (3, 1), (4, 3)])
def test_rings_wrap(pool: Pool, num_ranks: int, num_slots: int) -> None:
    pool.run(cases.tiny_window, num_ranks, Workload(even(num_ranks, 70), hidden=72, num_topk=2), num_slots)


def test_too_small_buffer_is_an_error(pool: Pool) -> None:
    pool.run(failures.too_small_buffer, 2)


@pytest.mark.parametrize(("num_ranks", "seed", "num_nvl_bytes"), [(2, 1, 1 << 22), (4, 2, 1 << 22), (4, 3, 1 << 17)])
def test_changing_shapes_back_to_back(pool: Pool, num_ranks: int, seed: int, num_nvl_bytes: int) -> None:
    pool.run(cases.many_shapes, num_ranks, 25, seed, num_nvl_bytes)


def test_repeats_are_bitwise_equal(pool: Pool) -> None:
    pool.run(cases.bitwise_repeats, 4, Workload((30, 12, 25, 18), num_topk=6), 6)


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


@pytest.mark.parametrize("late", [0, 2])
def test_late_rank(pool: Pool, late: int) -> None:
    pool.run(cases.late_rank, 3, Workload((5, 9, 2)), late)


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
