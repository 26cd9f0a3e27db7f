"""The ranks of a benchmark: processes, each with a device of its own, or threads of one process that share one GPU.

Threads are for machines with one GPU: their kernels run at the same time, each within its own SM budget, so the
protocol and the throughput of the SMs are measured, and no link.
"""
from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
import torch.distributed as dist

from deep_ep import Buffer


class Ranks(Protocol):
    """What a benchmark asks of its peers. All methods are collective."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Nobody leaves before everybody has come."""

    def allgather(self, mine: Any) -> list[Any]:
        """What every rank gives, in their order."""

    def largest(self, values: list[float]) -> list[float]:
        """Element by element, the largest of any rank."""

    def buffer(self, num_bytes: int, **options: Any) -> Buffer:
        """A Buffer of all ranks."""

    def comparison_group(self, backend: str) -> dist.ProcessGroup | None:
        """A group of torch.distributed for the same ranks, or None where there is none."""


class ProcessRanks:
    """One process for each rank, over torch.distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = group.rank()
        self.size = group.size()

    def barrier(self) -> None:
        dist.barrier(self._group)

    def allgather(self, mine: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, mine, group=self._group)
        return gathered

    def largest(self, values: list[float]) -> list[float]:
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return [float(value) for value in found]

    def buffer(self, num_bytes: int, **options: Any) -> Buffer:
        return Buffer(self._group, num_bytes, **options)

    def comparison_group(self, backend: str) -> dist.ProcessGroup | None:
        group: dist.ProcessGroup = dist.new_group(backend=backend)
        return group


class ThreadMeeting:
    """What the threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [None] * size


class ThreadRanks:
    """One thread for each rank. An mpi4py-like communicator too, which is how the Buffers meet."""

    def __init__(self, meeting: ThreadMeeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = meeting.size

    def Get_rank(self) -> int:  # noqa: N802 - mpi4py's name
        return self.rank

    def Get_size(self) -> int:  # noqa: N802 - mpi4py's name
        return self.size

    def allgather(self, mine: Any) -> list[Any]:
        self._meeting.values[self.rank] = mine
        self._meeting.barrier.wait()
        gathered = list(self._meeting.values)
        self._meeting.barrier.wait()
        return gathered

    def barrier(self) -> None:
        self._meeting.barrier.wait()

    def largest(self, values: list[float]) -> list[float]:
        return [max(column) for column in zip(*self.allgather(values))]

    def buffer(self, num_bytes: int, **options: Any) -> Buffer:
        return Buffer(None, num_bytes, comm=self, **options)

    def comparison_group(self, backend: str) -> dist.ProcessGroup | None:  # noqa: ARG002
        return None
