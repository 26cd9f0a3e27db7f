"""The counters of waits: their shape, names, and what is said of them."""

import pytest
import torch
from single_rank import single_rank_buffer, single_rank_dispatch

import deep_ep
from deep_ep import _peers


def test_a_rank_alone_waits_for_nobody() -> None:
    with single_rank_buffer() as buffer:
        single_rank_dispatch(buffer)
        counters = buffer.get_wait_counters()
        assert counters.times_late.shape == (len(counters.operations), len(counters.stages), 1)
        assert counters.times_late.dtype == counters.waited_ns.dtype == torch.int64
        assert counters.waited_ns.shape == counters.times_late.shape
        assert {"dispatch", "combine", "low_latency_dispatch", "low_latency_combine"} <= set(counters.operations)
        assert {"start", "counts", "row", "loan", "rail_chunk"} <= set(counters.stages)
        assert buffer.dump_waits().startswith("rank 0: no wait for another rank lasted 50 us in 1 high-throughput")


def test_views_are_of_the_memory_that_the_kernels_count_in() -> None:
    with single_rank_buffer() as buffer:
        counters, dispatch, loan = buffer.get_wait_counters(), 2, _peers.STAGES.index("loan")
        assert _peers.OPERATIONS[dispatch] == "dispatch"
        counters.times_late[dispatch, loan, 0] = 4
        counters.waited_ns[dispatch, loan, 0] = 50_000_000
        assert buffer.dump_waits().splitlines()[1:] == [
            "  for rank 0 to enter the call (dispatch): in 4 calls, 12500.0 us each, 0.050 s in all"
        ]
        counters.reset()
        assert not buffer.get_wait_counters().times_late.any()


def test_the_longest_in_sum_comes_first() -> None:
    shape = len(_peers.OPERATIONS), len(_peers.STAGES), 3
    counters = _peers.WaitCounters(_peers.OPERATIONS, _peers.STAGES, torch.zeros(shape, dtype=torch.int64),
                                   torch.zeros(shape, dtype=torch.int64))  # yapf: disable
    for rank, waited_ns in enumerate((30_000, 0, 90_000)):
        counters.times_late[3, 0, rank] = waited_ns // 10_000
        counters.waited_ns[3, 0, rank] = waited_ns
    assert [line.split()[2] for line in _peers.describe_waits(counters)] == ["2", "0"]


def test_a_destroyed_buffer_has_none() -> None:
    buffer = single_rank_buffer()
    buffer.destroy()
    for ask in (buffer.get_wait_counters, buffer.dump_waits):
        with pytest.raises(deep_ep.Error, match="destroyed"):
            ask()
