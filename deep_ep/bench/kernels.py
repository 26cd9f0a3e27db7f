"""The kernels of a call, one by one, as torch's profiler saw them: how many SMs each holds, and for how long."""
from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from deep_ep.bench.options import Options
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.results import Findings, Kernel, Profile
from deep_ep.bench.routing import Shape
from deep_ep.bench.timing import Call, Timer, median

NUM_CALLS = 31  # the first of them is not counted
LEFT_OUT = "The profiler saw no kernels of this library: their own times are left out."

# "void deep_ep::dev::entry<deep_ep::kernels::notify_dispatch::(anonymous namespace)::Kernel>(...)" -> notify_dispatch
NAME = re.compile(r"entry<deep_ep::kernels::([\w:]+?)::(?:\(anonymous namespace\)::)?Kernel")

# Of one rank: for each kernel of a call its name and blocks, its microseconds in every call; and the calls' spans.
Seen = tuple[list[tuple[str, int]], list[list[float]], list[float]]


def short_name(name: str) -> str | None:
    """What the library calls a kernel; None for kernels of others."""
    found = NAME.search(name)
    return found.group(1).replace("::", " ") if found else None


def read_trace(trace: dict[str, Any], num_calls: int) -> list[Seen]:
    """By stream: the kernels of `num_calls` equal calls, which are all that the library did on it."""
    streams: dict[Any, list[Any]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel" and short_name(event["name"]):
            streams[event["args"].get("stream")].append(event)
    return [seen for events in streams.values() for seen in _split_calls(events, num_calls)]


def _split_calls(events: list[Any], num_calls: int) -> list[Seen]:
    if len(events) % num_calls:
        return []
    events = sorted(events, key=lambda event: float(event["ts"]))
    per_call = len(events) // num_calls
    calls = [events[i:i + per_call] for i in range(0, len(events), per_call)]
    names = [(short_name(event["name"]) or "", _blocks(event)) for event in calls[0]]
    counted = calls[1:]
    times = [[float(call[i]["dur"]) for call in counted] for i in range(per_call)]
    spans = [float(call[-1]["ts"]) + float(call[-1]["dur"]) - float(call[0]["ts"]) for call in counted]
    return [(names, times, spans)]


def _blocks(event: Any) -> int:
    blocks = 1
    for size in event["args"].get("grid", []):
        blocks *= int(size)
    return blocks


def make_profiler(activity: Any) -> Any:
    """For one cycle, of which every event counts. Torch warns of those of earlier cycles unless told to keep all."""
    has_option = "acc_events" in inspect.signature(torch.profiler.profile.__init__).parameters  # not in old ones
    options: dict[str, Any] = {"acc_events": True} if has_option else {}
    return torch.profiler.profile(activities=[activity], **options)


class Profiler:
    """Ranks that are processes look at their own kernels; the first of those that are threads, at everybody's."""

    def __init__(self, ranks: Ranks, timer: Timer, options: Options) -> None:
        self._ranks = ranks
        self._timer = timer
        self._options = options
        self._looks = not options.is_threaded or ranks.rank == 0

    def add(self, findings: Findings, operation: str, call: Call, shape: Shape, num_sms: int) -> None:
        """Collective. Adds a profile, or once a notice that there is none."""
        seen = self._look(call)
        # Every rank has the same kernels; one that saw none leaves the figures to the others.
        span = max((median(spans) for _, _, spans in seen), default=0.0)
        names = seen[0][0] if seen else []
        alike = [times for others, times, _ in seen if len(others) == len(names)]
        slowest = [max(median(times[i]) for times in alike) for i in range(len(names))]
        span, num_kernels = self._ranks.largest([span, float(len(names))])
        slowest = self._ranks.largest((slowest + [0.0] * int(num_kernels))[:int(num_kernels)])
        if names:
            kernels = [Kernel(name, blocks, time) for (name, blocks), time in zip(names, slowest)]
            findings.profiles.append(Profile(operation, shape.num_tokens, shape.routing, num_sms, span, kernels))
        else:
            findings.notice(LEFT_OUT)

    def _look(self, call: Call) -> list[Seen]:
        profiler = self._start() if self._options.is_cuda else None
        time_calls = self._timer.queued if self._options.can_queue else self._timer.chained
        time_calls(call, 1, NUM_CALLS - 1)
        self._ranks.barrier()
        return self._stop(profiler) if profiler is not None else []

    def _start(self) -> Any:
        """Whatever goes wrong with the profiler costs its own figures alone."""
        profiler = None
        if self._looks:
            try:
                profiler = make_profiler(torch.profiler.ProfilerActivity.CUDA)
                profiler.start()
            except Exception as error:  # noqa: BLE001
                print(f"profiler: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                profiler = None
        self._ranks.barrier()
        return profiler

    def _stop(self, profiler: Any) -> list[Seen]:
        try:
            profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(path))
                return read_trace(json.loads(path.read_text(encoding="utf-8")), NUM_CALLS)
        except Exception as error:  # noqa: BLE001
            print(f"profiler: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return []
