"""One MoE layer, forward and backward, with its experts spread over the ranks, against the same layer on one rank.

    python examples/moe_layer.py [--num-processes 4] [--ranks-per-node L] [--device auto|cpu|cuda] [--steps 3]
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import launcher
from expert_parallel import DenseMoE, Dispatcher, ExpertParallelMoE, init_parameters, is_expert_parameter, make_buffer

# Both ways compute the same float32 sums and round at the same places, but a matrix product over another number of rows
# may add in another order. Where that moves a value across the border between two bfloat16 numbers, the results differ
# by a step of bfloat16, 2**-7 of the value at most. A value is rounded twice on its way: as partial sum and as sum.
TOLERANCE_MAX = 2 * 2**-7  # largest difference, relative to the largest value
# Such cases are rare, so that all differences together stay far below one step. One lost row of 2048 would be 2e-2.
TOLERANCE_NORM = 1e-3  # norm of the difference, relative to the norm


@dataclasses.dataclass
class Sizes:
    """Widths of a fine-grained MoE model of today; fewer experts and tokens, so that a laptop can do it."""

    num_tokens: int = 512  # per rank
    hidden: int = 2048
    ffn_hidden: int = 512
    num_experts: int = 32
    num_topk: int = 4
    seed: int = 1


@dataclasses.dataclass
class RankReport:
    """What a rank saw: its traffic in rows, and seconds per phase."""

    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    seconds: dict[str, float]


def run_rank(context: launcher.Context, sizes: Sizes, num_steps: int, ranks_per_node: int | None) -> None:
    """Runs the layer on this rank, then checks it against rank 0's dense layer; reports both."""

    def report_progress(what: str) -> None:
        if context.rank == 0:
            context.report(what)

    dispatcher = Dispatcher(make_buffer(context.group, sizes.hidden))
    layer = ExpertParallelMoE(dispatcher, sizes.hidden, sizes.ffn_hidden, sizes.num_experts, sizes.num_topk)
    init_parameters(layer, sizes.seed)
    layer.to(context.device)
    x, grad_y = (tensor.to(context.device) for tensor in _make_inputs(sizes, context.rank))

    report_progress("ranks are ready")
    seconds = _time_communication(layer, x, context)
    for step in range(num_steps):  # the first ones warm up; the last one counts
        layer.zero_grad()
        x = x.detach().requires_grad_()
        seconds["forward"], y = _timed(lambda: layer(x), context)  # noqa: B023
        seconds["backward"], _ = _timed(lambda: y.backward(grad_y), context)  # noqa: B023
        report_progress(f"step {step + 1} of {num_steps} done")
    context.report(RankReport(*_count_rows(layer, x, context.rank), seconds))
    results = {"output": y, "gradient of input": x.grad}
    for name, difference in _compare(layer, results, sizes, ranks_per_node, context).items():
        if context.rank == 0:
            context.report((name, difference))
    dispatcher.destroy()


def _make_inputs(sizes: Sizes, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sizes.seed * 1000 + rank)
    shape = sizes.num_tokens, sizes.hidden
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _timed(function: Callable[[], Any], context: launcher.Context) -> tuple[float, Any]:
    """Seconds from when all ranks are ready until this one is done."""
    dist.barrier()
    start = time.perf_counter()
    result = function()
    context.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def _time_communication(layer: ExpertParallelMoE, x: Tensor, context: launcher.Context) -> dict[str, float]:
    routes = layer.router(x)
    best: dict[str, float] = {}
    for _ in range(3):
        dispatch_s, received = _timed(lambda: layer.dispatcher.dispatch(x, *routes, layer.num_experts), context)
        combine_s, _ = _timed(lambda: layer.dispatcher.combine(received.x, received.handle), context)  # noqa: B023
        for name, value in ("dispatch", dispatch_s), ("combine", combine_s):
            best[name] = min(value, best.get(name, value))
    return best


@torch.no_grad()
def _count_rows(layer: ExpertParallelMoE, x: Tensor, rank: int) -> tuple[list[int], list[int]]:
    """Rows to and from each rank."""
    topk_idx, _ = layer.router(x)
    sent = layer.dispatcher.buffer.get_dispatch_layout(topk_idx, layer.num_experts)[0].tolist()
    sent_by_rank: list[list[int]] = [[]] * layer.dispatcher.num_ranks
    dist.all_gather_object(sent_by_rank, sent)
    return sent, [others[rank] for others in sent_by_rank]


# --- The same layer on one rank ---------------------------------------------------------------------------------------
def _compare(layer: ExpertParallelMoE, results: dict[str, Tensor], sizes: Sizes, ranks_per_node: int | None,
             context: launcher.Context) -> dict[str, tuple[float, float, float]]:
    """Collective. Per quantity: largest difference, largest value, relative norm of the difference, over all ranks."""
    dense, expected = _run_dense(sizes, ranks_per_node, context) if context.rank == 0 else (None, {})
    differences = {}
    for name, tensor in results.items():
        chunks = list(expected[name].split(sizes.num_tokens)) if dense else []
        differences[name] = _difference([tensor], [_scatter(chunks, tensor)])

    dist.all_reduce(layer.router.weight.grad)  # a replicated parameter: every rank holds the part of its own tokens
    chunks = [dense.router.weight.grad] * context.num_ranks if dense else []
    router_grad = layer.router.weight.grad
    differences["gradient of router"] = _difference([router_grad], [_scatter(chunks, router_grad)])
    experts = {name: p.grad for name, p in layer.named_parameters() if is_expert_parameter(name)}
    owned = []  # per parameter of this rank, what its owner in the dense layer holds
    num_local = sizes.num_experts // context.num_ranks
    for name, grad in experts.items():
        _, expert_id, part = name.split(".")
        ids = [int(expert_id) % num_local + rank * num_local for rank in range(context.num_ranks)]
        grads = [getattr(dense.experts[str(i)], part).grad for i in ids] if dense else []
        owned.append(_scatter(grads, grad))
    differences["gradients of experts"] = _difference(list(experts.values()), owned)
    return differences


def _run_dense(sizes: Sizes, ranks_per_node: int | None,
               context: launcher.Context) -> tuple[DenseMoE, dict[str, Tensor]]:
    """Forward and backward of the dense layer over the tokens of all ranks."""
    dense = DenseMoE(context.num_ranks, sizes.hidden, sizes.ffn_hidden, sizes.num_experts, sizes.num_topk,
                     ranks_per_node)
    init_parameters(dense, sizes.seed)
    dense.to(context.device)
    inputs = [_make_inputs(sizes, rank) for rank in range(context.num_ranks)]
    x, grad_y = (torch.cat(tensors).to(context.device) for tensors in zip(*inputs))
    x.requires_grad_()
    torch.set_num_threads(os.cpu_count() or 1)  # the other ranks wait
    y = dense(x)
    y.backward(grad_y)
    context.report("the same on one rank done")
    return dense, {"output": y, "gradient of input": x.grad}


def _scatter(chunks: list[Tensor], like: Tensor) -> Tensor:
    """Rank 0 gives `chunks[i]` to rank i. By way of the CPU, which every gloo can do."""
    received = torch.empty(like.shape, dtype=like.dtype)
    dist.scatter(received, [chunk.detach().cpu().contiguous() for chunk in chunks] or None, src=0)
    return received.to(like.device)


def _difference(actual: list[Tensor], expected: list[Tensor]) -> tuple[float, float, float]:
    sums, largest = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for a, b in zip(actual, expected):
        for i, values in enumerate([(a - b).detach(), b.detach()]):
            sums[i] += torch.linalg.vector_norm(values, dtype=torch.float64).square().cpu()
            largest[i] = torch.maximum(largest[i], values.abs().max().double().cpu())  # NaN stays NaN
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest[0].item(), largest[1].item(), (sums[0] / sums[1]).sqrt().item()


# --- What the parent prints -------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    options = launcher.parse_options(__doc__, argv, default_steps=2)
    sizes = Sizes()
    num_ranks, device = launcher.choose_ranks(options, sizes.num_experts)
    launcher.print_header("A MoE layer spread over ranks, against the same layer on one rank")
    print(
        f"{launcher.describe_ranks(options)} on {device}, {sizes.num_tokens} tokens each, hidden {sizes.hidden}, "
        f"{sizes.num_experts} experts (SwiGLU, {sizes.ffn_hidden} wide), top-{sizes.num_topk}",
        flush=True)
    ranks: dict[str, RankReport] = {}
    differences: dict[str, tuple[float, float, float]] = {}
    workers = launcher.make_workers(run_rank, num_ranks, (sizes, options.steps, options.ranks_per_node))
    with contextlib.closing(launcher.Progress(2 + options.steps, "part")) as progress:
        for name, report in launcher.run(workers, device, options.ranks_per_node):
            if isinstance(report, str):
                progress.advance(report)
            elif isinstance(report, RankReport):
                ranks[name] = report
            else:
                differences[report[0]] = report[1]
    _print_traffic(ranks, sizes)
    return 0 if _print_verdict(differences) else 1


def _print_traffic(ranks: dict[str, RankReport], sizes: Sizes) -> None:
    # A row on the wire: the token in bfloat16, and per expert a float32 weight and an int64 index.
    row_bytes = 2 * sizes.hidden + 12 * sizes.num_topk
    print(f'\n{"":8}{"rows sent":>11}{"to others":>11}{"MB":>7}{"received":>10}'
          f'{"dispatch":>11}{"combine":>10}{"forward":>10}{"backward":>10}')
    for rank, (name, report) in enumerate(launcher.by_rank(ranks)):
        to_others = sum(report.sent) - report.sent[rank]
        times = "".join(f"{report.seconds[key] * 1e3:7.1f} ms"
                        for key in ("dispatch", "combine", "forward", "backward"))
        print(f"{name:8}{sum(report.sent):11}{to_others:11}{to_others * row_bytes / 1e6:7.1f}{sum(report.received):10} "
              f"{times}")
    num_copies = sizes.num_tokens * sizes.num_topk
    print(f"A token goes once to each rank that has one of its experts: "
          f"{sum(sum(r.sent) for r in ranks.values())} rows for {num_copies * len(ranks)} token-expert pairs.\n"
          "dispatch, combine: alone, best of 3. forward, backward: the whole layer with its experts, last step.")


def _print_verdict(differences: dict[str, tuple[float, float, float]]) -> bool:
    print(f'\n{"against one rank":22}{"largest value":>15}{"largest difference":>20}{"relative norm":>15}')
    all_passed = bool(differences)
    for name, (difference, value, norm) in differences.items():
        passed = difference <= TOLERANCE_MAX * value and norm <= TOLERANCE_NORM  # false for NaN
        all_passed &= passed
        print(f'{name:22}{value:15.4g}{difference:20.3g}{norm:15.3g}  {"ok" if passed else "DIFFERENT"}')
    print(f'Tolerance: largest difference {TOLERANCE_MAX:.2g} of the largest value (two steps of bfloat16), relative '
          f'norm {TOLERANCE_NORM:.0e}\n{"PASS" if all_passed else "FAIL"}: forward and backward '
          f'{"agree" if all_passed else "do not agree"} with one rank')
    return all_passed


if __name__ == "__main__":
    launcher.exit_with(main)
