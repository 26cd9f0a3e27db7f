"""What the worker processes do in tests/unit/test_bench.py. Runs on all ranks of a group."""

from typing import Any

import torch
from compare import same_bits
from utils import Worker

from deep_ep.bench.collectives import Exchange, Gather
from deep_ep.bench.routing import Shape, choose_experts


def same_as_collectives(worker: Worker, shape: Shape) -> None:
    """What the benchmark compares with does the same work: the same rows, and the same sums."""
    rank, device, seed = worker.rank, worker.device, 5
    generator = torch.Generator().manual_seed(rank)
    # Small whole numbers: their sums are exact in bfloat16, in any order.
    x = torch.randint(-8, 9, (shape.num_tokens, shape.hidden), generator=generator).bfloat16().to(device)
    topk_idx = choose_experts(shape, rank, seed).to(device)
    weights = torch.rand((shape.num_tokens, shape.num_topk), generator=generator).to(device)
    fp8 = (x.to(torch.float8_e4m3fn), torch.rand((shape.num_tokens, 3), generator=generator).to(device))
    exchange, gather = (kind(worker.group, shape, topk_idx, weights) for kind in (Exchange, Gather))
    plan = exchange.plan()

    results: dict[str, Any] = {}
    buffer = worker.buffer()
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, shape.num_experts)
    for name, payload in (("bf16", x), ("fp8", fp8)):
        recv, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(payload, None, per_rank, None, in_rank, per_expert,
                                                                     topk_idx, weights)
        wanted = [part.view(torch.uint8) if part.dtype.itemsize == 1 else part for part in as_tuple(recv)]
        rows, got_idx, got_weights, _ = exchange.dispatch(payload)
        for got in (rows, exchange.send(payload, plan)):
            for one, want in zip(got, wanted):
                same_bits(f"{name} rows of the all-to-all", one, want)
        same_bits("experts", got_idx, recv_idx)
        same_bits("weights", got_weights, recv_weights)
        # What the all-gather brings in excess is what no expert of this rank wants.
        every, every_idx, every_weights = gather.dispatch(payload)
        is_mine = (every_idx >= 0).any(1)
        for one, want in zip(every, wanted):
            same_bits(f"{name} rows of the all-gather", one[is_mine], want)
        same_bits("gathered experts", every_idx[is_mine], recv_idx)
        same_bits("gathered weights", every_weights[is_mine], recv_weights)
        results[name] = recv, handle, is_mine

    answers, handle, is_mine = results["bf16"]
    answers = answers * (rank + 1)
    want = buffer.combine(answers, handle)[0] + 0.0
    same_bits("sum of the all-to-all", exchange.combine(answers, plan) + 0.0, want)
    parts = torch.zeros((shape.num_ranks * shape.num_tokens, shape.hidden), dtype=torch.bfloat16, device=device)
    parts[is_mine] = answers
    same_bits("sum of the reduce-scatter", gather.combine(parts) + 0.0, want)


def as_tuple(payload: Any) -> tuple[torch.Tensor, ...]:
    return payload if isinstance(payload, tuple) else (payload, )
