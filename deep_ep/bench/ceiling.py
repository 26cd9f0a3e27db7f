"""The wire ceiling: what the links of this machine carry when every rank writes to all its peers at once."""
from __future__ import annotations

from functools import partial
from typing import Any

import torch

import deep_ep_cpp
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.timing import Timer, median

CUDA_BYTES_PER_PEER = 64 << 20
CPU_BYTES_PER_PEER = 1 << 20
NUM_WARMUPS = 3
NUM_REPEATS = 20


class PushStream:
    """Where the push kernel is launched: torch's current stream, or on the CPU a stream of its own."""

    def __init__(self, is_cuda: bool) -> None:
        self._cpu_device = None if is_cuda else deep_ep_cpp.Device(-1)
        self.address: int = (self._cpu_device.create_stream()
                             if self._cpu_device else torch.cuda.current_stream().cuda_stream)

    def finish_call(self) -> None:
        """Makes the call complete for the host clock. CUDA events need no such thing."""
        if self._cpu_device:
            self._cpu_device.synchronize_stream(self.address)

    def close(self) -> None:
        if self._cpu_device:
            self._cpu_device.destroy_stream(self.address)


def measure_ceilings(ranks: Ranks, timer: Timer, sms: list[int], is_cuda: bool) -> dict[int, float]:
    """GB/s that leave the slowest rank, by number of SMs. Collective. 0 with one rank: nothing crosses a link."""
    num_ranks = ranks.size
    if num_ranks == 1:
        return dict.fromkeys(sms, 0.0)
    bytes_per_peer = CUDA_BYTES_PER_PEER if is_cuda else CPU_BYTES_PER_PEER
    # A Buffer of its own: a larger one for the operations would change what is measured there.
    with ranks.buffer(num_ranks * bytes_per_peer) as buffer:
        runtime: Any = buffer.runtime
        if is_cuda:
            # Zeros move faster than data on some machines.
            buffer.get_local_buffer_tensor(torch.uint8).random_(0, 256)
        stream = PushStream(is_cuda)

        def push(num_sms: int, _: int) -> None:
            runtime.bench_push(bytes_per_peer, num_sms, stream.address)
            stream.finish_call()

        ceilings = {}
        for num_sms in sms:
            samples = timer.chained(partial(push, num_sms), NUM_WARMUPS, NUM_REPEATS)
            ceilings[num_sms] = (num_ranks - 1) * bytes_per_peer / median(samples) / 1e3
        if is_cuda:
            torch.cuda.synchronize()
        ranks.barrier()  # nobody unmaps what a peer still writes to
        stream.close()
    return ceilings
