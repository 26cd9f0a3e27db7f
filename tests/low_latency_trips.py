"""Tests of low-latency calls that a group within a node passes as one across nodes does."""

import low_latency_cases as cases
import low_latency_pressure
import pressure
import pytest
import torch
from low_latency_pending_call import BF16, FP8, FP8_ROUNDED, UE8M0, Manner
from utils import Group, device
from workload import ROUTINGS, Workload

CASTS = {"bf16": BF16, "fp8": FP8, "rounded": FP8_ROUNDED, "ue8m0": UE8M0}


def uneven(num_ranks: int, most: int = 13) -> tuple[int, ...]:
    """Different numbers of tokens, the last of several ranks with none."""
    return tuple(most * (num_ranks - 1 - rank) // max(1, num_ranks - 1) for rank in range(num_ranks)) or (most, )


class Trips:
    """Of `group`, and where there must be two ranks of `pair`: fixtures of the class that inherits these tests."""

    # Shapes

    def test_any_hidden_size(self, group: Group) -> None:
        """Pitfall 22, and what other libraries list."""
        hiddens = (8, 16, 24, 120, 520, 1000, 1536, 2048, 2880, 4096, 7168, 8192)
        group.run(cases.trips, [group.work((3, 1, 2, 5), hidden=hidden, seed=hidden) for hidden in hiddens])

    @pytest.mark.parametrize("mode", cases.MODES)
    def test_any_topk(self, group: Group, mode: str) -> None:
        """Also more than there are lanes in a warp, and more than there are experts."""
        works = [group.work((7, 9, 0, 4), hidden=64, num_topk=k, seed=k) for k in (1, 2, 6, 8, 9, 11, 16, 33)]
        group.run(cases.trips, works, Manner(mode=mode))

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_routing(self, group: Group, routing: str) -> None:
        """Pitfalls 16 and 26: -1, duplicates, all tokens to one expert, one rank, or nowhere."""
        dtypes = torch.int64, torch.int32
        group.run(cases.trips, [group.work((10, 1, 16, 8), routing=routing, idx_dtype=dtype) for dtype in dtypes])

    def test_no_tokens_at_all(self, group: Group) -> None:
        group.run(cases.zero_tokens_everywhere)

    def test_any_bits_arrive_exactly(self, group: Group) -> None:
        """Pitfall of contract 7, 15: NaN, infinities and denormals."""
        group.run(cases.any_bits, group.work((13, 8, 16, 3), hidden=512, is_bit_noise=True))

    # Formats, modes and options

    def test_every_format_and_mode(self, group: Group) -> None:
        group.run(cases.every_manner, group.work((9, 0, 16, 5), hidden=1024))

    @pytest.mark.parametrize("max_tokens", [9, 40])
    def test_fewer_tokens_than_allowed(self, group: Group, max_tokens: int) -> None:
        group.run(cases.whole_trip, group.work((9, 0, 5, 2)), Manner(max_tokens=max_tokens, has_stats=True))

    def test_zero_copy(self, group: Group) -> None:
        works = [group.work((9, 4, 5, 7), seed=seed) for seed in range(5)]
        group.run(cases.trips, works, Manner(zero_copy=True, has_out=True, max_tokens=9))

    @pytest.mark.parametrize("cast", ["bf16", "fp8"])
    def test_two_micro_batches(self, group: Group, cast: str) -> None:
        group.run(cases.two_micro_batches, group.work((12, 0, 9, 7)), CASTS[cast])

    def test_overlapped_layers(self, group: Group) -> None:
        group.run(cases.overlapped_layers, group.work((12, 5, 9, 1)))

    def test_inputs_may_be_dropped(self, group: Group) -> None:
        group.run(cases.freed_inputs, group.work((16, 9, 12, 4), hidden=1024))

    def test_inputs_of_a_call_with_a_hook_may_be_overwritten(self, group: Group) -> None:
        group.run(cases.overwritten_inputs, group.work((64, 9, 40, 4), hidden=1024))

    @pytest.mark.parametrize(("use_logfmt", "limit"), [(False, 0.0025), (True, 0.0045)])
    def test_error_of_the_weighted_sum(self, group: Group, use_logfmt: bool, limit: float) -> None:
        work = group.work((20, 12, 8, 16), num_topk=8, experts_per_rank=8)
        errors = group.run(cases.weighted_sum_error, work, use_logfmt)
        assert max(errors) < limit, errors

    def test_logfmt(self, group: Group) -> None:
        """Bit for bit, also where the row ends within a group or a thread's share."""
        works = [group.work((5, 0, 9, 3), hidden=hidden, seed=hidden) for hidden in (8, 16, 120, 264, 1000, 2880, 7168)]
        for mode in cases.MODES:
            group.run(cases.trips, works, Manner(mode=mode, use_logfmt=True, has_stats=True))

    # Buffers

    def test_buffers_side_by_side(self, group: Group) -> None:
        group.run(cases.side_by_side, group.work((4, 8, 2, 3)))

    def test_both_modes_in_turn(self, group: Group) -> None:
        group.run(cases.modes_in_turn, group.work((4, 8, 2, 5)))

    @pytest.mark.parametrize("cast", ["bf16", "fp8"])
    def test_repeats_are_bitwise_equal(self, group: Group, cast: str) -> None:
        group.run(cases.bitwise_repeats, group.work((14, 12, 5, 9), num_topk=6), CASTS[cast], 9)

    def test_random_calls_under_pressure(self, group: Group) -> None:

        def digests(seed: int, rounds: int) -> list[tuple[int, str]]:
            sizes = pressure.Sizes(6, 512, 4, 3)
            return group.run(low_latency_pressure.run, sizes, seed=seed, seconds=0.0, least_rounds=rounds)

        found = digests(1, 8)
        assert [rounds for rounds, _ in found] == [8] * group.num_ranks
        # Other ranks have other outputs; another run has the same, another seed others.
        assert found == digests(1, 8)
        assert len({digest for _, digest in found}) == group.num_ranks
        assert digests(2, 4) != found

    def test_late_rank(self, group: Group) -> None:
        for late in (0, group.num_ranks - 1):
            group.run(cases.late_rank, group.work((5, 9, 2, 4), routing="spread"), late)

    # Between two ranks, and of several groups

    def test_a_hook_that_is_not_called_blocks_nobody_forever(self, pair: Group) -> None:
        pair.run(cases.held_back_hook, Workload((4, 7)))

    def test_combine_with_the_entries_of_another_dispatch(self, pair: Group) -> None:
        messages = pair.run(cases.entries_of_another_dispatch, Workload((5, 9)))
        assert any("names an expert for which the dispatch" in message for message in messages), messages

    def test_cleaning_is_a_barrier(self, group: Group) -> None:
        group.run(cases.clean_is_a_barrier, group.work((4, 6, 2, 3)))

    @pytest.mark.parametrize("mode", cases.MODES)
    def test_graphs_of_different_sizes(self, pair: Group, mode: str) -> None:
        if device().type != "cuda":
            pytest.skip("CUDA graphs need a GPU; the executor's own are replayed in C++ tests")
        works = [
            Workload((12, 9), hidden=512),
            Workload((3, 16), hidden=1024, num_topk=2),
            Workload((0, 5), hidden=256)
        ]
        pair.run(cases.graph_replays, works, mode)
