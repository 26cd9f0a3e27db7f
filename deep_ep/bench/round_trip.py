"""Tokens sent between processes and back, for the doctor: kernels load, ranks reach each other, numbers are right."""

import contextlib
import functools
import multiprocessing
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Callable

import torch

import deep_ep_cpp
from deep_ep import _env
from deep_ep.buffer import Buffer

NUM_TOKENS, HIDDEN, NUM_TOPK = 64, 512, 2
NUM_TRIPS = 5  # of which the quickest counts: the first loads kernels
BUFFER_BYTES = 4 << 20
WAIT_S = 20.0  # for a peer, in one call
START_S = 120.0  # for processes to import torch, on a busy machine too


@dataclass
class Outcome:
    """How it went: what went wrong, a line for a rank, and the time of each kind of trip in us, of the slowest rank."""

    failures: list[str] = field(default_factory=list)
    times_us: dict[str, float] = field(default_factory=dict)

    def add(self, rank: int, result: Any) -> None:
        """What a rank says at its end: its times, or a text."""
        if isinstance(result, str):
            self.failures.append(f"rank {rank}: {result}")
            return
        for name, time_us in result.items():
            self.times_us[name] = max(time_us, self.times_us.get(name, 0.0))


class _Hub:
    """The communicator of one rank: the parent process gathers for all."""

    def __init__(self, rank: int, size: int, connection: Connection) -> None:
        self._rank, self._size, self._connection = rank, size, connection

    def Get_rank(self) -> int:  # noqa: N802 - mpi4py's names
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._size

    def allgather(self, item: Any) -> list[Any]:
        self._connection.send(("gather", item))
        return list(self._connection.recv())


def round_trip(device: str, gpus: list[int]) -> Outcome:
    """One rank for each entry of `gpus`, on that GPU (device 'cpu': any number)."""
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    for rank, gpu in enumerate(gpus):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, len(gpus), device, gpu, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        connections.append(ours)
    try:
        return _collect(connections, time.monotonic() + START_S + 3 * WAIT_S)
    finally:
        for process in processes:
            process.join(1.0)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(connections: list[Connection], deadline: float) -> Outcome:
    """Serves the gathers until every rank has said how it went."""
    outcome = Outcome()
    gathered: dict[int, Any] = {}
    open_ranks = dict(enumerate(connections))
    while open_ranks:
        ready = wait(list(open_ranks.values()), max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in open_ranks:
                outcome.add(rank, "did not end in time")
            return outcome
        for rank in [rank for rank, connection in open_ranks.items() if connection in ready]:
            try:
                kind, value = open_ranks[rank].recv()
            except (EOFError, OSError):
                kind, value = "end", "its process ended without a word"
            if kind == "gather":
                gathered[rank] = value
                continue
            del open_ranks[rank]
            outcome.add(rank, value)
        if len(gathered) == len(connections):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.send([gathered[rank] for rank in sorted(gathered)])
            gathered.clear()
        elif outcome.failures and open_ranks.keys() <= gathered.keys():
            return outcome  # the others wait for one that will never come
    return outcome


def _serve(rank: int, size: int, device: str, gpu: int, connection: Connection) -> None:
    """A rank's process."""
    try:
        _env.set_device(device)
        if device == "cuda":
            torch.cuda.set_device(gpu)
        times_us = _exchange(_Hub(rank, size, connection), device)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is what the parent reports
        connection.send(("end", f"{type(error).__name__}: {error}"))
    else:
        connection.send(("end", times_us))


def num_nodes(num_ranks: int) -> int:
    """That so many ranks of this machine are: more than one where DEEP_EP_RANKS_PER_NODE says so."""
    ranks_per_node = int(deep_ep_cpp.get_environment()["ranks_per_node"])
    return num_ranks // ranks_per_node if 0 < ranks_per_node < num_ranks else 1


def _exchange(hub: _Hub, device: str) -> dict[str, float]:
    """The times of this rank, in us."""
    num_experts = 4 * hub.Get_size()
    generator = torch.Generator().manual_seed(hub.Get_rank())
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).to(torch.bfloat16).to(device)
    choice = torch.rand(NUM_TOKENS, num_experts, generator=generator).topk(NUM_TOPK)
    topk_idx = choice.indices.to(device)
    rdma_bytes = Buffer.get_low_latency_rdma_size_hint(NUM_TOKENS, HIDDEN, hub.Get_size(), num_experts)
    times_us = {}
    for name, lend_bytes in (("through slots", 0), ("lent", BUFFER_BYTES)):
        with Buffer(None, BUFFER_BYTES, rdma_bytes, low_latency_mode=True, comm=hub, timeout_s=WAIT_S,
                    num_lend_bytes=lend_bytes) as buffer:  # yapf: disable
            times_us[name] = _time(device, functools.partial(_high_throughput_trip, buffer, x, topk_idx, num_experts))
            if lend_bytes == 0:
                times_us["low latency"] = _time(device,
                                                functools.partial(_low_latency_trip, buffer, x, topk_idx, num_experts))
    return times_us


def _time(device: str, trip: Callable[[], Callable[[], None]]) -> float:
    """Of the quickest trip, in us. A trip returns the check of its result, which is not timed."""
    times_us = []
    for _ in range(NUM_TRIPS):
        begin = time.perf_counter()
        check = trip()
        if device == "cuda":
            torch.cuda.synchronize()
        times_us.append((time.perf_counter() - begin) * 1e6)
        check()
    return min(times_us)


def _high_throughput_trip(buffer: Buffer, x: torch.Tensor, topk_idx: torch.Tensor,
                          num_experts: int) -> Callable[[], None]:
    """Every rank gives back what it received, so a token comes home once for each rank that it went to.

    Other nodes sum their copies, and round, before they send them.
    """
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    weights = torch.ones(topk_idx.shape, device=x.device)
    received, _, _, _, handle, _ = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert, topk_idx, weights)
    assert isinstance(received, torch.Tensor) and handle is not None  # noqa: S101, PT018 - for mypy: x is no tuple
    combined = buffer.combine(received, handle)[0]
    nodes = num_nodes(buffer.group_size)
    copies = in_rank.view(len(x), nodes, -1).sum(2).float()
    own_node = buffer.rank * nodes // buffer.group_size
    expected = x.float() * copies[:, own_node:own_node + 1]
    for node in range(nodes):
        if node != own_node:
            expected += (x.float() * copies[:, node:node + 1]).to(torch.bfloat16).float()
    return lambda: _compare("high throughput", combined, expected.to(torch.bfloat16))


def _low_latency_trip(buffer: Buffer, x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int) -> Callable[[], None]:
    """Experts that change nothing, with weights that add up to one."""
    weights = torch.full(topk_idx.shape, 1 / topk_idx.shape[1], device=x.device)
    received, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, num_experts, use_fp8=False)
    assert isinstance(received, torch.Tensor)  # noqa: S101 - for mypy: not FP8
    combined = buffer.low_latency_combine(received, topk_idx, weights, handle)[0]
    return lambda: _compare("low latency", combined, x)


def _compare(operation: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(got, expected):
        num_wrong = int((got != expected).any(1).sum())
        raise RuntimeError(f"{operation}: {num_wrong} of {len(got)} rows are wrong")
