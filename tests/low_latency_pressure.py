"""Random low-latency calls for as long as asked: each right against the reference, and the same bits every time.

One Buffer serves every shape, so that each round finds what another shape left behind in its region.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from low_latency_pending_call import (
    CASTS,
    LowLatencyPendingCall,
    Manner,
    finish_together,
    low_latency_buffer,
)
from pressure import NUM_REPEATS, Choice, Digests, Sizes, be_late, play_rounds
from reference import Cast
from utils import Worker
from workload import Workload

from deep_ep import Buffer


def run(worker: Worker, sizes: Sizes, seed: int, seconds: float, least_rounds: int = 4) -> tuple[int, str]:
    """Collective. The number of rounds, and one digest over the first of them."""

    def play(round_idx: int, choice: Choice) -> Digests:
        return play_round(worker, sizes, choice, seed * 100_000 + round_idx)

    return play_rounds(worker, seed, seconds, least_rounds, play)


def play_round(worker: Worker, sizes: Sizes, choice: Choice, seed: int) -> Digests:
    """One call, or two that are open at the same time, of any shape, format and mode."""
    num_bytes = Buffer.get_low_latency_rdma_size_hint(sizes.num_tokens, sizes.hidden, worker.num_ranks,
                                                      sizes.experts_per_rank * worker.num_ranks)
    buffer, manner = low_latency_buffer(worker, num_bytes), choose_manner(sizes, choice)
    work = choose_work(worker.num_ranks, sizes, choice, manner.cast, seed)
    other = replace(work, num_tokens=work.num_tokens[::-1], num_topk=1, seed=work.seed + 50_000)
    works = [work, other][:choice.of(1, 2)]
    pending_calls = [LowLatencyPendingCall(worker, buffer, each, manner) for each in works]
    digests = Digests(f"seed {seed}, {works}, {manner}")
    landings = pending_calls if choice.of(False, True) else pending_calls[::-1]
    for pending in pending_calls:
        pending.start_dispatch()
    finish_together(pending_calls, landings)
    digests.add(*(output for pending in pending_calls for output in outputs_of(pending)))
    repeat(worker, pending_calls, landings, digests)
    return digests


def orders_of_their_own(worker: Worker, sizes: Sizes, seed: int, rounds: int) -> None:
    """Two calls open on each of two Buffers. Each rank receives them in an order of its own, with pauses of its own,
    some without hooks: what one rank does between its calls must be nothing to another."""
    shared, mine = Choice(seed, 0), Choice(seed, worker.rank + 1)
    num_experts = sizes.experts_per_rank * worker.num_ranks
    num_bytes = Buffer.get_low_latency_rdma_size_hint(sizes.num_tokens, sizes.hidden, worker.num_ranks, num_experts)
    buffers = [low_latency_buffer(worker, num_bytes), low_latency_buffer(worker, num_bytes + 4096)]
    for round_idx in range(rounds):
        manners = [replace(choose_manner(sizes, shared), mode=mine.of("hook", "hook", "async")) for _ in range(4)]
        works = [choose_work(worker.num_ranks, sizes, shared, manner.cast, seed * 100 + round_idx * 4 + i)
                 for i, manner in enumerate(manners)]  # yapf: disable
        calls = [LowLatencyPendingCall(worker, buffers[i % 2], works[i], manners[i]) for i in range(4)]
        for starts, finishes in (("start_dispatch", "finish_dispatch"), ("start_combine", "finish_combine")):
            for call in calls:
                getattr(call, starts)()
                time.sleep(mine.of(0.0, 0.0, 0.0, 0.01))
            left = list(calls)
            while left:
                getattr(left.pop(mine.of(*range(len(left)))), finishes)()
                time.sleep(mine.of(0.0, 0.0, 0.02))


def choose_manner(sizes: Sizes, choice: Choice) -> Manner:
    cast = choice.of(*(cast for cast in CASTS if least_hidden(cast) <= sizes.hidden))
    combine = choice.of("bfloat16", "bfloat16", "logfmt", "zero copy")
    return Manner(cast,
                  mode=choice.of("sync", "async", "hook", "hook"),
                  max_tokens=sizes.num_tokens if choice.of(False, True) else 0,
                  use_logfmt=combine == "logfmt",
                  zero_copy=combine == "zero copy",
                  has_out=choice.of(False, True),
                  has_stats=choice.of(False, True))


def least_hidden(cast: Cast) -> int:
    """Of which any row with that cast is a multiple."""
    return 512 if cast.use_ue8m0 else 128 if cast.use_fp8 else 8


def choose_work(num_ranks: int, sizes: Sizes, choice: Choice, cast: Cast, seed: int) -> Workload:
    unit, most = least_hidden(cast), sizes.num_tokens
    return Workload(
        tuple(choice.of(0, 1, most // 3, most) for _ in range(num_ranks)),
        hidden=choice.of(*sorted({max(unit, sizes.hidden // part // unit * unit)
                                  for part in (1, 2, 5, 16)})),
        num_topk=choice.of(*sorted({1, max(1, sizes.num_topk // 2), sizes.num_topk})),
        experts_per_rank=choice.of(*sorted({1, max(1, sizes.experts_per_rank // 2), sizes.experts_per_rank})),
        routing=choice.of("random", "random", "holes", "duplicates", "one_rank", "spread"),
        idx_dtype=choice.of(torch.int64, torch.int32),
        seed=seed)


def outputs_of(pending: LowLatencyPendingCall) -> list[torch.Tensor]:
    """Everything that a dispatch and its combine state, without the rows that belong to nobody."""
    received, counts, handle = pending.received[:3]
    rows = torch.arange(handle[0].shape[1], device=counts.device) < counts[:, None]
    x, *scales = received if isinstance(received, tuple) else (received, )
    return [counts, handle[1], x.view(torch.uint8)[rows], handle[0][rows], *(each[rows] for each in scales),
            pending.combined[0]]  # yapf: disable


def repeat(worker: Worker, pending_calls: list[LowLatencyPendingCall], landings: list[LowLatencyPendingCall],
           digests: Digests) -> None:
    """The calls again, at different moments; what the experts answer lies ready, so that they follow closely."""
    answers: dict[Any, torch.Tensor] = {pending: pending.expert_rows() for pending in pending_calls}
    for i in range(NUM_REPEATS):
        be_late(worker, i)
        for pending in pending_calls:
            pending.start_dispatch()
        for pending in landings:
            pending.landed(*pending.received[3:])
        for pending in pending_calls:
            pending.start_combine(answers[pending])
        for pending in landings:
            pending.landed(*pending.combined[1:])
        digests.add(*(output for pending in pending_calls for output in outputs_of(pending)))
