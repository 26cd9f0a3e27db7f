"""Low-latency dispatch and combine: whole calls and their phases, bytes, and the share of the wire ceiling."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch

from deep_ep import Buffer
from deep_ep.bench.graphs import EMPTY_GRAPHS, capture, capture_phases, capture_together
from deep_ep.bench.host import NUM_TOKENS
from deep_ep.bench.kernels import Profiler
from deep_ep.bench.mode import ModeBenchmark, NamedCalls, Samples, carried_by
from deep_ep.bench.options import Options
from deep_ep.bench.progress import show_progress
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.results import Findings, Row
from deep_ep.bench.routing import Shape, busiest_remote_copies, choose_experts, count_copies
from deep_ep.bench.timing import Call, Send, paused

GROUP = 128  # channels with one scale
LOGFMT_BITS = 10
SCALE_BYTES = {"FP8": 4, "logfmt": 8}  # of a group

# Makes a call: its number, and whether to return a hook. The last of what it returns is the hook.
HookedCall = Callable[[int, bool], Any]


@dataclass(frozen=True)
class Operation:
    """One call to time. `row_bytes` of each remote copy."""

    name: str
    call: HookedCall
    row_bytes: int

    def whole(self, i: int) -> object:
        return self.call(i, False)

    def send(self, i: int) -> Callable[[], object]:
        hook: Callable[[], object] = self.call(i, True)[-1]
        return hook

    def both_phases(self, i: int) -> None:
        self.send(i)()


def row_bytes(name: str, hidden: int) -> int:
    groups = (hidden + GROUP - 1) // GROUP
    if name == "FP8":
        return hidden + groups * SCALE_BYTES[name]
    if name == "logfmt":
        return hidden * LOGFMT_BITS // 8 + groups * SCALE_BYTES[name]
    return 2 * hidden


class Workload:
    """The inputs of one shape. Several sets of the same routing, used in turn, so that no cache holds the data."""

    def __init__(self, buffer: Buffer, shape: Shape, options: Options, device: torch.device) -> None:
        self.shape = shape
        self._buffer = buffer
        self._max_tokens = max(1, shape.num_tokens)
        torch.manual_seed(options.seed * 1000 + buffer.rank)
        sizes = (shape.num_tokens, shape.hidden)
        self._topk_idx = choose_experts(shape, buffer.rank, options.seed).to(device)
        self._weights = torch.rand((shape.num_tokens, shape.num_topk), device=device)
        self._inputs = [torch.randn(sizes, dtype=torch.bfloat16, device=device) for _ in range(options.num_sets)]

    def operations(self) -> Iterator[Operation]:
        """Every operation of the mode. Collective: dispatches to have handles and rows."""
        hidden = self.shape.hidden
        if hidden % GROUP == 0:
            yield Operation("dispatch FP8", partial(self._dispatch, True), row_bytes("FP8", hidden))
        yield Operation("dispatch BF16", partial(self._dispatch, False), row_bytes("BF16", hidden))
        received = [self._dispatch(False, i, False) for i in range(len(self._inputs))]
        for name in ("BF16", "logfmt"):
            combine = partial(self._combine, received, {"use_logfmt": name == "logfmt"})
            yield Operation(f"combine {name}", combine, row_bytes(name, hidden))
        self._fill_zero_copy_rows(received)
        yield Operation("combine BF16 zero copy", partial(self._combine, received, {"zero_copy": True}),
                        row_bytes("BF16", hidden))

    def pairs(self) -> dict[str, Call]:
        """A dispatch and a combine with its handle, of rows that are there already where it casts. Collective."""
        received = [self._dispatch(False, i, False) for i in range(len(self._inputs))]

        def pair(use_fp8: bool, i: int) -> None:
            rows, _, handle, _, _ = self._dispatch(use_fp8, i, False)
            given, *_ = received[i % len(received)]
            self._combine_rows(given if use_fp8 else rows, handle, False)

        names = ("FP8", "BF16") if self.shape.hidden % GROUP == 0 else ("BF16", )
        return {f"pair {name}": partial(pair, name == "FP8") for name in names}

    def _fill_zero_copy_rows(self, received: list[Any]) -> None:
        """What the experts would have written there: never zeros. Once for each place that calls use in turn."""
        for i in range(2 * len(received)):
            rows, _, handle, _, _ = received[i % len(received)]
            self._buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
            self._combine(received, {"zero_copy": True}, i, False)

    def _dispatch(self, use_fp8: bool, i: int, wants_hook: bool) -> Any:
        return self._buffer.low_latency_dispatch(self._inputs[i % len(self._inputs)],
                                                 self._topk_idx,
                                                 self._max_tokens,
                                                 self.shape.num_experts,
                                                 use_fp8=use_fp8,
                                                 return_recv_hook=wants_hook)

    def _combine(self, received: list[Any], how: dict[str, Any], i: int, wants_hook: bool) -> Any:
        rows, _, handle, _, _ = received[i % len(received)]
        if how.get("zero_copy"):
            rows = self._buffer.get_next_low_latency_combine_buffer(handle)
        return self._combine_rows(rows, handle, wants_hook, **how)

    def _combine_rows(self, rows: Any, handle: Any, wants_hook: bool, **how: Any) -> Any:
        return self._buffer.low_latency_combine(rows,
                                                self._topk_idx,
                                                self._weights,
                                                handle,
                                                return_recv_hook=wants_hook,
                                                **how)


def captured_pairs(ranks: Ranks, options: Options, workload: Workload) -> dict[str, Call]:
    """Graphs of pairs, by name; those that came out empty are left out. Collective."""
    graphs = {
        name: capture_together(ranks, partial(capture, pair, options.num_sets))
        for name, pair in workload.pairs().items()
    }
    return {f"{name} graph": graph for name, graph in graphs.items() if graph is not None}


def profile_kernels(profiler: Profiler, findings: Findings, workload: Workload, pairs: dict[str, Call]) -> None:
    """The kernels of every call, of the phases of one with a hook, and of the graphs of pairs. Collective."""
    for operation in workload.operations():
        profiler.add(findings, operation.name, operation.whole, workload.shape, 0)
        profiler.add(findings, f"{operation.name} phases", paused(operation.send), workload.shape, 0)
    for name, pair in pairs.items():
        profiler.add(findings, name, pair, workload.shape, 0)


@dataclass(frozen=True)
class Case:
    """What the rows of one measured shape have in common."""

    shape: Shape
    remote_copies: int
    ceiling: float

    def row(self, name: str, remote_row_bytes: int, samples: Samples) -> Row:
        ceiling = self.ceiling if remote_row_bytes > 0 else 0.0
        return samples.row(name, self.shape, 0, self.remote_copies * remote_row_bytes, ceiling)


class LowLatencyBenchmark(ModeBenchmark):
    """One rank of the benchmark."""

    profiled_tokens = 128

    def run(self) -> None:
        options = self._options
        ceiling = self._ceilings[options.num_sms[0]]
        cases = list(itertools.product(options.num_tokens, options.routings))
        for num_tokens, routing in show_progress(cases, is_shown=self._ranks.rank == 0):
            shape = self._shape(num_tokens, routing)
            self._measure_shape(Case(shape, busiest_remote_copies(count_copies(shape, options.seed)), ceiling))
            self._findings.keep()
        self._measure_host(self._buffer(self._shape(NUM_TOKENS, "uniform")), self._host_calls)

    def _buffer(self, shape: Shape) -> Buffer:
        num_bytes = Buffer.get_low_latency_rdma_size_hint(max(1, shape.num_tokens), shape.hidden, shape.num_ranks,
                                                          shape.num_experts)
        return self._ranks.buffer(0, num_rdma_bytes=num_bytes, low_latency_mode=True)

    def _measure_shape(self, case: Case) -> None:
        with self._buffer(case.shape) as buffer:
            if self._options.ranks_per_node:
                self._findings.notice(carried_by(buffer.runtime.rail_name if buffer.runtime else ""))
            workload = Workload(buffer, case.shape, self._options, self._device)
            for operation in workload.operations():
                self._measure(operation, case)
            pairs = captured_pairs(self._ranks, self._options, workload) if self._options.can_capture else {}
            for name, pair in pairs.items():
                num_bytes = row_bytes("FP8" if "FP8" in name else "BF16", case.shape.hidden) + row_bytes(
                    "BF16", case.shape.hidden)
                self._findings.rows.append(case.row(name, num_bytes, self._sample(pair, self._options.can_queue)))
            if self._is_profiled(case.shape):
                profile_kernels(self._profiler, self._findings, workload, pairs)
            self._settle()

    def _measure(self, operation: Operation, case: Case) -> None:
        self._add(operation.name, operation.whole, operation.send, operation.row_bytes, case)
        if not self._options.can_capture:
            return
        num_sets = self._options.num_sets
        graphs = capture_together(
            self._ranks, lambda: (capture(operation.whole, num_sets), capture_phases(operation.send, num_sets)))
        if graphs is not None:
            self._add(f"{operation.name} graph", *graphs, operation.row_bytes, case)
        else:
            self._findings.notice(EMPTY_GRAPHS)

    def _add(self, name: str, whole: Callable[[int], object], send: Send, num_bytes: int, case: Case) -> None:
        """A whole call, and the phases of one with a hook: these are only ever measured fresh, or with pauses."""
        repeats, timer = (self._options.num_warmups, self._options.num_repeats), self._timer
        can_queue = self._options.can_queue
        self._findings.rows.append(case.row(name, num_bytes, self._sample(whole, can_queue)))
        fresh = timer.phases(send, *repeats)
        queued = timer.queued_phases(send, *repeats) if can_queue else ([], [])
        for i, phase in enumerate(("send", "receive")):
            samples = Samples(fresh[i], fresh[i], queued[i])
            self._findings.rows.append(case.row(f"{name} {phase}", num_bytes if phase == "send" else 0, samples))

    def _host_calls(self, buffer: Buffer) -> NamedCalls:
        shape = self._shape(NUM_TOKENS, "uniform")
        for operation in Workload(buffer, shape, self._options, self._device).operations():
            yield operation.name, operation.whole
            yield f"{operation.name} with hook", operation.both_phases
