"""The wire ceiling: what the links of this machine carry when every rank writes to all its peers at once."""
from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

import deep_ep_cpp
from deep_ep import _env, _peers
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.timing import Timer, median

if TYPE_CHECKING:
    from deep_ep_bench_cpp import Links

CUDA_BYTES_PER_PEER = 64 << 20
CPU_BYTES_PER_PEER = 1 << 20
NUM_WARMUPS = 3
NUM_REPEATS = 20
RELEASE_TIMEOUT_S = 10.0
NO_CEILINGS = ("the wire ceiling is not measured: deep_ep_bench_cpp is not there. It is part of a build from source "
               "(make build), not of the wheel")


def is_measurable() -> bool:
    """Whether the extension that pushes is there."""
    try:
        import deep_ep_bench_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def measure_ceilings(ranks: Ranks, timer: Timer, sms: list[int], device: torch.device) -> dict[int, float]:
    """GB/s that leave the slowest rank, by number of SMs. Collective. 0 with one rank, where nothing crosses a link,
    and where some rank cannot measure it."""
    if ranks.size == 1 or not all(ranks.allgather(is_measurable())):
        return dict.fromkeys(sms, 0.0)
    bytes_per_peer = CUDA_BYTES_PER_PEER if device.type == "cuda" else CPU_BYTES_PER_PEER
    links = _connect(ranks, device, bytes_per_peer)
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0

    def push(num_sms: int, _: int) -> None:
        links.push(num_sms, stream)
        if not stream:
            links.synchronize()  # complete for the host clock; CUDA events need no such thing

    ceilings = {}
    for num_sms in sms:
        samples = timer.chained(partial(push, num_sms), NUM_WARMUPS, NUM_REPEATS)
        ceilings[num_sms] = (ranks.size - 1) * bytes_per_peer / median(samples) / 1e3
    if device.type == "cuda":
        torch.cuda.synchronize()
    ranks.barrier()  # nobody unmaps what a peer still writes to
    links.release(RELEASE_TIMEOUT_S)
    return ceilings


def find_heap(ranks: Ranks, device: torch.device) -> str:
    """Where a Buffer of these ranks has its memory: "device" or "host". Collective."""
    index = torch.cuda.current_device() if device.type == "cuda" else None
    places = ranks.allgather(_peers.place_of(_env.native_device(-1 if index is None else index), index))
    requested = str(deep_ep_cpp.get_environment()["heap"])
    topology = _peers.find_topology(ranks.rank, places, heap=requested)
    return _peers.choose_heap(requested, topology, device.type)[0]


def _connect(ranks: Ranks, device: torch.device, bytes_per_peer: int) -> Links:
    from deep_ep_bench_cpp import Links

    index = torch.cuda.current_device() if device.type == "cuda" else -1
    links = Links(index, ranks.rank, ranks.size, bytes_per_peer, find_heap(ranks, device) == _peers.HOST)
    links.connect(ranks.allgather(links.export_handle()))
    # Zeros move faster than data on some machines.
    data = torch.randint(0, 256, (bytes_per_peer, ), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()  # it is copied off every stream
    links.load(data.data_ptr())
    ranks.barrier()
    return links
