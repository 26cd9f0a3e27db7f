"""A rank that is killed, stopped or raises before, in and after any operation: what the others see, and what is left.

Every function runs on all ranks. Of the group one rank is the victim; the one after it comes late to an operation, so
that the victim, and whoever else there is, is in it when the fault strikes.
"""

import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from failure_cases import SHORT_TIMEOUT_S, settle
from host_failure_cases import interrupt_soon, mapped_regions, small_work, until
from low_latency_pending_call import LowLatencyPendingCall, Manner
from pending_call import PendingCall
from single_rank import single_rank_buffer
from utils import Worker

import deep_ep

HIGH_THROUGHPUT = ("dispatch", "cached_dispatch", "combine")
LOW_LATENCY = ("low_latency_dispatch", "low_latency_combine", "clean_low_latency_buffer")
STRIKE_AFTER_S = 0.15  # in the operation
LATE_BY_S = 0.5
SHORT_STOP_S = 0.3  # beyond STRIKE_AFTER_S, and far below the timeout
SLACK_S = 10.0  # of a machine that does other things too


@dataclass(frozen=True)
class Fault:
    """What happens to the victim."""

    kind: str  # "killed", "raising", "stopped" for longer than the timeout, "paused" for less
    moment: str  # "before", "in", "after"
    operation: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.moment}-{self.operation}"


@dataclass
class Outcome:
    """Of one rank."""

    first: str = ""  # sentence of the operation that was struck; "": it was right
    later: str = ""  # of the next one
    took_s: tuple[float, float] = (0.0, 0.0)
    leaks: str = ""
    names: tuple[str, ...] = ()  # of shared memory that this rank has mapped


class Calls:
    """One Buffer's calls in order, each checked against the reference."""

    def __init__(self, worker: Worker, buffer: Any) -> None:
        self._worker, self._buffer = worker, buffer
        work = small_work(worker.num_ranks)
        self._pending = PendingCall(worker, buffer, work)
        self._low_latency: Any = None
        if buffer.low_latency_mode:
            self._low_latency = LowLatencyPendingCall(worker, buffer, work, Manner(settles=True))

    def come_to(self, operation: str) -> None:
        """Everything that comes before it."""
        if operation in HIGH_THROUGHPUT:
            self._pending.layout()
        if operation in {"cached_dispatch", "combine"}:
            self._pending.dispatch()
        if operation == "low_latency_combine":
            self._low_latency.dispatch()

    def call(self, operation: str) -> None:
        if operation in HIGH_THROUGHPUT:
            getattr(self._pending, operation)()
        elif operation == "clean_low_latency_buffer":
            self._buffer.clean_low_latency_buffer(4, 64, self._worker.num_ranks)
        else:
            getattr(self._low_latency, operation.removeprefix("low_latency_"))()
        settle(self._worker, self._buffer)

    def trip(self, operation: str) -> None:
        """Of the mode of the operation."""
        if operation in HIGH_THROUGHPUT:
            self._pending.whole_trip()
        else:
            self._low_latency.whole_trip()
        settle(self._worker, self._buffer)


def struck(worker: Worker, fault: Fault, victim: int) -> Optional[Outcome]:
    """None: the victim's, which is dead."""
    options: dict[str, Any] = {"num_nvl_bytes": 1 << 20}
    if fault.operation in LOW_LATENCY:
        options |= {"num_rdma_bytes": 1 << 20, "low_latency_mode": True}
    # First calls on a device take their time, and leave what stays for the life of the process.
    with worker.new_buffer(**options) as patient:
        Calls(worker, patient).trip(fault.operation)
    before = Resources()
    buffer = worker.new_buffer(timeout_s=SHORT_TIMEOUT_S, **options)
    outcome = Outcome(names=tuple(line.split("deep_ep-")[1].split()[0] for line in mapped_regions()))
    calls = Calls(worker, buffer)
    calls.come_to(fault.operation)
    worker.barrier()
    if worker.rank == victim:
        strike(fault, calls, outcome)
    else:
        survive(worker, fault, victim, calls, outcome)
    leave(worker, fault, buffer)
    del calls, buffer
    outcome.leaks = before.leaks()
    return outcome


def survive(worker: Worker, fault: Fault, victim: int, calls: Calls, outcome: Outcome) -> None:
    """On any other rank: the operation, and the next one."""
    if worker.rank == (victim + 1) % worker.num_ranks and fault.moment == "in":
        time.sleep(LATE_BY_S)
    outcome.first, first_s = attempt(calls.call, fault.operation)
    outcome.later, later_s = attempt(calls.trip, fault.operation)
    outcome.took_s = first_s, later_s


def attempt(call: Any, *args: Any) -> tuple[str, float]:
    """The sentence of an error of ours, and the seconds. A wrong result is an AssertionError, which goes on."""
    started, message = time.monotonic(), ""
    try:
        call(*args)
    except deep_ep.Error as error:
        message = str(error)
    return message, time.monotonic() - started


def strike(fault: Fault, calls: Calls, outcome: Outcome) -> None:
    """On the victim: the operation, the fault, and what is left of the other calls."""
    if fault.moment == "after":
        outcome.first, _ = attempt(calls.call, fault.operation)
    delay_s = STRIKE_AFTER_S if fault.moment == "in" else 0.0
    if fault.kind == "raising":
        raise_in(fault, calls, delay_s)
        return
    stop_s = SHORT_STOP_S if fault.kind == "paused" else SHORT_TIMEOUT_S + 0.5
    striker = send_signals(fault.kind, delay_s, stop_s)
    if fault.moment != "in":
        striker.wait()
    if fault.moment != "after":
        outcome.first, _ = attempt(calls.call, fault.operation)
    striker.wait()
    outcome.later, _ = attempt(calls.trip, fault.operation)


def send_signals(kind: str, delay_s: float, stop_s: float) -> "subprocess.Popen[bytes]":
    """From outside, as an operator or a kernel that is out of memory would."""
    pid = os.getpid()
    program = f"sleep {delay_s}; kill -KILL {pid}" if kind == "killed" else \
        f"sleep {delay_s}; kill -STOP {pid}; sleep {stop_s}; kill -CONT {pid}"
    return subprocess.Popen(["sh", "-c", program])


def raise_in(fault: Fault, calls: Calls, delay_s: float) -> None:
    """An exception of the program, or Ctrl-C while a call waits; the Buffer is destroyed next, as `with` does it."""
    if fault.moment != "in":
        return
    interrupt_soon(delay_s)
    try:
        calls.call(fault.operation)
        time.sleep(LATE_BY_S + SLACK_S)
    except KeyboardInterrupt:
        return
    raise AssertionError("Ctrl-C was not heard")


def leave(worker: Worker, fault: Fault, buffer: Any) -> None:
    """destroy() in time; then the process works on, with the others where all are there."""
    if fault.kind not in {"killed", "raising"}:
        worker.barrier()
    started = time.monotonic()
    buffer.destroy()
    assert time.monotonic() - started < SLACK_S, "destroy() waited"
    total = torch.ones(4, device=worker.device).sum().item()
    assert total == 4, "the device works on"
    if fault.kind == "killed":
        single_rank_buffer().destroy()
        return
    worker.barrier()
    with worker.new_buffer(1 << 20) as fresh:
        PendingCall(worker, fresh, small_work(worker.num_ranks)).whole_trip()
        worker.barrier()


class Resources:
    """Of this process, by kind."""

    def __init__(self) -> None:
        self._found = self._count()

    def _count(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for entry in Path("/proc/self/fd").iterdir():
            try:
                target = str(entry.readlink())
            except OSError:  # the one that lists the folder
                continue
            found[f"descriptor of {target.split(':', maxsplit=1)[0]}"] += 1
        found["mapped regions"] = len(mapped_regions())
        found["threads"] = len(list(Path("/proc/self/task").iterdir()))
        return found

    def leaks(self) -> str:
        """What there is more of, once it has had time to go."""
        more: Counter[str] = Counter()

        def is_clean() -> bool:
            more.clear()
            more.update(self._count() - self._found)
            return not more

        try:
            until(is_clean, "")
        except AssertionError:
            return ", ".join(f"{count} more {what}" for what, count in more.items())
        return ""


def left_in_shared_memory(names: tuple[str, ...]) -> list[str]:
    folder = Path("/dev/shm")  # noqa: S108 - where the library puts them
    return [name for name in names if (folder / f"deep_ep-{name}").exists()]
