"""Starts one process per rank (and others beside them), passes on their reports, stops all of them when one fails."""
from __future__ import annotations

import argparse
import dataclasses
import multiprocessing as mp
import multiprocessing.connection as mp_connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

# What every worker imports, once for all of them.
PRELOADED = ["torch", "torch.distributed", "deep_ep"]
# What torch's optimizers import when they are made. It may look for GPUs, hence only without them.
PRELOADED_ON_CPU = ["torch._dynamo"]


class WorkerError(RuntimeError):
    """A worker raised or died; the message holds its name and its traceback."""


@dataclasses.dataclass
class Worker:
    """What a process is to run: `function(context, *args)`. Workers with a rank form one process group."""

    name: str
    function: Callable[..., None]
    args: tuple[Any, ...] = ()
    rank: int | None = None


@dataclasses.dataclass
class Context:
    """What a worker is given: its place among the ranks, its device and a way to report to the parent."""

    rank: int
    num_ranks: int
    device: torch.device
    group: dist.ProcessGroup | None
    report: Callable[[Any], None]

    def synchronize(self) -> None:
        """Waits for what this rank has queued on its GPU, if it has one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclasses.dataclass
class _Start:
    """All that a new process must know before it can run its worker. Must be picklable."""

    worker: Worker
    num_ranks: int
    num_processes: int
    device_type: str
    ranks_per_node: int
    rendezvous: str


def resolve_device(name: str) -> str:
    """`auto` means the GPUs of this machine if it has any, else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch sees no GPU on this machine (try --device cpu)")
    return name


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse_options(description: str | None,
                  argv: list[str] | None,
                  default_steps: int,
                  spans_nodes: bool = True) -> argparse.Namespace:
    """The options that all examples share; of a docstring, the first line describes them."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--num-processes", type=_positive, default=4, metavar="N", help="number of ranks (default: 4)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs if there are any")
    parser.add_argument("--steps", type=_positive, default=default_steps, help=f"how many (default: {default_steps})")
    if not spans_nodes:
        return parser.parse_args(argv)
    parser.add_argument("--ranks-per-node",
                        type=_positive,
                        metavar="L",
                        help="virtual nodes of so many ranks, joined over TCP (default: what the machine is)")
    options = parser.parse_args(argv)
    if options.ranks_per_node is not None and options.num_processes % options.ranks_per_node:
        parser.error(f"--ranks-per-node must divide --num-processes, {options.num_processes}, got "
                     f"{options.ranks_per_node}")
    return options


def choose_ranks(options: argparse.Namespace, num_experts: int) -> tuple[int, str]:
    """The number of ranks, which must divide the experts, and the device."""
    num_ranks: int = options.num_processes
    if num_experts % num_ranks:
        raise SystemExit(f"--num-processes must divide the number of experts, {num_experts}, got {num_ranks}")
    return num_ranks, resolve_device(options.device)


def describe_ranks(options: argparse.Namespace) -> str:
    """How many, and in how many virtual nodes."""
    num_ranks, per_node = options.num_processes, options.ranks_per_node
    return f"{num_ranks} ranks" + (f" in {num_ranks // per_node} virtual nodes" if per_node else "")


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code of `main`; a failed worker's traceback is shown without the parent's."""
    try:
        sys.exit(main())
    except WorkerError as error:
        sys.exit(f"\nFAIL: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def print_header(title: str) -> None:
    """A title line that stands out among the output."""
    print(f'\n== {title} {"=" * max(0, 116 - len(title))}', flush=True)


class Progress:
    """A bar on a terminal, plain lines elsewhere. Close it in the end."""

    def __init__(self, total: int, unit: str) -> None:
        self._start = time.perf_counter()
        # tqdm makes demos nicer, it is no reason to fail.
        self._bar = tqdm(total=total, unit=unit, leave=False, disable=None) if tqdm else None

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()

    def advance(self, what: str = "") -> None:
        """One more done; `what` says which."""
        if self._is_bar_visible():
            self._bar.set_description(what)
            self._bar.update()
        elif what:
            print(f"[{time.perf_counter() - self._start:5.1f} s] {what}", flush=True)

    def print(self, line: str) -> None:
        """Prints above the bar."""
        if self._is_bar_visible():
            self._bar.write(line)
        else:
            print(line, flush=True)

    def _is_bar_visible(self) -> bool:
        return self._bar is not None and not self._bar.disable


def make_workers(function: Callable[..., None], num_ranks: int, args: tuple[Any, ...] = ()) -> list[Worker]:
    """One worker per rank, all running `function(context, *args)`."""
    return [Worker(f"rank {rank}", function, args, rank) for rank in range(num_ranks)]


def run(workers: list[Worker], device_type: str, ranks_per_node: int | None = None) -> Iterator[tuple[str, Any]]:
    """Runs all workers and yields `(worker name, report)` in order of arrival, until every worker has returned.

    `ranks_per_node`: of virtual nodes; None: the nodes are what the library finds.
    When one fails, the others are stopped and `WorkerError` is raised with the traceback of the one that failed first:
    its peers, waiting for it, could only say that it is gone.
    """
    num_ranks = sum(worker.rank is not None for worker in workers)
    context = mp.get_context("forkserver")  # CUDA does not survive a fork, and this process may have asked for GPUs
    context.set_forkserver_preload(PRELOADED + (PRELOADED_ON_CPU if device_type == "cpu" else []))
    with tempfile.TemporaryDirectory(prefix="deep_ep_demo_") as folder:
        processes: dict[mp_connection.Connection, Any] = {}
        try:
            for worker in workers:
                receive, send = context.Pipe(duplex=False)
                start = _Start(worker, num_ranks, len(workers), device_type, ranks_per_node or 0,
                               f'file://{Path(folder) / "rendezvous"}')
                process = context.Process(target=_enter, args=(start, send), name=worker.name, daemon=True)
                process.start()
                send.close()  # the child holds the other copy: its death then reads as the end of the pipe
                processes[receive] = process
            yield from _listen(processes)
        finally:
            _stop(list(processes.values()))


def by_rank(reports: dict[str, Any]) -> list[tuple[str, Any]]:
    """What `make_workers`' workers reported, one thing each, in rank order."""
    return sorted(reports.items(), key=lambda item: int(item[0].split()[1]))


def _listen(processes: dict[mp_connection.Connection, Any]) -> Iterator[tuple[str, Any]]:
    waiting = dict(processes)
    while waiting:
        for connection in mp_connection.wait(list(waiting)):
            assert isinstance(connection, mp_connection.Connection)
            process = waiting[connection]
            try:
                kind, payload = connection.recv()
            except EOFError:
                process.join()
                if process.exitcode != 0:
                    raise WorkerError(f"{process.name} ended {_explain(process.exitcode)}") from None
                del waiting[connection]
                continue
            if kind == "error":
                raise WorkerError(f"{process.name} failed:\n\n{payload}")
            yield process.name, payload


def _explain(exit_code: int) -> str:
    return f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit code {exit_code}"


def _stop(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()


def _enter(start: _Start, connection: mp_connection.Connection) -> None:
    try:
        context = _make_context(start, lambda report: connection.send(("report", report)))
        start.worker.function(context, *start.worker.args)
        if context.group is not None:
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException:  # noqa: BLE001 (whatever it was, the parent shows it)
        # Told before this process ends, hence before its peers notice that it is gone.
        connection.send(("error", traceback.format_exc()))
        connection.close()
        sys.exit(1)
    connection.close()


def _make_context(start: _Start, report: Callable[[Any], None]) -> Context:
    os.environ["DEEP_EP_DEVICE"] = start.device_type  # --device cpu holds for the library too
    if start.ranks_per_node:
        os.environ["DEEP_EP_RANKS_PER_NODE"] = str(start.ranks_per_node)
    # As many threads as the cores allow; several processes with all cores each would mostly fight for them.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // start.num_processes))
    rank = start.worker.rank
    device = torch.device("cpu")
    if start.device_type == "cuda":
        # Fewer GPUs than ranks: ranks share them in turn.
        device = torch.device("cuda", (rank or 0) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if rank is None:
        return Context(0, 1, device, None, report)
    # All ranks are on this machine: names need not resolve. Gloo also serves ranks that share a GPU, NCCL does not.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=start.rendezvous, rank=rank, world_size=start.num_ranks)
    return Context(rank, start.num_ranks, device, dist.group.WORLD, report)
