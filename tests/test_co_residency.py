"""Calls that share a GPU with kernels of others (pitfalls 13, 38). In the executor:
tests/cpp/bench/co_residency_test.cc."""

from collections.abc import Iterator

import co_residency_cases as cases
import pytest
import torch
from pending_call import How
from utils import Pool, device
from virtual_nodes import virtual_nodes
from workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device().type != "cuda" or torch.cuda.device_count() < 2,
                       reason="needs a GPU for each rank: what holds SMs would hold those of the other rank")
]
MOST_RANKS = 4


def num_ranks() -> int:
    return min(torch.cuda.device_count(), MOST_RANKS)


def work(hidden: int = 1024) -> Workload:
    return Workload((33, 20, 1, 40)[:num_ranks()], hidden=hidden)


@pytest.fixture(scope="module")
def own_gpus() -> Iterator[Pool]:
    made = Pool(num_ranks(), {"NCCL_NVLS_ENABLE": "0"}, "cpu:gloo,cuda:nccl")
    yield made
    made.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Pool]:
    made = Pool(num_ranks(), virtual_nodes(1))
    yield made
    made.close()


@pytest.mark.parametrize("num_sms", [2, 16])
@pytest.mark.parametrize("how", [How(), How(worst_factor=1), How(is_async=True, lends=True)])
def test_high_throughput_needs_no_more_sms_than_it_was_given(own_gpus: Pool, num_sms: int, how: How) -> None:
    how = How(how.is_async, worst_factor=how.worst_factor, lends=how.lends, num_sms=num_sms)
    own_gpus.run(cases.high_throughput, num_ranks(), work(), how, True)


@pytest.mark.parametrize("num_sms", [4, 16])
def test_high_throughput_across_nodes_needs_no_more(nodes: Pool, num_sms: int) -> None:
    nodes.run(cases.high_throughput, num_ranks(), work(), How(num_sms=num_sms), True)


@pytest.mark.parametrize("num_free", [1, 8])
def test_low_latency_needs_one_sm(own_gpus: Pool, num_free: int) -> None:
    own_gpus.run(cases.low_latency, num_ranks(), work(), num_free)


def test_ranks_may_launch_collectives_in_other_orders(own_gpus: Pool) -> None:
    own_gpus.run(cases.in_other_orders, num_ranks(), work(7168), 16)


def test_other_work_may_come_before_or_after(own_gpus: Pool) -> None:
    own_gpus.run(cases.before_and_after, num_ranks(), work(), 1)
