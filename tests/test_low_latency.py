"""Low-latency dispatch and combine, against the reference.

    pytest tests/test_low_latency.py
    python tests/test_low_latency.py --num-processes 4 --num-tokens 128 --hidden 7168 --num-topk 8 --num-experts 288
    python tests/test_low_latency.py --pressure-test --seconds 600
"""

import argparse
from dataclasses import replace

import low_latency_cases as cases
import low_latency_pressure
import pressure
import pytest
import torch
from low_latency_pending_call import BF16, FP8, FP8_ROUNDED, UE8M0, Manner
from utils import Pool, device
from workload import ROUTINGS, Workload

CASTS = {"bf16": BF16, "fp8": FP8, "rounded": FP8_ROUNDED, "ue8m0": UE8M0}
WORKS_OF_GRAPHS = [
    Workload((12, 9), hidden=512),
    Workload((3, 16), hidden=1024, num_topk=2),
    Workload((0, 5), hidden=256)
]


def uneven(num_ranks: int, most: int = 13) -> tuple[int, ...]:
    """Different numbers of tokens, the last of several ranks with none."""
    return tuple(most * (num_ranks - 1 - rank) // max(1, num_ranks - 1) for rank in range(num_ranks)) or (most, )


# Shapes


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
def test_any_rank_count(pool: Pool, num_ranks: int) -> None:
    work = Workload((13, ) if num_ranks == 1 else uneven(num_ranks), seed=num_ranks)
    pool.run(cases.trips, num_ranks, [work, work.next()], Manner(FP8))


def test_any_hidden_size(pool: Pool) -> None:
    """Pitfall 22, and what other libraries list."""
    hiddens = (8, 16, 24, 120, 520, 1000, 1536, 2048, 2880, 4096, 7168, 8192)
    pool.run(cases.trips, 3, [Workload((3, 1, 2), hidden=hidden, seed=hidden) for hidden in hiddens])


@pytest.mark.parametrize(("cast", "hiddens"), [("fp8", (128, 384, 640, 2944, 7168)), ("rounded", (128, 2944)),
                                               ("ue8m0", (512, 1536, 7168))])
def test_fp8_hidden_sizes(pool: Pool, cast: str, hiddens: tuple[int, ...]) -> None:
    """Every group of 128 is cast as torch does it."""
    works = [Workload((3, 0, 4), hidden=hidden, seed=hidden) for hidden in hiddens]
    pool.run(cases.trips, 3, works, Manner(CASTS[cast]))


def test_any_topk(pool: Pool) -> None:
    """Also more than there are lanes in a warp, and more than there are experts."""
    pool.run(cases.trips, 2, [Workload((7, 9), hidden=64, num_topk=k, seed=k) for k in (1, 2, 6, 8, 9, 11, 16, 33)])


@pytest.mark.parametrize("experts_per_rank", [1, 3, 64])
def test_any_expert_count(pool: Pool, experts_per_rank: int) -> None:
    pool.run(cases.whole_trip, 3, Workload((11, 6, 8), 128, 2, experts_per_rank, seed=experts_per_rank))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(pool: Pool, routing: str) -> None:
    """Pitfalls 16 and 26: -1, duplicates, all tokens to one expert, one rank, or nowhere."""
    works = [Workload((10, 1, 16, 8), routing=routing, idx_dtype=dtype) for dtype in (torch.int64, torch.int32)]
    pool.run(cases.trips, 4, works)


def test_every_subset_of_empty_ranks(pool: Pool) -> None:
    pool.run(cases.empty_subsets, 4, Workload((5, 2, 9, 1), hidden=64))


def test_no_tokens_at_all(pool: Pool) -> None:
    pool.run(cases.zero_tokens_everywhere, 3)


def test_any_bits_arrive_exactly(pool: Pool) -> None:
    """Pitfall of contract 7, 15: NaN, infinities and denormals."""
    pool.run(cases.any_bits, 3, Workload((13, 8, 16), hidden=512, is_bit_noise=True))


# Formats, modes and options


def test_every_format_and_mode(pool: Pool) -> None:
    pool.run(cases.every_manner, 3, Workload((9, 0, 16), hidden=1024))


@pytest.mark.parametrize("max_tokens", [9, 40])
def test_fewer_tokens_than_allowed(pool: Pool, max_tokens: int) -> None:
    pool.run(cases.whole_trip, 3, Workload((9, 0, 5)), Manner(max_tokens=max_tokens, has_stats=True))


def test_zero_copy(pool: Pool) -> None:
    works = [Workload((9, 4, 5), seed=seed) for seed in range(5)]
    pool.run(cases.trips, 3, works, Manner(zero_copy=True, has_out=True, max_tokens=9))


@pytest.mark.parametrize("cast", ["bf16", "fp8"])
def test_two_micro_batches(pool: Pool, cast: str) -> None:
    pool.run(cases.two_micro_batches, 3, Workload((12, 0, 9)), CASTS[cast])


def test_overlapped_layers(pool: Pool) -> None:
    pool.run(cases.overlapped_layers, 3, Workload((12, 5, 9)))


def test_a_hook_that_is_not_called_blocks_nobody_forever(pool: Pool) -> None:
    pool.run(cases.held_back_hook, 2, Workload((4, 7)))


def test_inputs_may_be_dropped(pool: Pool) -> None:
    pool.run(cases.freed_inputs, 3, Workload((16, 9, 12), hidden=1024))


def test_inputs_of_a_call_with_a_hook_may_be_overwritten(pool: Pool) -> None:
    pool.run(cases.overwritten_inputs, 3, Workload((64, 9, 40), hidden=1024))


@pytest.mark.parametrize(("use_logfmt", "limit"), [(False, 0.0025), (True, 0.0045)])
def test_error_of_the_weighted_sum(pool: Pool, use_logfmt: bool, limit: float) -> None:
    work = Workload((20, 12, 8, 16), num_topk=8, experts_per_rank=8)
    errors = pool.run(cases.weighted_sum_error, 4, work, use_logfmt)
    assert max(errors) < limit, errors


def test_logfmt(pool: Pool) -> None:
    """Bit for bit, also where the row ends within a group or a thread's share."""
    works = [Workload((5, 0, 9), hidden=hidden, seed=hidden) for hidden in (8, 16, 120, 264, 1000, 2880, 7168)]
    for mode in cases.MODES:
        pool.run(cases.trips, 3, works, Manner(mode=mode, use_logfmt=True, has_stats=True))


# Buffers


def test_buffers_side_by_side(pool: Pool) -> None:
    pool.run(cases.side_by_side, 3, Workload((4, 8, 2)))


def test_both_modes_in_turn(pool: Pool) -> None:
    pool.run(cases.modes_in_turn, 3, Workload((4, 8, 2)))


def test_the_caller_may_zero_the_region(pool: Pool) -> None:
    pool.run(cases.zeroed_by_caller, 3, Workload((4, 8, 2)))


@pytest.mark.parametrize(("num_ranks", "seed"), [(2, 1), (4, 2), (3, 3)])
def test_changing_shapes_back_to_back(pool: Pool, num_ranks: int, seed: int) -> None:
    pool.run(cases.many_shapes, num_ranks, 20, seed)


@pytest.mark.parametrize("cast", ["bf16", "fp8"])
def test_repeats_are_bitwise_equal(pool: Pool, cast: str) -> None:
    pool.run(cases.bitwise_repeats, 4, Workload((14, 12, 5, 9), num_topk=6), CASTS[cast], 9)


def test_random_calls_under_pressure(pool: Pool) -> None:
    sizes = pressure.Sizes(6, 512, 4, 3)
    found = pool.run(low_latency_pressure.run, 3, sizes, seed=1, seconds=0.0, least_rounds=8)
    assert [rounds for rounds, _ in found] == [8, 8, 8]
    # Other ranks have other outputs; another run has the same, another seed others.
    again = pool.run(low_latency_pressure.run, 3, sizes, seed=1, seconds=0.0, least_rounds=8)
    assert found == again
    assert len({digest for _, digest in found}) == 3
    assert pool.run(low_latency_pressure.run, 3, sizes, seed=2, seconds=0.0, least_rounds=4) != found


@pytest.mark.parametrize("ranks", [(1, 3), (6, ), (0, 2, 5)])
def test_sub_groups(pool: Pool, ranks: tuple[int, ...]) -> None:
    """Pitfall 35: global ranks that are neither contiguous nor from zero."""
    pool.run(cases.whole_trip, len(ranks), Workload((6, ) * len(ranks)), ranks=ranks)


@pytest.mark.parametrize("late", [0, 2])
def test_late_rank(pool: Pool, late: int) -> None:
    pool.run(cases.late_rank, 3, Workload((5, 9, 2), routing="spread"), late)


# Failures


def test_killed_rank(pool: Pool) -> None:
    for message in pool.run(cases.killed_rank, 3, Workload((4, 6, 2)), 1, dying=(1, )):
        assert message is None or "rank 1" in message


@pytest.mark.parametrize("dies", [True, False])
def test_shrinking_without_a_rank(pool: Pool, dies: bool) -> None:
    results = pool.run(cases.shrunk_group, 3, Workload((4, 6, 2)), 1, dies, dying=(1, ) if dies else ())
    assert results == [[0, 0, 0], None, [0, 0, 0]]


def test_cleaning_is_a_barrier(pool: Pool) -> None:
    pool.run(cases.clean_is_a_barrier, 3, Workload((4, 6, 2)))


def test_cleaning_masks_who_does_not_come(pool: Pool) -> None:
    assert pool.run(cases.clean_without_a_rank, 3, 2, True) == [[0, 0, 1], [0, 0, 1], None]
    for message in pool.run(cases.clean_without_a_rank, 3, 2, False)[:2]:
        assert "clean_low_latency_buffer, call 1" in message and "rank 2" in message, message


def check_entries_of_another_dispatch(pool: Pool) -> None:
    messages = pool.run(cases.entries_of_another_dispatch, 2, Workload((5, 9)))
    assert any("names an expert for which the dispatch" in message for message in messages), messages


def test_combine_with_the_entries_of_another_dispatch(pool: Pool) -> None:
    check_entries_of_another_dispatch(pool)


# Graphs


@pytest.mark.parametrize("mode", cases.MODES)
def test_graphs_of_different_sizes(pool: Pool, mode: str) -> None:
    if device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    pool.run(cases.graph_replays, 2, WORKS_OF_GRAPHS, mode)


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_graph_is_replayed_before_a_hook(pool: Pool, mode: str) -> None:
    if device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU; the executor's own are replayed in low_latency_test.cc")
    pool.run(cases.replay_before_a_hook, 2, Workload((5, 9), hidden=512), Workload((3, 7), hidden=1024), mode)


def test_a_graph_of_two_calls_is_replayed_before_a_hook(pool: Pool) -> None:
    if device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU; the executor's own are replayed in low_latency_test.cc")
    messages = pool.run(cases.replay_of_two_calls_before_a_hook, 2, Workload((5, 9), hidden=512))
    assert any("is still open" in message for message in messages), messages


def test_replays_after_a_failure(pool: Pool) -> None:
    if device().type != "cuda":
        pytest.skip("CUDA graphs need a GPU; the executor's own are replayed in low_latency_test.cc")
    message = pool.run(cases.replays_after_a_failure, 2, Workload((5, 9), hidden=512))[0]
    assert "rank 1" in message, message


def main() -> None:
    parser = argparse.ArgumentParser(description="Low-latency dispatch and combine, checked against the reference")
    for name, default in (("num-processes", 4), ("num-tokens", 32), ("hidden", 7168), ("num-topk", 8), ("num-experts",
                                                                                                        64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--use-logfmt", action="store_true", help="combine in the 10-bit logarithmic format")
    parser.add_argument("--shrink-test", action="store_true", help="kill a rank and go on without it")
    parser.add_argument(
        "--pressure-test",
        action="store_true",
        help="random calls, each several times, bits compared, for --seconds; the sizes are the largest")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the pressure test")
    args = parser.parse_args()
    if args.num_experts % args.num_processes:
        parser.error("--num-experts must be a multiple of --num-processes")
    pool = Pool(args.num_processes)
    work = Workload((args.num_tokens, ) * args.num_processes, args.hidden, args.num_topk,
                    args.num_experts // args.num_processes)
    if args.shrink_test:
        run_shrink_test(pool, replace(work, num_tokens=(8, ) * args.num_processes, hidden=512))
    elif args.pressure_test:
        run_pressure_test(pool, work, args.seed, args.seconds)
    else:
        run_formats(pool, work, args.use_logfmt)
    pool.close()


def run_formats(pool: Pool, work: Workload, use_logfmt: bool) -> None:
    num_bytes = cases._bytes_for(work)
    for name, cast in CASTS.items():
        if work.hidden % (512 if cast.use_ue8m0 else 128 if cast.use_fp8 else 8):
            continue
        for mode in cases.MODES:
            pool.run(cases.whole_trip,
                     work.num_ranks,
                     work,
                     Manner(cast, mode, use_logfmt=use_logfmt),
                     num_bytes,
                     deadline_s=600)
            print(f"{name}, {mode}: passed", flush=True)


def run_shrink_test(pool: Pool, work: Workload) -> None:
    victim = work.num_ranks - 1
    results = pool.run(cases.shrunk_group, work.num_ranks, work, victim, True, dying=(victim, ), deadline_s=600)
    print(f"killed rank {victim}; {sum(result is not None for result in results)} ranks went on: passed")


def run_pressure_test(pool: Pool, work: Workload, seed: int, seconds: float) -> None:
    sizes = pressure.Sizes(max(work.num_tokens), work.hidden, work.num_topk, work.experts_per_rank)
    pressure.announce(sizes, seed, seconds)
    found = pool.run(low_latency_pressure.run, work.num_ranks, sizes, seed, seconds, deadline_s=seconds + 300)
    print(pressure.summary(found))


if __name__ == "__main__":
    main()
