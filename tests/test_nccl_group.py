"""Buffers over the process groups that users have: NCCL, alone or beside gloo. NCCL wants a GPU for each rank."""

import intranode_cases as high_throughput
import low_latency_cases as low_latency
import pytest
import torch
from low_latency_pending_call import FP8, Manner
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
