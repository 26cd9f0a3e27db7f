"""A Buffer whose group spans nodes: how it is built, and what it refuses. Virtual nodes of two ranks on one machine."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import node_failure_cases as cases
import pytest
from utils import Pool, Worker
from workload import Workload

import deep_ep_cpp
from deep_ep import Buffer, Error, TransportError, _env, _nvshmem, model

RANKS_PER_NODE = {"DEEP_EP_RANKS_PER_NODE": "2"}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    shared = Pool(4, RANKS_PER_NODE)
    yield shared
    shared.close()


def rail_of(worker: Worker, **options: Any) -> tuple[int, str, str]:
    with worker.new_buffer(**options) as buffer:
        return buffer.runtime.num_rail_bytes, buffer.runtime.rail_name, repr(buffer)


def failure_of(worker: Worker, **options: Any) -> str:
    try:
        worker.new_buffer(**options).destroy()
    except Exception as error:  # noqa: BLE001 - its sentence is looked at
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(("options", "num_rail_bytes"), [({"num_rdma_bytes": 1 << 20}, 1 << 20),
                                                         ({"num_nvl_bytes": 1 << 22}, 16 << 20),
                                                         ({"num_nvl_bytes": 1 << 25}, 1 << 25)])  # yapf: disable
def test_the_rail_window_is_what_was_asked_for_or_one_of_its_own(pool: Pool, options: dict[str, int],
                                                                 num_rail_bytes: int) -> None:
    for rank, (num_bytes, name, text) in enumerate(pool.run(rail_of, 4, **options)):
        assert num_bytes == num_rail_bytes
        assert name.startswith("host (TCP, ")
        assert f"node {rank // 2} of 2 with 2 rank(s)" in text


def test_within_a_node_there_is_no_rail(pool: Pool) -> None:
    for num_bytes, name, _ in pool.run(rail_of, 2):
        assert (num_bytes, name) == (0, "")


def rail_after_failure(worker: Worker, sentence: str) -> str:
    """The engine of a Buffer for which `nvshmem` was chosen, and does not begin on rank 1; or what was raised."""
    make = deep_ep_cpp.Buffer

    def make_on_a_bad_day(*args: Any, rail: str, **options: Any) -> deep_ep_cpp.Buffer:
        if rail == "nvshmem" and worker.rank == 1:
            raise TransportError(sentence)
        return make(*args, rail="host", **options)

    make_on_a_bad_day.LEND_PART_OF_DATA = make.LEND_PART_OF_DATA
    with mock.patch.object(_nvshmem, "obstacle",
                           return_value=""), mock.patch.object(deep_ep_cpp, "Buffer", make_on_a_bad_day):
        try:
            return rail_of(worker)[1]
        except Error as error:
            return f"{type(error).__name__}: {error}"


def chosen_by_the_model(worker: Worker, *gb_per_s: float) -> tuple[float, list[int]]:
    """Of a Buffer over `nvshmem`, on machines whose NICs have these rates: the rate that chunks are planned for, and
    the SMs of a small and a large combine without a config. (The engine is another: this machine has no NIC.)"""
    make, rates = deep_ep_cpp.Buffer, []

    def make_over_tcp(*args: Any, rail: str, rail_gb_per_s: float, **options: Any) -> deep_ep_cpp.Buffer:
        rates.append(rail_gb_per_s)
        return make(*args, rail="host", rail_gb_per_s=rail_gb_per_s, **options)

    make_over_tcp.LEND_PART_OF_DATA = make.LEND_PART_OF_DATA
    with mock.patch.object(_nvshmem, "obstacle", return_value=""), \
            mock.patch.object(_env, "nic_gb_per_s", return_value=gb_per_s[worker.rank]), \
            mock.patch.object(deep_ep_cpp, "Buffer", make_over_tcp), worker.new_buffer() as buffer:
        costs = buffer._require_session().cost_model
        return rates[0], [costs.budget("combine", Buffer.num_sms, num_bytes, 4) for num_bytes in (1 << 10, 1 << 30)]


def test_the_model_chooses_chunks_and_sms_by_the_rates_of_the_nics(pool: Pool) -> None:
    """The two ranks of a machine share 1600 GB/s, those of the other 800: all plan for the slower one."""
    expected = model.costs_across_nodes(2, 2, 400.0)
    for rate, num_sms in pool.run(chosen_by_the_model, 4, 1600.0, 1600.0, 800.0, 800.0):
        assert rate == 400.0
        assert num_sms == [expected.budget("combine", Buffer.num_sms, num_bytes, 4) for num_bytes in (1 << 10, 1 << 30)]
        assert num_sms[0] == model.LEAST_SMS < num_sms[1] <= Buffer.num_sms


def test_where_nvshmem_does_not_begin_the_other_engine_does(pool: Pool) -> None:
    for name in pool.run(rail_after_failure, 4, "NVSHMEM: its initialization failed"):
        assert name.startswith("host (TCP, ")


def test_a_failure_that_is_not_of_nvshmem_stays_one(pool: Pool) -> None:
    for sentence in pool.run(rail_after_failure, 4, "the device is out of memory"):
        assert "the device is out of memory" in sentence


def test_ranks_agree_on_the_engine() -> None:
    pool = Pool(2, {"DEEP_EP_RANKS_PER_NODE": "1", "DEEP_EP_RAIL": "pigeons"})
    for sentence in pool.run(failure_of, 2):
        assert "DEEP_EP_RAIL: expected 'nvshmem', 'host' or nothing (automatic), got 'pigeons'" in sentence
    pool.close()


def test_an_interface_that_is_not_there_is_named() -> None:
    pool = Pool(2, {"DEEP_EP_RANKS_PER_NODE": "1", "DEEP_EP_RAIL_INTERFACE": "no-such-interface"})
    for sentence in pool.run(failure_of, 2):
        assert sentence.startswith("InvalidArgument: Buffer: DEEP_EP_RAIL_INTERFACE: ")
        assert "'no-such-interface'" in sentence
    pool.close()


def test_the_interface_is_the_one_that_reaches_the_master() -> None:
    pool = Pool(2, {"DEEP_EP_RANKS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1"})
    for _, name, _ in pool.run(rail_of, 2):
        assert name.startswith("host (TCP, 127.0.0.1:")
    pool.close()


@pytest.mark.parametrize("has_child", [False, True])
def test_idle_ranks_are_told_of_one_that_died(pool: Pool, has_child: bool) -> None:
    """Its rail peer sees the connection end, whatever children it has; the others hear it from there."""
    victim = 3
    found = pool.run(cases.killed_while_idle, 4, victim, has_child, dying=(victim, ))
    kind, sentence, _ = found[1]
    assert kind == "TransportError", found
    assert "DeepEP error: rank 1 of node 0: rail: the connection to rank 3 at " in sentence
    assert "DeepEP error: rank 0 of node 0: aborted, because rank 1 of node 0 failed: " in found[0][1]
    assert "rank 1 of node 0 reported an error of its own; rank 3 of node 1: its process has ended." in found[2][1]
    assert all(is_in_time for _, _, is_in_time in found[:victim]), found


def test_a_rank_that_leaves_is_no_failure(pool: Pool) -> None:
    assert pool.run(cases.destroyed_while_others_idle, 4, 3) == [("", "")] * 4


def test_who_waits_for_a_rank_that_left_is_told_so(pool: Pool) -> None:
    messages = pool.run(cases.called_after_one_left, 4, Workload((3, 5, 2, 4)), 3)
    assert any("rank 3 of node 1 (its last call was 0; it has destroyed its Buffer)" in message
               for message in messages[:2]), messages
    assert all("rank 3 of node 1" in message for message in messages[:3]), messages


def low_latency_failures(worker: Worker) -> list[str]:
    with worker.new_buffer() as buffer:
        sentences = []
        for call in (lambda: buffer.runtime.clean_low_latency(0), lambda: buffer.clean_low_latency_buffer(4, 128, 4)):
            try:
                call()
            except Exception as error:  # noqa: BLE001 - its sentence is looked at
                sentences.append(str(error))
        return sentences


def test_low_latency_calls_of_a_buffer_without_the_mode_are_refused(pool: Pool) -> None:
    for native, public in pool.run(low_latency_failures, 4):
        assert "num_rdma_bytes is too small for low-latency calls of a group that spans nodes" in native
        assert "low_latency_mode=True" in public
