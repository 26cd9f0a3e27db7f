"""What the benchmarks of both modes have in common: one rank with its timers, and how a measured call becomes a row."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable

import torch

from deep_ep import Buffer
from deep_ep.bench.ceiling import NO_CEILINGS, find_heap, is_measurable, measure_ceilings
from deep_ep.bench.graphs import NO_GRAPHS
from deep_ep.bench.host import HostTimer, timed_waits
from deep_ep.bench.kernels import Profiler
from deep_ep.bench.options import Options
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.results import Findings, Row
from deep_ep.bench.routing import Shape
from deep_ep.bench.timing import Call, Timer, median, percentile

NamedCalls = Iterator[tuple[str, Call]]


@dataclass(frozen=True)
class Samples:
    """Microseconds of every repeat."""

    chained: list[float]
    fresh: list[float]
    queued: list[float]

    def row(self, name: str, shape: Shape, num_sms: int, remote_bytes: int, ceiling: float) -> Row:
        return Row(operation=name,
                   num_tokens=shape.num_tokens,
                   hidden=shape.hidden,
                   num_topk=shape.num_topk,
                   num_experts=shape.num_experts,
                   routing=shape.routing,
                   num_sms=num_sms,
                   chained_us=median(self.chained),
                   fresh_us=median(self.fresh),
                   chained_p95_us=percentile(self.chained, 95),
                   fresh_p95_us=percentile(self.fresh, 95),
                   queued_us=median(self.queued) if self.queued else 0.0,
                   remote_bytes=remote_bytes,
                   ceiling_gb_per_s=ceiling)


def carried_by(engine: str) -> str:
    """The notice. `engine`: as a Buffer names it."""
    return f"Between nodes, bytes are carried by the engine {engine.split(' ', maxsplit=1)[0]}."


class ModeBenchmark:
    """One rank of a benchmark. `profiled_tokens`, where they are among the cases, is the size whose kernels are
    looked at one by one; else the largest is."""

    profiled_tokens = 0

    def __init__(self, ranks: Ranks, options: Options, device: torch.device, findings: Findings) -> None:
        self._ranks = ranks
        self._options = options
        self._device = device
        self._findings = findings
        findings.heap = find_heap(ranks, device)
        self._timer = Timer(ranks, options.is_cuda)
        self._profiler = Profiler(ranks, self._timer, options)
        # By SM budget. Threads share a GPU: there is no link. Between nodes it depends on what carries the bytes.
        has_ceiling = not options.is_threaded and not options.ranks_per_node
        self._ceilings = (measure_ceilings(ranks, self._timer, options.num_sms, device)
                          if has_ceiling else dict.fromkeys(options.num_sms, 0.0))
        if has_ceiling and not is_measurable():
            findings.notice(NO_CEILINGS)
        if options.with_graphs and options.is_threaded:
            findings.notice(NO_GRAPHS)

    def _shape(self, num_tokens: int, routing: str) -> Shape:
        options = self._options
        return Shape(options.num_ranks, num_tokens, options.hidden, options.num_topk, options.num_experts, routing)

    def _is_profiled(self, shape: Shape) -> bool:
        tokens = self._options.num_tokens
        profiled = self.profiled_tokens if self.profiled_tokens in tokens else max(tokens)
        return self._options.with_profile and shape.num_tokens == profiled

    def _settle(self) -> None:
        """Nobody unmaps what a peer still uses."""
        if self._options.is_cuda:
            torch.cuda.synchronize()
        self._ranks.barrier()

    def _sample(self, call: Call, can_queue: bool) -> Samples:
        timer, repeats = self._timer, (self._options.num_warmups, self._options.num_repeats)
        return Samples(timer.chained(call, *repeats), timer.fresh(call, *repeats),
                       timer.queued(call, *repeats) if can_queue else [])

    def _measure_host(self, buffer: Buffer, calls_of: Callable[[Buffer], NamedCalls]) -> None:
        """What calls cost the host. `calls_of` makes them, collectively, for a Buffer, which ends with this."""
        timer = HostTimer(self._ranks, self._options)
        with buffer, timed_waits():
            for name, call in calls_of(buffer):
                self._findings.host.append(timer.measure(name, call))
            self._settle()
