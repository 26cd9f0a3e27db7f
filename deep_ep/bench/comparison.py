"""Rows of the table for the same layer over torch.distributed."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from deep_ep.bench.collectives import Exchange, Gather
from deep_ep.bench.options import Options
from deep_ep.bench.ranks import Ranks
from deep_ep.bench.routing import Shape, busiest_remote_copies, count_copies
from deep_ep.bench.timing import Call

LEFT_OUT_THREADS = "Ranks are threads: there is no process group, so the comparison with torch.distributed is left out."
LEFT_OUT_SHARED = ("Ranks share a GPU, which NCCL refuses: the comparison with torch.distributed is left out.")


@dataclass(frozen=True)
class Compared:
    """One call to time."""

    name: str
    call: Call
    remote_bytes: int


@dataclass(frozen=True)
class Inputs:
    """Those of the library's own operations."""

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    bf16: list[torch.Tensor]
    fp8: list[Any]
    fp8_row_bytes: int


def choose_backend(options: Options) -> tuple[str, str]:
    """The backend that can carry the comparison, or '' and why there is none."""
    if options.is_threaded:
        return "", LEFT_OUT_THREADS
    if not options.is_cuda:
        return "gloo", ""
    if not options.has_own_gpus:
        return "", LEFT_OUT_SHARED
    if not dist.is_nccl_available():
        return "", "This torch has no NCCL: the comparison with torch.distributed is left out."
    return "nccl", ""


def comparisons(ranks: Ranks, group: dist.ProcessGroup, backend: str, shape: Shape, seed: int,
                inputs: Inputs) -> Iterator[Compared]:
    """Collective: dispatches once to have rows to combine."""
    copies = busiest_remote_copies(count_copies(shape, seed))
    everything = (ranks.size - 1) * shape.num_tokens
    payloads: list[tuple[str, list[Any], int]] = [("BF16", inputs.bf16, 2 * shape.hidden),
                                                  ("FP8", inputs.fp8, inputs.fp8_row_bytes)]
    exchange = Exchange(group, shape, inputs.topk_idx, inputs.topk_weights)
    gather = Gather(group, shape, inputs.topk_idx, inputs.topk_weights)
    plan = exchange.plan()
    for name, sets, row_bytes in payloads:
        yield Compared(f"{backend} all-to-all dispatch {name}", partial(_rotate, exchange.dispatch, sets),
                       copies * row_bytes)
        yield Compared(f"{backend} all-to-all dispatch {name} cached", partial(_rotate, exchange.send, sets, plan),
                       copies * row_bytes)
        yield Compared(f"{backend} all-gather dispatch {name}", partial(_rotate, gather.dispatch, sets),
                       everything * row_bytes)
    returned = [exchange.send(x, plan)[0] for x in inputs.bf16]
    yield Compared(f"{backend} all-to-all combine BF16", partial(_rotate, exchange.combine, returned, plan),
                   copies * 2 * shape.hidden)
    gathered = [gather.dispatch(x)[0][0] for x in inputs.bf16]
    yield Compared(f"{backend} reduce-scatter combine BF16", partial(_rotate, gather.combine, gathered),
                   everything * 2 * shape.hidden)


def _rotate(call: Any, sets: list[Any], *args_and_index: Any) -> object:
    *args, i = args_and_index
    return call(sets[i % len(sets)], *args)
