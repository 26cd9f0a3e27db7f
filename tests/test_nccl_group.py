"""Buffers over the process groups that users have: NCCL, alone or beside gloo. NCCL wants a GPU for each rank."""

import call_check_cases as call_checks
import intranode_cases as high_throughput
import low_latency_cases as low_latency
import pytest
import torch
from low_latency_pending_call import FP8, Manner
from test_call_check import SENTENCES
from utils import Pool
from workload import Workload

from deep_ep._env import device_choice

pytestmark = pytest.mark.skipif(device_choice()[0] != "cuda" or not torch.distributed.is_nccl_available(),
                                reason="NCCL needs a GPU")
MOST_RANKS = 8


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_both_modes(backend: str) -> None:
    num_ranks = min(torch.cuda.device_count(), MOST_RANKS)
    work = Workload((33, 20, 1, 40, 7, 12, 0, 25)[:num_ranks])
    # NVLink multicast off: on a shared host it can put GPUs out of service.
    pool = Pool(num_ranks, {"NCCL_NVLS_ENABLE": "0"}, backend)
    try:
        pool.run(high_throughput.whole_trip, num_ranks, work)
        pool.run(low_latency.whole_trip, num_ranks, work, Manner(FP8))
    finally:
        pool.close()


def test_calls_are_compared_over_nccl() -> None:
    """DEEP_EP_CHECK_CALLS through a group that moves tensors of GPUs only: the sentences, and calls that agree."""
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each of two ranks")
    pool = Pool(2, {"NCCL_NVLS_ENABLE": "0", "DEEP_EP_CHECK_CALLS": "1"}, "nccl")
    try:
        for messages in pool.run(call_checks.different_calls, 2):
            assert len(messages) == len(SENTENCES)
            for message, sentence in zip(messages, SENTENCES):
                assert message.endswith(sentence)
        message, _ = pool.run(call_checks.absent_rank, 2)
        assert "never entered this call: rank 1" in message
    finally:
        pool.close()
