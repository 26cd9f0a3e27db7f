"""Tests of dispatch and combine that a group within a node passes as one across nodes does."""

import intranode_cases as cases
import pytest
import torch
from pending_call import How
from utils import Group, device
from workload import SCALE_LAYOUTS, Workload, one_token_of

FP8 = torch.float8_e4m3fn


def uneven(num_ranks: int, most: int = 24) -> tuple[int, ...]:
    """Different numbers of tokens, the last of several ranks with none."""
    if num_ranks == 1:
        return (most, )
    return tuple(most * (num_ranks - 1 - rank) // (num_ranks - 1) + (rank % 2 if rank < num_ranks - 1 else 0)
                 for rank in range(num_ranks))


def even(num_ranks: int, tokens: int = 16) -> tuple[int, ...]:
    return (tokens, ) * num_ranks


class Trips:
    """Of `group`, a fixture of the class that inherits these tests."""

    # Shapes

    def test_any_hidden_size(self, group: Group) -> None:
        """Pitfall 22: not a multiple of a tile, not of a warp, and the smallest."""
        hiddens = (8, 16, 24, 120, 504, 520, 1000, 1536, 2048, 2560, 2880, 3072, 4096, 5120, 6144, 7168, 8192)
        group.run(cases.trips, [group.work((5, 3, 4, 0), hidden=hidden, seed=hidden) for hidden in hiddens])

    @pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize("has_topk", [True, False])
    def test_topk_dtypes_and_none(self, group: Group, idx_dtype: torch.dtype, has_topk: bool) -> None:
        work = Workload(uneven(group.num_ranks), idx_dtype=idx_dtype, routing="holes")
        group.run(cases.whole_trip, work, How(has_topk=has_topk))

    @pytest.mark.parametrize("expert_alignment", [1, 2, 16, 128])
    def test_expert_alignment(self, group: Group, expert_alignment: int) -> None:
        group.run(cases.whole_trip, group.work((9, 14, 2, 5)), How(expert_alignment=expert_alignment))

    def test_every_subset_of_empty_ranks(self, group: Group) -> None:
        group.run(cases.empty_subsets, group.work((5, 2, 9, 1), hidden=64))

    def test_one_token_in_total(self, group: Group) -> None:
        """Pitfall 25."""
        for owner in (0, group.num_ranks - 1):
            group.run(cases.trips, one_token_of(owner, group.num_ranks))

    # Payloads

    def test_random_bits_arrive_exactly(self, group: Group) -> None:
        """NaN payloads, infinities and denormals included."""
        group.run(cases.raw_rows, 512, "bfloat16")
        group.run(cases.scaled_trip, group.work((13, 8, 21, 0), hidden=512, is_bit_noise=True))

    @pytest.mark.parametrize("dtype_name", ["uint8", "int32", "float32", "float16", "float64"])
    def test_dispatch_moves_any_dtype(self, group: Group, dtype_name: str) -> None:
        group.run(cases.raw_rows, 48, dtype_name)

    @pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
    def test_scales_of_any_layout(self, group: Group, scale_dtype: torch.dtype) -> None:
        works = [
            group.work((6, 0, 9, 1),
                       hidden=hidden,
                       num_scales=num_scales,
                       dtype=FP8,
                       seed=num_scales,
                       scale_dtype=scale_dtype,
                       scale_layout=layout) for layout in SCALE_LAYOUTS
            for hidden, num_scales in ((128, 1), (2880, 23), (7168, 56))
        ]
        group.run(cases.one_byte_trip, works)

    def test_scales_without_topk(self, group: Group) -> None:
        group.run(cases.scaled_trip, group.work((6, 4, 3, 3), dtype=torch.uint8, num_scales=3), How(has_topk=False))

    # Modes

    @pytest.mark.parametrize("num_biases", [0, 1, 2])
    def test_combine_adds_bias(self, group: Group, num_biases: int) -> None:
        group.run(cases.whole_trip, group.work((9, 0, 17, 3), hidden=264), None, num_biases)

    @pytest.mark.parametrize("is_async", [False, True])
    def test_two_dispatches_in_flight(self, group: Group, is_async: bool) -> None:
        group.run(cases.two_in_flight, group.work((12, 5, 9, 2)), is_async)

    def test_two_buffers_side_by_side(self, group: Group) -> None:
        group.run(cases.two_buffers, group.work((4, 8, 2, 1)))

    def test_autograd_round_trip(self, group: Group) -> None:
        group.run(cases.autograd_round_trip, group.work((4, 8, 0, 3), hidden=64))

    # Events

    @pytest.mark.parametrize("on_comm_stream", [False, True])
    def test_async(self, group: Group, on_comm_stream: bool) -> None:
        group.run(cases.whole_trip, group.work((8, 3, 12, 5)), How(is_async=True, on_comm_stream=on_comm_stream), 1)

    def test_chained_events(self, group: Group) -> None:
        group.run(cases.chained_events, Workload(uneven(group.num_ranks), routing="holes"))

    def test_inputs_may_be_freed_after_an_async_call(self, group: Group) -> None:
        group.run(cases.freed_inputs, group.work((30, 20, 25, 9), hidden=1024))

    @pytest.mark.gpu
    def test_graph_replays(self, group: Group) -> None:
        if device().type != "cuda":
            pytest.skip("CUDA graphs need a GPU")
        group.run(cases.graph_replays, Workload(even(group.num_ranks, 12), hidden=256))

    # Repetition

    def test_repeats_are_bitwise_equal(self, group: Group) -> None:
        group.run(cases.bitwise_repeats, group.work((30, 12, 25, 18), num_topk=6), 6)

    def test_late_rank(self, group: Group) -> None:
        for late in (0, 2):
            group.run(cases.late_rank, group.work((5, 9, 2, 7)), late)
