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
from low_latency_pending_call import FP8, Manner
from low_latency_trips import CASTS, Trips, uneven
from utils import Group, Pool, device
from workload import Workload


class TestTrips(Trips):

    @pytest.fixture
    def group(self, pool: Pool) -> Group:
        return Group(pool, 3)

    @pytest.fixture
    def pair(self, pool: Pool) -> Group:
        return Group(pool, 2)


# Shapes


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
def test_any_rank_count(pool: Pool, num_ranks: int) -> None:
    work = Workload((13, ) if num_ranks == 1 else uneven(num_ranks), seed=num_ranks)
    pool.run(cases.trips, num_ranks, [work, work.next()], Manner(FP8))


@pytest.mark.parametrize(("cast", "hiddens"), [("fp8", (128, 384, 640, 2944, 7168)), ("rounded", (128, 2944)),
                                               ("ue8m0", (512, 1536, 7168))])
def test_fp8_hidden_sizes(pool: Pool, cast: str, hiddens: tuple[int, ...]) -> None:
    """Every group of 128 is cast as torch does it."""
    works = [Workload((3, 0, 4), hidden=hidden, seed=hidden) for hidden in hiddens]
    pool.run(cases.trips, 3, works, Manner(CASTS[cast]))


@pytest.mark.parametrize("experts_per_rank", [1, 3, 64])
def test_any_expert_count(pool: Pool, experts_per_rank: int) -> None:
    pool.run(cases.whole_trip, 3, Workload((11, 6, 8), 128, 2, experts_per_rank, seed=experts_per_rank))


def test_every_subset_of_empty_ranks(pool: Pool) -> None:
    pool.run(cases.empty_subsets, 4, Workload((5, 2, 9, 1), hidden=64))


# Buffers


def test_the_caller_may_zero_the_region(pool: Pool) -> None:
    pool.run(cases.zeroed_by_caller, 3, Workload((4, 8, 2)))


@pytest.mark.parametrize(("num_ranks", "seed"), [(2, 1), (4, 2), (3, 3)])
def test_changing_shapes_back_to_back(pool: Pool, num_ranks: int, seed: int) -> None:
    pool.run(cases.many_shapes, num_ranks, 20, seed)


@pytest.mark.parametrize("ranks", [(1, 3), (6, ), (0, 2, 5)])
def test_sub_groups(pool: Pool, ranks: tuple[int, ...]) -> None:
    """Pitfall 35: global ranks that are neither contiguous nor from zero."""
    pool.run(cases.whole_trip, len(ranks), Workload((6, ) * len(ranks)), ranks=ranks)


# Failures


def test_killed_rank(pool: Pool) -> None:
    for message in pool.run(cases.killed_rank, 3, Workload((4, 6, 2)), 1, dying=(1, )):
        assert message is None or "rank 1" in message


@pytest.mark.parametrize("dies", [True, False])
def test_shrinking_without_a_rank(pool: Pool, dies: bool) -> None:
    results = pool.run(cases.shrunk_group, 3, Workload((4, 6, 2)), 1, dies, dying=(1, ) if dies else ())
    assert results == [[0, 0, 0], None, [0, 0, 0]]


def test_cleaning_masks_who_does_not_come(pool: Pool) -> None:
    assert pool.run(cases.clean_without_a_rank, 3, 2, True) == [[0, 0, 1], [0, 0, 1], None]
    for message in pool.run(cases.clean_without_a_rank, 3, 2, False)[:2]:
        assert "clean_low_latency_buffer, call 1" in message and "rank 2" in message, message


# Graphs


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
