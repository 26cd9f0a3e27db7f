"""Timing a call on every rank at once."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deep_ep.bench.ranks import Ranks

# Later than the slowest rank leaves a barrier, so that all ranks can meet at a moment instead.
START_MARGIN_S = 0.5e-3
# Of the device, for the host to queue calls: twice what it took before, and some, but not for ever.
HEAD_START_S = 5e-3
LONGEST_HEAD_START_S = 1.0
CYCLES_PER_S = 2e9  # about; a little off is no harm
# Between the phases of queued calls: longer than any row is on its way.
PHASE_GAP_S = 30e-6

Mark = Any  # torch.cuda.Event, or seconds
Call = Callable[[int], object]
# Makes the send phase of a call with that number, and returns what makes the receive phase.
Send = Callable[[int], Callable[[], object]]


class Timer:
    """Microseconds from just before a call to the moment its results can be used on the current stream.

    On CUDA by events on the current stream, which every call makes wait for its results; on the CPU by the host clock.
    """

    def __init__(self, ranks: Ranks, is_cuda: bool) -> None:
        self._ranks = ranks
        self._is_cuda = is_cuda

    def chained(self, call: Call, num_warmups: int, num_repeats: int, is_met: bool = False) -> list[float]:
        """Back-to-back calls; each is timed from the end of the one before it. `call` gets the number of the call."""
        for i in range(num_warmups):
            call(i)
        if not is_met:
            self._meet()
        marks = [self._mark()]
        for i in range(num_repeats):
            call(i)
            marks.append(self._mark())
        return self._slowest(self._differences(marks, marks[1:]))

    def queued(self, call: Call, num_warmups: int, num_repeats: int) -> list[float]:
        """Like `chained` on CUDA, but the device sleeps first until the host has queued all: its cost is not seen.

        For calls that do not make the host wait.
        """
        self._sleep_while_queueing(call, num_warmups, num_repeats)
        return self.chained(call, 0, num_repeats, is_met=True)

    def queued_phases(self, send: Send, num_warmups: int, num_repeats: int) -> tuple[list[float], list[float]]:
        """Both phases of a call on CUDA, queued as in `queued`, with pauses so that all rows come between them."""

        def whole(i: int) -> None:
            send(i)()

        self._sleep_while_queueing(whole, num_warmups, num_repeats)
        marks: list[list[Mark]] = [[], [], [], []]
        for i in range(num_repeats):
            self._add_phases(marks, send, i, partial(_sleep, PHASE_GAP_S))
            _sleep(PHASE_GAP_S)
        return self._phase_times(marks)

    def _sleep_while_queueing(self, call: Call, num_warmups: int, num_repeats: int) -> None:
        started = time.perf_counter()
        for i in range(max(1, num_warmups)):
            call(i)
        per_call_s = (time.perf_counter() - started) / max(1, num_warmups)
        slowest_s = self._ranks.largest([per_call_s])[0]
        self._meet()
        _sleep(min(HEAD_START_S + 2 * num_repeats * slowest_s, LONGEST_HEAD_START_S))

    def fresh(self, call: Call, num_warmups: int, num_repeats: int) -> list[float]:
        """Before each call the device is idle, and all ranks start at the same moment."""
        starts, ends = [], []
        for i in range(num_warmups + num_repeats):
            self._meet()
            start = self._mark()
            call(i)
            end = self._mark()
            if i >= num_warmups:
                starts.append(start)
                ends.append(end)
        return self._slowest(self._differences(starts, ends))

    def phases(self, send: Send, num_warmups: int, num_repeats: int) -> tuple[list[float], list[float]]:
        """Both phases of a call, each as `fresh`: all ranks meet before `send`, and again before what it returned."""
        marks: list[list[Mark]] = [[], [], [], []]
        for i in range(num_warmups + num_repeats):
            self._meet()
            self._add_phases(marks if i >= num_warmups else [[], [], [], []], send, i, self._meet)
        return self._phase_times(marks)

    def _add_phases(self, marks: list[list[Mark]], send: Send, i: int, pause: Callable[[], None]) -> None:
        marks[0].append(self._mark())
        receive = send(i)
        marks[1].append(self._mark())
        pause()
        marks[2].append(self._mark())
        receive()
        marks[3].append(self._mark())

    def _phase_times(self, marks: list[list[Mark]]) -> tuple[list[float], list[float]]:
        return (self._slowest(self._differences(marks[0],
                                                marks[1])), self._slowest(self._differences(marks[2], marks[3])))

    def _meet(self) -> None:
        """All ranks of the host leave within microseconds of each other; a barrier alone lets them go one by one."""
        if self._is_cuda:
            torch.cuda.synchronize()
        self._ranks.barrier()
        start = self._ranks.largest([time.monotonic()])[0] + START_MARGIN_S
        while time.monotonic() < start:
            pass

    def _mark(self) -> Mark:
        if not self._is_cuda:
            return time.perf_counter()
        event: Mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _differences(self, starts: list[Mark], ends: list[Mark]) -> list[float]:
        if not self._is_cuda:
            return [(end - start) * 1e6 for start, end in zip(starts, ends)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends)]

    def _slowest(self, samples_us: list[float]) -> list[float]:
        """Of every repeat, the slowest rank."""
        return self._ranks.largest(samples_us)


def paused(send: Send) -> Call:
    """Both phases of a call on CUDA, with a pause of the device behind each: all rows come meanwhile."""

    def call(i: int) -> None:
        receive = send(i)
        _sleep(PHASE_GAP_S)
        receive()
        _sleep(PHASE_GAP_S)

    return call


def _sleep(seconds: float) -> None:
    """The current stream does nothing for so long."""
    torch.cuda._sleep(int(seconds * CYCLES_PER_S))  # type: ignore[no-untyped-call]


def median(samples_us: list[float]) -> float:
    return statistics.median(samples_us)


def percentile(samples_us: list[float], percent: int) -> float:
    ordered = sorted(samples_us)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
