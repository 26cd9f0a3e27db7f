"""A decode loop over expert-parallel layers: two micro-batches take turns, inside a CUDA graph where there are GPUs.

    python examples/decode_loop.py [--num-processes 4] [--device auto|cpu|cuda] [--steps 4]

    micro-batch 0   mix, route ► send ········ receive, experts ► send ········ receive, next layer
    micro-batch 1               mix, route ► send ········ receive, experts ► send ········ receive, …

While the rows of one micro-batch travel (····), the other one computes. A low-latency call with `return_recv_hook=True`
only sends; its hook receives, and between the two no SM is held. A micro-batch is a generator that yields wherever its
rows are under way, so the order above is a loop that resumes the generators in turn.
"""
from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

import launcher

if TYPE_CHECKING:
    import deep_ep

# The dense layer rounds where the wire does, but a matrix product over another number of rows may add in another order.
# Where that moves a value across the border between two bfloat16 numbers, results differ by a step, 2**-7 of the value;
# a value is rounded as the expert's answer, as its rank's part and as the sum.
TOLERANCE_MAX = 3 * 2**-7  # largest difference, relative to the largest value
TOLERANCE_NORM = 2e-3  # norm of the difference, relative to the norm


@dataclasses.dataclass
class Sizes:
    """A small model; each rank decodes `num_tokens` sequences at a time, half of them in each micro-batch."""

    num_tokens: int = 16
    hidden: int = 1024
    ffn_hidden: int = 256
    num_experts: int = 32
    num_topk: int = 4
    num_layers: int = 3
    seed: int = 1

    @property
    def tokens_per_batch(self) -> int:
        return (self.num_tokens + 1) // 2


class Layer:
    """The weights of one layer, those of all experts included: the dense check needs them, and they are small."""

    def __init__(self, sizes: Sizes, index: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(sizes.seed * 100 + index)

        def weights(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * shape[-2]**-0.5).to(device)

        self.sizes = sizes
        self.mixer = weights(sizes.hidden, sizes.hidden)
        self.router = weights(sizes.hidden, sizes.num_experts)
        self.up = weights(sizes.num_experts, sizes.hidden, sizes.ffn_hidden)
        self.down = weights(sizes.num_experts, sizes.ffn_hidden, sizes.hidden)

    def mix(self, x: Tensor) -> Tensor:
        """What stands between two expert layers: here a matrix, in a model attention. bfloat16 in and out."""
        normal = functional.layer_norm(x.float(), x.shape[1:])
        return (normal + torch.tanh(normal @ self.mixer)).bfloat16()

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = (h.float() @ self.router).softmax(1).topk(self.sizes.num_topk)
        return experts, weights

    def run_experts(self, rows: Tensor, first: int = 0) -> Tensor:
        """bfloat16 [experts, rows, hidden], for the experts from `first` on. Rows are independent of each other."""
        mine = slice(first, first + rows.shape[0])
        return torch.bmm(functional.silu(torch.bmm(rows.float(), self.up[mine])), self.down[mine]).bfloat16()


@dataclasses.dataclass
class Trace:
    """What went into each layer of a micro-batch and came out, for the check."""

    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)


def decode_micro_batch(buffer: deep_ep.Buffer, layers: list[Layer], x: Tensor,
                       trace: Trace) -> Generator[None, None, None]:
    """All layers for one micro-batch. Yields where its rows are under way."""
    sizes, first = layers[0].sizes, buffer.rank * layers[0].sizes.num_experts // buffer.group_size
    for layer in layers:
        trace.inputs.append(x)
        h = layer.mix(x)
        experts, weights = layer.route(h)
        rows, _, handle, _, receive = buffer.low_latency_dispatch(h,
                                                                  experts,
                                                                  sizes.tokens_per_batch,
                                                                  sizes.num_experts,
                                                                  use_fp8=False,
                                                                  return_recv_hook=True)
        yield
        receive()
        # Rows behind those that came hold garbage; what the experts make of it is never sent.
        answers = layer.run_experts(rows, first)
        combined, _, receive = buffer.low_latency_combine(answers, experts, weights, handle, return_recv_hook=True)
        yield
        receive()
        x = h + combined
        trace.outputs.append(x)


def take_turns(micro_batches: list[Generator[None, None, None]]) -> None:
    """Resumes the generators one after the other, until all have ended."""
    while micro_batches:
        micro_batches = [one for one in micro_batches if next(one, "ended") != "ended"]


class DecodeStep:
    """One step for all sequences of this rank: `x` in, `y` out, both at fixed addresses, as a CUDA graph needs them."""

    def __init__(self, buffer: deep_ep.Buffer, sizes: Sizes, device: torch.device) -> None:
        self.layers = [Layer(sizes, index, device) for index in range(sizes.num_layers)]
        generator = torch.Generator().manual_seed(sizes.seed * 1000 + buffer.rank)
        self.x = torch.randn((sizes.num_tokens, sizes.hidden), generator=generator).bfloat16().to(device)
        self.y = torch.empty_like(self.x)
        self.traces: list[Trace] = []
        self._buffer = buffer
        self._tokens_per_batch = sizes.tokens_per_batch
        self._replay: Callable[[], None] = self.run
        if device.type == "cuda":
            self._replay = self._capture()

    def run(self) -> None:
        batches = self.x.split(self._tokens_per_batch)
        self.traces = [Trace() for _ in batches]
        take_turns([decode_micro_batch(self._buffer, self.layers, x, trace) for x, trace in zip(batches, self.traces)])
        torch.cat([trace.outputs[-1] for trace in self.traces], out=self.y)

    def _capture(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            self.run()  # matrix libraries set themselves up
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph.replay

    def __call__(self) -> None:
        self._replay()

    def advance(self) -> None:
        """What stands for the choice of the next token: the outputs become the inputs of the next call."""
        self.x.copy_(functional.layer_norm(self.y.float(), self.y.shape[1:]).bfloat16())


def dense_layer(layer: Layer, x: Tensor, num_ranks: int) -> Tensor:
    """The same layer without the library: all experts here, rounded where the wire rounds."""
    h = layer.mix(x)
    experts, weights = layer.route(h)
    tokens = torch.arange(h.shape[0], device=h.device)
    answers = layer.run_experts(h.expand(layer.sizes.num_experts, *h.shape))
    owners = experts // (layer.sizes.num_experts // num_ranks)
    combined = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    for rank in range(num_ranks):
        part = torch.zeros_like(combined)
        for k in range(layer.sizes.num_topk):
            weight = torch.where(owners[:, k] == rank, weights[:, k], 0)
            part += weight[:, None] * answers[experts[:, k], tokens].float()
        combined += part.bfloat16().float()
    return h + combined.bfloat16()


@dataclasses.dataclass
class RankReport:
    """The differences of all steps and layers, and the time of a step."""

    largest_value: float = 0.0
    largest_difference: float = 0.0
    relative_norm: float = 0.0
    step_seconds: float = float("inf")


def check(step: DecodeStep, num_ranks: int, report: RankReport) -> None:
    for trace in step.traces:
        for layer, x, got in zip(step.layers, trace.inputs, trace.outputs):
            want = dense_layer(layer, x, num_ranks).float()
            difference = got.float() - want
            report.largest_value = max(report.largest_value, want.abs().max().item())
            # A NaN must not get lost in max().
            assert bool(difference.isfinite().all()), "the results are not finite"
            report.largest_difference = max(report.largest_difference, difference.abs().max().item())
            report.relative_norm = max(report.relative_norm, (difference.norm() / want.norm()).item())


def run_rank(context: launcher.Context, sizes: Sizes, num_steps: int) -> None:
    """Decodes on this rank, and checks every step."""
    from deep_ep import Buffer

    num_bytes = Buffer.get_low_latency_rdma_size_hint(sizes.tokens_per_batch, sizes.hidden, context.num_ranks,
                                                      sizes.num_experts)
    report = RankReport()
    with Buffer(context.group, num_rdma_bytes=num_bytes, low_latency_mode=True) as buffer:
        step = DecodeStep(buffer, sizes, context.device)
        for index in range(num_steps):
            start = time.perf_counter()
            step()
            context.synchronize()
            buffer.check()  # a replay makes no call of the library that could raise
            report.step_seconds = min(report.step_seconds, time.perf_counter() - start)
            check(step, context.num_ranks, report)
            step.advance()
            if context.rank == 0:
                context.report(f"step {index + 1} of {num_steps} done")
        context.synchronize()
        torch.distributed.barrier()
    context.report(report)


def main(argv: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    options = launcher.parse_options(__doc__, argv, default_steps=4, spans_nodes=False)
    sizes = Sizes()
    num_ranks, device = launcher.choose_ranks(options, sizes.num_experts)
    launcher.print_header("Decoding with two micro-batches that overlap")
    print(
        f"{num_ranks} ranks on {device}, {sizes.num_tokens} sequences each, {sizes.num_layers} layers, hidden "
        f"{sizes.hidden}, {sizes.num_experts} experts, top-{sizes.num_topk}; "
        f"{'one CUDA graph for a step' if device == 'cuda' else 'no CUDA graph'}",
        flush=True)
    reports: dict[str, RankReport] = {}
    with contextlib.closing(launcher.Progress(options.steps, "step")) as progress:
        for name, report in launcher.run(launcher.make_workers(run_rank, num_ranks, (sizes, options.steps)), device):
            if isinstance(report, str):
                progress.advance(report)
            else:
                reports[name] = report
    return 0 if print_verdict(reports, num_ranks) else 1


def print_verdict(reports: dict[str, Any], num_ranks: int) -> bool:
    print(f'\n{"":8}{"largest value":>15}{"largest difference":>20}{"relative norm":>15}{"best step":>14}')
    all_passed = len(reports) == num_ranks
    for name, report in launcher.by_rank(reports):
        passed = (report.largest_difference <= TOLERANCE_MAX * report.largest_value
                  and report.relative_norm <= TOLERANCE_NORM)
        all_passed &= passed
        print(f'{name:8}{report.largest_value:15.4g}{report.largest_difference:20.3g}{report.relative_norm:15.3g}'
              f'{report.step_seconds * 1e3:11.2f} ms  {"ok" if passed else "DIFFERENT"}')
    print(
        f'{"PASS" if all_passed else "FAIL"}: every layer of every step {"agrees" if all_passed else "does not agree"} '
        'with the dense layer')
    return all_passed


if __name__ == "__main__":
    launcher.exit_with(main)
