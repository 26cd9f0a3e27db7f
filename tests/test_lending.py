"""Tensors that peers write and read in place (`num_lend_bytes`, `Buffer.lend`), against the reference."""

from collections.abc import Iterator
from typing import Any

import client_cases as clients
import intranode_cases as cases
import lending_cases as lending
import pytest
import torch
from pending_call import How
from utils import Pool
from workload import ROUTINGS, Workload

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def lending_pool() -> Iterator[Pool]:
    """Processes whose Buffers all lend, in groups of any size."""
    shared = Pool(num_processes=5, environment={"DEEP_EP_LEND_BYTES": str(1 << 24)})
    yield shared
    shared.close()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("lends", [False, True])
def test_any_rank_count(lending_pool: Pool, num_ranks: int, lends: bool) -> None:
    tokens = tuple(range(3, 3 + 4 * num_ranks, 4))
    lending_pool.run(cases.whole_trip, num_ranks, Workload(tokens), How(lends=lends), num_biases=2)


def test_any_hidden_size(lending_pool: Pool) -> None:
    lending_pool.run(cases.trips, 3,
                     [Workload((5, 3, 4), hidden=hidden, seed=hidden) for hidden in (8, 120, 520, 1536, 7168)],
                     How(lends=True))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(lending_pool: Pool, routing: str) -> None:
    lending_pool.run(cases.whole_trip, 4, Workload((20, 1, 33, 0), routing=routing), How(lends=True))


@pytest.mark.parametrize("has_topk", [True, False])
def test_scales(lending_pool: Pool, has_topk: bool) -> None:
    lending_pool.run(cases.scaled_trip, 3, Workload((6, 0, 9), dtype=FP8, num_scales=5), How(has_topk=has_topk))


@pytest.mark.parametrize("dtype_name", ["uint8", "float64"])
def test_any_dtype(lending_pool: Pool, dtype_name: str) -> None:
    lending_pool.run(cases.raw_rows, 2, 48, dtype_name)


def test_worst_case(lending_pool: Pool) -> None:
    lending_pool.run(cases.worst_case_tail, 3, Workload((15, 7, 0), hidden=64))
    lending_pool.run(cases.cached_after_worst_case, 3, Workload((4, 0, 11)))


@pytest.mark.parametrize("case", [cases.reused_handle, cases.freed_inputs, cases.dropped_event, cases.chained_events])
def test_calls_in_sequence(lending_pool: Pool, case: Any) -> None:
    lending_pool.run(case, 3, Workload((9, 4, 6)))


@pytest.mark.parametrize("is_async", [False, True])
def test_two_in_flight(lending_pool: Pool, is_async: bool) -> None:
    lending_pool.run(cases.two_in_flight, 3, Workload((9, 4, 6)), is_async)


def test_results_repeat_bit_by_bit(lending_pool: Pool) -> None:
    lending_pool.run(cases.bitwise_repeats, 4, Workload((40, 31, 22, 9)), 6)


def test_graph_replays(lending_pool: Pool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a GPU")
    lending_pool.run(cases.graph_replays, 2, Workload((12, 12), hidden=256))


@pytest.mark.parametrize("worst_factor", [0, 1])
@pytest.mark.parametrize("on_comm_stream", [False, True])
def test_outputs_are_lent(pool: Pool, worst_factor: int, on_comm_stream: bool) -> None:
    how = How(worst_factor=worst_factor, is_async=on_comm_stream, on_comm_stream=on_comm_stream)
    for found in pool.run(lending.outputs_are_lent, 2, Workload((9, 6)), how):
        assert found == [True] * 4


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("on_comm_stream", [False, True])
def test_sums_are_lent_between_two_ranks(pool: Pool, num_ranks: int, on_comm_stream: bool) -> None:
    how = How(is_async=on_comm_stream, on_comm_stream=on_comm_stream)
    work = Workload((2048, 2100, 2200)[:num_ranks], hidden=64)
    for found in pool.run(lending.sums_are_lent, num_ranks, work, how):
        assert found == {"plain": num_ranks == 2, "with a bias": False, "of lent rows": False}


def test_few_sums_are_not_lent(pool: Pool) -> None:
    for found in pool.run(lending.sums_are_lent, 2, Workload((60, 90)), How()):
        assert not any(found.values())


def test_captured_calls_lend(pool: Pool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a GPU")
    pool.run(lending.captured_calls_lend, 2, Workload((30, 20), hidden=512))


# Without asking

LENDING_CLIENTS = {
    "vllm": clients.vllm,
    "sglang": clients.sglang,
    "megatron": clients.megatron,
    "xtuner": clients.xtuner,
    "tensorrt_llm": clients.tensorrt_llm,
    "rtp_llm": clients.rtp_llm,
    "lmdeploy": clients.lmdeploy
}


@pytest.mark.parametrize("client", LENDING_CLIENTS)
def test_a_client_gets_lent_outputs(pool: Pool, client: str) -> None:
    found = set().union(*pool.run(lending.client_gets_lent, 3, LENDING_CLIENTS[client]))
    assert ("fresh", True) in found
    assert not [kind for kind, is_lent in found if not is_lent]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_buffers_as_frameworks_build_them_lend(pool: Pool, num_ranks: int) -> None:
    for found in pool.run(lending.builds_lend, num_ranks, Workload((6, 9, 4, 7)[:num_ranks], hidden=lending.HIDDEN)):
        assert [name for name, is_lent in found.items() if not is_lent] == []


def test_lending_can_be_turned_off(pool: Pool) -> None:
    for found in pool.run(lending.lending_can_be_turned_off, 2, Workload((9, 6))):
        assert found == [False, False, True, True]


@pytest.mark.parametrize("how",
                         [How(), How(is_async=True), How(is_async=True, on_comm_stream=True)],
                         ids=["sync", "async", "on comm stream"])
def test_rows_move_while_the_host_learns_how_many_they_are(pool: Pool, how: How) -> None:
    """`g`: with a guess; `r`: the second half of a call whose guess was too small, here that of rank 0."""
    first, second = pool.run(lending.guesses, 2, [(40, 30), (9, 12), (0, 0), (2, 2), (2, 900), (2, 900)], how)
    assert first == ["g", "g", "g", "g", "gr", "g"]
    assert second == ["g", "g", "g", "g", "g", "g"]


def test_without_room_for_a_guess_the_host_asks_first(pool: Pool) -> None:
    for made in pool.run(lending.guesses, 2, [(40, 30), (9, 12)], How(), leaves_room=False):
        assert made == ["cr", "cr"]


def test_a_received_tensor_keeps_its_rows_and_no_more(pool: Pool) -> None:
    pool.run(lending.rows_kept, 2, Workload((900, 700), hidden=1024, num_topk=4))


def test_outputs_are_kept_one_by_one(pool: Pool) -> None:
    pool.run(lending.outputs_are_kept_one_by_one, 2, Workload((900, 900), hidden=2048, num_topk=4))


def test_several_buffers(pool: Pool) -> None:
    pool.run(lending.several_buffers, 3, Workload((9, 6, 7)))


def test_dropped_by_another_thread(pool: Pool) -> None:
    pool.run(lending.dropped_by_another_thread, 2, Workload((60, 45), hidden=512))


def test_freed_rows_are_lent_again(pool: Pool) -> None:
    pool.run(lending.freed_rows_are_lent_again, 2, Workload((200, 150), hidden=1024, routing="random"))


def test_no_room_is_no_error(pool: Pool) -> None:
    for found in pool.run(lending.no_room_is_no_error, 2, Workload((60, 60), hidden=1024)):
        assert found[0]
        assert not found[-1]


def test_rows_outlive_the_buffer(pool: Pool) -> None:
    pool.run(lending.rows_outlive_the_buffer, 2, Workload((9, 6)))


def test_views_hold_the_memory(pool: Pool) -> None:
    pool.run(lending.views_hold_the_memory, 2, Workload((40, 30)))


def test_part_of_a_lent_tensor(pool: Pool) -> None:
    pool.run(lending.part_of_a_lent_tensor, 3, Workload((9, 6, 7)))


def test_lend_names_what_is_wrong(pool: Pool) -> None:
    for room, negative, fraction, never, size in pool.run(lending.lend_errors, 2):
        assert "no room for 1048577 bytes; num_lend_bytes is 1048576" in room
        assert negative == "shape[0] must be at least 0, got -1"
        assert fraction == "shape[0] must be an int, got float"
        assert "this Buffer lends nothing; build it with a larger num_nvl_bytes" in never
        assert "num_lend_bytes must be a multiple of 128, got 100" in size
