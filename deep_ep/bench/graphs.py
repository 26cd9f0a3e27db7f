"""Calls as CUDA graphs, one for each input set, whose replay costs the host next to nothing."""
from __future__ import annotations

import warnings
from typing import Callable, TypeVar

import torch

from deep_ep.bench.ranks import Ranks
from deep_ep.bench.timing import Call, Send

T = TypeVar("T")

NO_GRAPHS = (
    "CUDA graphs are left out: threads of one process cannot capture side by side. Queued calls show the same, the "
    "device alone.")
EMPTY_GRAPHS = "Some CUDA graphs came out empty when they were captured: they are left out."


def capture_together(ranks: Ranks, make: Callable[[], T]) -> T | None:
    """What `make` captures, or None on every rank when a graph came out empty on one: its time would mean nothing."""
    captured = None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA Graph is empty.*")
        try:
            captured = make()
        except UserWarning:
            captured = None
    is_missing = ranks.largest([float(captured is None)])[0] > 0
    return None if is_missing else captured


def capture(call: Call, num_sets: int) -> Call:
    call(0)
    torch.cuda.synchronize()
    graphs = []
    for i in range(num_sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(i)
        graphs.append(graph)

    def replay(i: int) -> None:
        graphs[i % num_sets].replay()

    return replay


def capture_phases(send: Send, num_sets: int) -> Send:
    """`send` and the hook that it returns as two graphs, a pair for each input set."""
    send(0)()
    torch.cuda.synchronize()
    pairs = []
    for i in range(num_sets):
        sending, receiving = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(sending):
            hook = send(i)
        with torch.cuda.graph(receiving):
            hook()
        pairs.append((sending, receiving))

    def replay(i: int) -> Callable[[], object]:
        sending, receiving = pairs[i % num_sets]
        sending.replay()
        replay_hook: Callable[[], object] = receiving.replay
        return replay_hook

    return replay
