"""Worker processes for tests: one process per rank, kept over many cases, with a deadline for each case.

    pool = Pool(num_processes=4)
    pool.run(case, 3, "argument")       # case(worker, "argument") on ranks 0, 1, 2; returns their results in rank order

A case is a function at module level. On a machine with GPUs, process i uses GPU i modulo their number.
"""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from workload import Workload

from deep_ep import Buffer, EventOverlap
from deep_ep._env import device_choice

DEFAULT_DEADLINE_S = 90.0
# How long the other ranks may take to report after one has failed: they usually wait for it.
FAILURE_GRACE_S = 2.0
BUFFER_TIMEOUT_S = 30.0
PRELOADED = ["torch", "torch.distributed", "deep_ep"]


def wait_as_clients_do(event: EventOverlap) -> None:
    """Some keep what the native event is, and make an EventOverlap of their own to wait with."""
    own = EventOverlap(None)
    own.event = event.event
    own.current_stream_wait()


class CaseFailed(AssertionError):
    """A case raised on some rank, or did not end in time."""


@dataclass
class Worker:
    """What a case gets: its place in the group, and Buffers that live as long as the process."""

    index: int  # of the process
    ranks: tuple[int, ...]  # processes of the group, in rank order
    group: dist.ProcessGroup
    buffers: dict[Any, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.ranks.index(self.index)

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @property
    def device(self) -> torch.device:
        return device()

    def new_buffer(self, num_nvl_bytes: int = 1 << 22, **options: Any) -> Any:
        options.setdefault("timeout_s", BUFFER_TIMEOUT_S)
        return Buffer(self.group, num_nvl_bytes, **options)

    def buffer(self, num_nvl_bytes: int = 1 << 22) -> Any:
        """A Buffer of this group, shared by all cases that ask for the same size."""
        key = (self.ranks, num_nvl_bytes)
        if key not in self.buffers:
            self.buffers[key] = self.new_buffer(num_nvl_bytes)
        return self.buffers[key]

    def barrier(self) -> None:
        """Of the group, and not through the library under test."""
        dist.barrier(self.group)

    def close(self) -> None:
        """Before a process ends that is a rank by itself."""
        for buffer in self.buffers.values():
            buffer.destroy()
        dist.destroy_process_group()


def device() -> torch.device:
    """Where the tensors of this process live."""
    return torch.device("cuda", torch.cuda.current_device()) if device_choice()[0] == "cuda" else torch.device("cpu")


class Pool:
    """Processes that run cases together. A failed case costs the processes; the next one gets new ones.

    Over NVSHMEM another group does too: a process belongs to one world of NVSHMEM as long as it lives.
    """

    def __init__(self, num_processes: int, environment: Optional[dict[str, str]] = None, backend: str = "gloo") -> None:
        self.num_processes = num_processes
        self._backend = backend  # of torch.distributed
        self._environment = environment or {}
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._groups: set[tuple[int, ...]] = set()
        self._has_one_group = {**os.environ, **self._environment}.get("DEEP_EP_RAIL") == "nvshmem"
        self._folder: Optional[tempfile.TemporaryDirectory[str]] = None

    def run(self,
            case: Callable[..., Any],
            num_ranks: int,
            *args: Any,
            ranks: Optional[Sequence[int]] = None,
            deadline_s: float = DEFAULT_DEADLINE_S,
            dying: Sequence[int] = (),
            **options: Any) -> list[Any]:
        """Runs `case` on `num_ranks` processes, or on the processes `ranks`.

        `dying`: ranks that may end without a result (None stands for it); the processes are replaced afterwards.
        """
        members = tuple(ranks or range(num_ranks))
        assert len(members) == num_ranks <= self.num_processes
        if self._has_one_group and self._groups - {members}:
            self.close()
        self._start()
        if members not in self._groups:
            # Making a group is a matter of all processes, also of those outside.
            self._groups.add(members)
            for connection in self._connections:
                connection.send((None, members, (), {}))
        for index in members:
            self._connections[index].send((case, members, args, options))
        try:
            results = self._collect(members, time.monotonic() + deadline_s, dying)
        except BaseException:
            self.close()
            raise
        if dying:
            self.close()
        return results

    def _collect(self, members: tuple[int, ...], deadline: float, dying: Sequence[int]) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[str] = []
        while len(results) < len(members):
            waiting = {self._connections[index]: rank for rank, index in enumerate(members) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]
                try:
                    is_good, result = connection.recv()
                except EOFError:
                    is_good, result = rank in dying, "the process ended"
                    result = None if is_good else result
                results[rank] = result
                if not is_good:
                    failures.append(f"rank {rank}: {result}")
                    deadline = min(deadline, time.monotonic() + FAILURE_GRACE_S)
        silent = [rank for rank in range(len(members)) if rank not in results]
        if failures:
            raise CaseFailed("\n".join(failures[:2]))
        if silent:
            self._dump_stacks([members[rank] for rank in silent])
            raise CaseFailed(f"no result from ranks {silent} in time; their stacks are on stderr")
        return [results[rank] for rank in range(len(members))]

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory(prefix="deep_ep_test_")
        store = str(Path(self._folder.name) / "store")
        for index in range(self.num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve,
                                      args=(index, self.num_processes, store, theirs, self._environment, self._backend),
                                      daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _dump_stacks(self, indices: Sequence[int]) -> None:
        for index in indices:
            if self._processes[index].is_alive():
                os.kill(self._processes[index].pid, signal.SIGUSR1)
        time.sleep(0.5)

    def close(self) -> None:
        """Ends the processes: politely first, as users do, so that exit paths run too."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(timeout=3)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._groups = [], [], set()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@dataclass
class Group:
    """Some ranks of a pool, for tests that do not mind how many these are."""

    pool: Pool
    num_ranks: int

    def work(self, num_tokens: tuple[int, ...], **shape: Any) -> Workload:
        """The first `num_tokens` are those of the ranks."""
        return Workload(num_tokens[:self.num_ranks], **shape)

    def run(self, case: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        return self.pool.run(case, self.num_ranks, *args, **options)


def member() -> Worker:
    """This process as one rank of the group that torchrun has started it for."""
    torch.set_num_threads(1)
    if device().type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    return Worker(dist.get_rank(), tuple(range(dist.get_world_size())), group)


def _serve(index: int, num_processes: int, store: str, connection: Any, environment: dict[str, str],
           backend: str) -> None:
    os.environ.update(environment)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(index % torch.cuda.device_count())
    dist.init_process_group(backend,
                            init_method=f"file://{store}",
                            rank=index,
                            world_size=num_processes,
                            timeout=timedelta(seconds=60))
    workers: dict[tuple[int, ...], Worker] = {}
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message is None:
            return
        case, members, args, options = message
        try:
            if case is None:
                workers[members] = Worker(index, members, dist.new_group(list(members)))
                continue
            connection.send((True, case(workers[members], *args, **options)))
        except BaseException:  # noqa: BLE001 - everything goes to the parent, which knows what to do
            sys.stderr.flush()
            connection.send((False, traceback.format_exc()))
