"""High-throughput dispatch and combine inside one node: times, bytes, and the share of the wire ceiling."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from deep_ep import Buffer, Config, _env
from deep_ep.bench.comparison import Inputs, choose_backend, comparisons
from deep_ep.bench.graphs import EMPTY_GRAPHS, capture, capture_together
from deep_ep.bench.host import NUM_TOKENS
from deep_ep.bench.mode import ModeBenchmark, NamedCalls
from deep_ep.bench.options import Options
from deep_ep.bench.progress import show_progress
from deep_ep.bench.results import Row
from deep_ep.bench.routing import Shape, busiest_remote_copies, choose_experts, count_copies
from deep_ep.bench.timing import Call

SCALE_BLOCK = 128  # elements of an FP8 row that share a scale


@dataclass(frozen=True)
class Operation:
    """One call to time. `row_bytes` of each remote copy; 0: it moves nothing between ranks."""

    name: str
    call: Call
    row_bytes: int
    num_sms: int
    makes_host_wait: bool = False


class Workload:
    """The inputs of one shape. Several sets of the same routing, used in turn, so that no cache holds the data."""

    def __init__(self, buffer: Buffer, shape: Shape, options: Options, device: torch.device) -> None:
        self.shape = shape
        self._buffer = buffer
        torch.manual_seed(options.seed * 1000 + buffer.rank)
        sizes = (shape.num_tokens, shape.hidden)
        self.topk_idx = choose_experts(shape, buffer.rank, options.seed).to(device)
        self._routing: dict[str, Any] = self._make_routing(device)
        self._bf16 = [torch.randn(sizes, dtype=torch.bfloat16, device=device) for _ in range(options.num_sets)]
        self._biases = tuple(torch.randn(sizes, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.num_scales = (shape.hidden + SCALE_BLOCK - 1) // SCALE_BLOCK
        scales = torch.rand((shape.num_tokens, self.num_scales), device=device)
        self._fp8 = [(x.to(torch.float8_e4m3fn), scales) for x in self._bf16]

    def _make_routing(self, device: torch.device) -> dict[str, Any]:
        per_rank, per_node, per_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(
            self.topk_idx, self.shape.num_experts)
        return {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "is_token_in_rank": is_in_rank,
            "num_tokens_per_expert": per_expert,
            "topk_idx": self.topk_idx,
            "topk_weights": torch.rand((self.shape.num_tokens, self.shape.num_topk), device=device),
        }

    @property
    def fp8_row_bytes(self) -> int:
        return self.shape.hidden + 4 * self.num_scales

    def inputs(self) -> Inputs:
        return Inputs(self.topk_idx, self._routing["topk_weights"], self._bf16, self._fp8, self.fp8_row_bytes)

    def layout(self) -> Operation:
        return Operation("layout", self._layout, 0, 0)

    def operations(self, num_sms: int) -> Iterator[Operation]:
        """Every operation of the mode with that SM budget. Collective: dispatches once to have handles."""
        Buffer.set_num_sms(num_sms)
        dispatch_config = Buffer.get_dispatch_config(self.shape.num_ranks)
        payloads: list[tuple[str, list[Any], int]] = [
            ("BF16", self._bf16, 2 * self.shape.hidden),
            ("FP8", self._fp8, self.fp8_row_bytes),
        ]
        for name, inputs, row_bytes in payloads:
            yield from self._dispatches(name, inputs, row_bytes, dispatch_config, num_sms)
        yield from self._combines(dispatch_config, num_sms)

    def _layout(self, _: int) -> object:
        return self._buffer.get_dispatch_layout(self.topk_idx, self.shape.num_experts)

    def _dispatches(self, name: str, inputs: list[Any], row_bytes: int, config: Config,
                    num_sms: int) -> Iterator[Operation]:
        most_rows = self.shape.num_tokens * self.shape.num_ranks
        handle = self._fresh(inputs, config, 0, 0)[4]
        fresh = partial(self._fresh, inputs, config)
        yield Operation(f"dispatch {name}", partial(fresh, 0), row_bytes, num_sms, makes_host_wait=True)
        yield Operation(f"dispatch {name} cached", partial(self._cached, inputs, config, handle), row_bytes, num_sms)
        yield Operation(f"dispatch {name} worst case", partial(fresh, most_rows), row_bytes, num_sms)

    def _fresh(self, inputs: list[Any], config: Config, num_worst_tokens: int, i: int) -> Any:
        return self._buffer.dispatch(inputs[i % len(inputs)],
                                     num_worst_tokens=num_worst_tokens,
                                     config=config,
                                     **self._routing)

    def _cached(self, inputs: list[Any], config: Config, handle: Any, i: int) -> object:
        return self._buffer.dispatch(inputs[i % len(inputs)], handle=handle, config=config)

    def _combines(self, dispatch_config: Config, num_sms: int) -> Iterator[Operation]:
        config = Buffer.get_combine_config(self.shape.num_ranks)
        received = [self._fresh(self._bf16, dispatch_config, 0, i) for i in range(len(self._bf16))]
        if not _env.lend_bytes():  # experts' outputs are in torch's memory; where that is asked for, they are lent
            received = [(rows.clone(), None, weights.clone(), None, handle, None)
                        for rows, _, weights, _, handle, _ in received]

        def combine(has_weights: bool, bias: Any, i: int) -> object:
            rows, _, weights, _, handle, _ = received[i % len(received)]
            return self._buffer.combine(rows, handle, weights if has_weights else None, bias, config)

        for name, has_weights, bias in (("", False, None), (" weights", True, None), (" bias", False, self._biases),
                                        (" weights bias", True, self._biases)):
            yield Operation(f"combine BF16{name}", partial(combine, has_weights, bias), 2 * self.shape.hidden, num_sms)


class IntranodeBenchmark(ModeBenchmark):
    """One rank of the benchmark."""

    profiled_tokens = 4096

    def run(self) -> None:
        shapes = [self._shape(*case) for case in itertools.product(self._options.num_tokens, self._options.routings)]
        cases = list(itertools.product(self._options.num_sms, shapes))
        for num_sms, shape in show_progress(cases, is_shown=self._ranks.rank == 0):
            self._measure_shape(shape, num_sms)
            self._findings.keep()
        self._measure_host(self._buffer(self._options.num_sms[0]), self._host_calls)
        self._findings.keep()
        self._compare(shapes)

    def _buffer(self, num_sms: int) -> Buffer:
        """Of the hint's size: a larger one would change what is measured."""
        Buffer.set_num_sms(num_sms)
        num_ranks, row_bytes = self._options.num_ranks, 2 * self._options.hidden
        configs = Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)
        return self._ranks.buffer(max(config.get_nvl_buffer_size_hint(row_bytes, num_ranks) for config in configs))

    def _remote_copies(self, shape: Shape) -> int:
        return busiest_remote_copies(count_copies(shape, self._options.seed))

    def _measure_shape(self, shape: Shape, num_sms: int) -> None:
        options = self._options
        remote_copies = self._remote_copies(shape)
        is_profiled = self._is_profiled(shape)
        with self._buffer(num_sms) as buffer:
            workload = Workload(buffer, shape, options, self._device)
            # The layout knows no SM budget.
            layouts = [workload.layout()] if num_sms == options.num_sms[0] else []
            for operation in itertools.chain(layouts, workload.operations(num_sms)):
                self._add(operation.name, operation, shape, remote_copies, self._ceilings[num_sms])
                if operation.makes_host_wait:
                    continue
                if options.can_capture:
                    self._add_graph(operation, shape, remote_copies, self._ceilings[num_sms])
                if is_profiled:
                    self._profiler.add(self._findings, operation.name, operation.call, shape, operation.num_sms)
            self._settle()

    def _add(self, name: str, operation: Operation, shape: Shape, remote_copies: int, ceiling: float) -> None:
        can_queue = self._options.can_queue and not operation.makes_host_wait
        self._findings.rows.append(
            self._row(name, operation.call, can_queue, shape, operation.num_sms, remote_copies * operation.row_bytes,
                      ceiling))

    def _add_graph(self, operation: Operation, shape: Shape, remote_copies: int, ceiling: float) -> None:
        replay = capture_together(self._ranks, partial(capture, operation.call, self._options.num_sets))
        if replay is None:
            self._findings.notice(EMPTY_GRAPHS)
            return
        self._add(f"{operation.name} graph", replace(operation, call=replay), shape, remote_copies, ceiling)

    def _row(self, name: str, call: Call, can_queue: bool, shape: Shape, num_sms: int, remote_bytes: int,
             ceiling: float) -> Row:
        samples = self._sample(call, can_queue)
        return samples.row(name, shape, num_sms, remote_bytes, ceiling if remote_bytes > 0 else 0.0)

    def _host_calls(self, buffer: Buffer) -> NamedCalls:
        workload = Workload(buffer, self._shape(NUM_TOKENS, "uniform"), self._options, self._device)
        for operation in itertools.chain([workload.layout()], workload.operations(self._options.num_sms[0])):
            yield operation.name, operation.call

    def _compare(self, shapes: list[Shape]) -> None:
        """With torch.distributed, which takes the SMs that it wants. The ceiling is that of the largest budget."""
        if not self._options.with_comparison:
            return
        backend, why_not = choose_backend(self._options)
        group = self._ranks.comparison_group(backend) if backend else None
        if group is None:
            self._findings.notice(why_not)
            return
        num_sms = max(self._options.num_sms)
        for shape in show_progress(shapes, is_shown=self._ranks.rank == 0):
            with self._buffer(num_sms) as buffer:
                inputs = Workload(buffer, shape, self._options, self._device).inputs()
                self._settle()
            for compared in comparisons(self._ranks, group, backend, shape, self._options.seed, inputs):
                self._findings.rows.append(
                    self._row(compared.name, compared.call, False, shape, 0, compared.remote_bytes,
                              self._ceilings[num_sms]))
            self._findings.keep()
