"""Calls as CUDA graphs, one for each input set, whose replay costs the host next to nothing."""
from __future__ import annotations

from typing import Callable

import torch

from deep_ep.bench.timing import Call, Send


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
