"""What a call costs the host: time of the thread that makes it, the wait for counts of a fresh dispatch left out."""
from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import deep_ep_cpp
from deep_ep.bench.options import Options
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.results import HostCost
from deep_ep.bench.timing import Call, median

NUM_TOKENS = 1  # the device is done long before the host
QUEUE_DEPTH = 4  # calls between two waits for the device
NUM_REPEATS = 200
FEW_REPEATS = 12  # where the device is slow (the CPU executor, a GPU that processes share), or few are asked for
NUM_WARMUPS = 8


@dataclass
class Clock:
    """Of the calling thread, nanoseconds."""

    cpu: int
    wall: int

    @staticmethod
    def now() -> Clock:
        return Clock(time.thread_time_ns(), time.perf_counter_ns())

    def since(self, start: Clock) -> Clock:
        return Clock(self.cpu - start.cpu, self.wall - start.wall)


class Waits(threading.local):
    """What the calling thread has waited for counts, nanoseconds, while there are `timed_waits`."""

    cpu = 0
    wall = 0

    def take(self) -> Clock:
        """That, and begins again at 0."""
        taken = Clock(self.cpu, self.wall)
        self.cpu = self.wall = 0
        return taken


waits = Waits()
_lock = threading.Lock()
_users = 0
_native_wait = deep_ep_cpp.Buffer.wait_counts


def _wait_counts(buffer: Any) -> Any:
    start = Clock.now()
    counts = _native_wait(buffer)
    spent = Clock.now().since(start)
    waits.cpu, waits.wall = waits.cpu + spent.cpu, waits.wall + spent.wall
    return counts


@contextlib.contextmanager
def timed_waits() -> Iterator[None]:
    """Times the native wait for counts, which is the only one of a call, wherever the package makes it."""
    global _users  # noqa: PLW0603 - of all ranks that are threads of this process
    with _lock:
        _users += 1
        deep_ep_cpp.Buffer.wait_counts = _wait_counts  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                deep_ep_cpp.Buffer.wait_counts = _native_wait  # type: ignore[method-assign]


class HostTimer:
    """Collective: the median of many calls, of the slowest rank."""

    def __init__(self, ranks: Ranks, options: Options) -> None:
        self._ranks = ranks
        self._options = options

    def measure(self, name: str, call: Call) -> HostCost:
        options = self._options
        repeats = NUM_REPEATS if options.can_queue and options.num_repeats >= FEW_REPEATS else FEW_REPEATS
        samples, waited = [], []
        for i in range(NUM_WARMUPS + repeats):
            if i % QUEUE_DEPTH == 0:
                self._meet()
            waits.take()
            start = Clock.now()
            result = call(i)
            spent = Clock.now().since(start)
            del result  # what it takes to free tensors is the caller's
            if i >= NUM_WARMUPS:
                wait = waits.take()
                waited.append(wait.wall)
                samples.append(spent.since(wait))
        self._meet()
        found = [median([float(n) for n in column]) / 1e3
                 for column in ([s.cpu for s in samples], [s.wall for s in samples], waited)]  # yapf: disable
        cpu_us, wall_us, waited_us = self._ranks.largest(found)
        return HostCost(name, cpu_us, wall_us, waited_us)

    def _meet(self) -> None:
        if self._options.is_cuda:
            torch.cuda.synchronize()
        self._ranks.barrier()
