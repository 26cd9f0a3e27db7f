"""Low-latency dispatch and combine: whole calls and their phases, bytes, and the share of the wire ceiling."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch

from deep_ep import Buffer
from deep_ep.bench.ceiling import measure_ceilings
from deep_ep.bench.intranode import Options, capture, show_progress
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.results import Row
from deep_ep.bench.routing import Shape, busiest_remote_copies, choose_experts, count_copies
from deep_ep.bench.timing import Timer, median, percentile

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
            yield Operation(f"combine {name}", partial(self._combine, received, name == "logfmt"),
                            row_bytes(name, hidden))

    def _dispatch(self, use_fp8: bool, i: int, wants_hook: bool) -> Any:
        return self._buffer.low_latency_dispatch(self._inputs[i % len(self._inputs)],
                                                 self._topk_idx,
                                                 self._max_tokens,
                                                 self.shape.num_experts,
                                                 use_fp8=use_fp8,
                                                 return_recv_hook=wants_hook)

    def _combine(self, received: list[Any], use_logfmt: bool, i: int, wants_hook: bool) -> Any:
        rows, _, handle, _, _ = received[i % len(received)]
        return self._buffer.low_latency_combine(rows,
                                                self._topk_idx,
                                                self._weights,
                                                handle,
                                                use_logfmt=use_logfmt,
                                                return_recv_hook=wants_hook)


@dataclass(frozen=True)
class Case:
    """What the rows of one measured shape have in common."""

    shape: Shape
    remote_copies: int
    ceiling: float

    def row(self, name: str, remote_row_bytes: int, chained: list[float], fresh: list[float]) -> Row:
        return Row(operation=name,
                   num_tokens=self.shape.num_tokens,
                   hidden=self.shape.hidden,
                   num_topk=self.shape.num_topk,
                   num_experts=self.shape.num_experts,
                   routing=self.shape.routing,
                   num_sms=0,
                   chained_us=median(chained),
                   fresh_us=median(fresh),
                   chained_p95_us=percentile(chained, 95),
                   fresh_p95_us=percentile(fresh, 95),
                   remote_bytes=self.remote_copies * remote_row_bytes,
                   ceiling_gb_per_s=self.ceiling if remote_row_bytes > 0 else 0.0)


class LowLatencyBenchmark:
    """One rank of the benchmark."""

    def __init__(self, ranks: Ranks, options: Options, device: torch.device) -> None:
        self._ranks = ranks
        self._options = options
        self._device = device
        self._timer = Timer(ranks, options.is_cuda)

    def run(self) -> list[Row]:
        options, num_sms = self._options, self._options.num_sms[0]
        # Threads share a GPU: there is no link.
        ceiling = 0.0 if options.is_threaded else measure_ceilings(self._ranks, self._timer, [num_sms],
                                                                   options.is_cuda)[num_sms]
        rows: list[Row] = []
        cases = list(itertools.product(options.num_tokens, options.routings))
        for num_tokens, routing in show_progress(cases, is_shown=self._ranks.rank == 0):
            shape = Shape(options.num_ranks, num_tokens, options.hidden, options.num_topk, options.num_experts, routing)
            rows += self._measure_shape(Case(shape, busiest_remote_copies(count_copies(shape, options.seed)), ceiling))
        return rows

    def _measure_shape(self, case: Case) -> list[Row]:
        shape = case.shape
        num_bytes = Buffer.get_low_latency_rdma_size_hint(max(1, shape.num_tokens), shape.hidden, shape.num_ranks,
                                                          shape.num_experts)
        rows: list[Row] = []
        with self._ranks.buffer(0, num_rdma_bytes=num_bytes, low_latency_mode=True) as buffer:
            for operation in Workload(buffer, shape, self._options, self._device).operations():
                rows += self._measure(operation, case)
            if self._options.is_cuda:
                torch.cuda.synchronize()
            self._ranks.barrier()
        return rows

    def _measure(self, operation: Operation, case: Case) -> list[Row]:
        repeats = (self._options.num_warmups, self._options.num_repeats)

        def whole(i: int) -> object:
            return operation.call(i, False)

        def send(i: int) -> Callable[[], None]:
            hook: Callable[[], None] = operation.call(i, True)[-1]
            return hook

        chain = self._timer.queued if self._options.is_threaded else self._timer.chained
        rows = [
            case.row(operation.name, operation.row_bytes, chain(whole, *repeats), self._timer.fresh(whole, *repeats))
        ]
        rows += self._phase_rows(operation.name, operation, case, send)
        if self._options.with_graphs:
            replay, name = capture(whole, self._options.num_sets), f"{operation.name} graph"
            rows.append(
                case.row(name, operation.row_bytes, chain(replay, *repeats), self._timer.fresh(replay, *repeats)))
            rows += self._phase_rows(name, operation, case, capture_phases(send, self._options.num_sets))
        return rows

    def _phase_rows(self, name: str, operation: Operation, case: Case, send: Callable[[int],
                                                                                      Callable[[], None]]) -> list[Row]:
        """A phase is only ever measured fresh: between send and receive all ranks meet, so that every row has come."""
        times = self._timer.phases(send, self._options.num_warmups, self._options.num_repeats)
        return [
            case.row(f"{name} {phase}", operation.row_bytes if phase == "send" else 0, samples, samples)
            for phase, samples in zip(("send", "receive"), times)
        ]


def capture_phases(send: Callable[[int], Callable[[], None]], num_sets: int) -> Callable[[int], Callable[[], None]]:
    """`send` and the hook that it returns as CUDA graphs, a pair for each input set."""
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

    def replay(i: int) -> Callable[[], None]:
        sending, receiving = pairs[i % num_sets]
        sending.replay()
        replay_hook: Callable[[], None] = receiving.replay
        return replay_hook

    return replay
