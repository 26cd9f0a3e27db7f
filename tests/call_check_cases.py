"""What the worker processes do in tests/test_call_check.py. Every function runs on both ranks of a group."""

import functools
from collections.abc import Iterator
from typing import Any, Optional

import torch
from failure_cases import SHORT_TIMEOUT_S, failure_of
from low_latency_pending_call import LowLatencyPendingCall, Manner
from pending_call import PendingCall
from utils import Worker
from workload import Workload

import deep_ep

BF16 = torch.bfloat16
WORK = Workload((5, 3), hidden=512)


def checked_buffer(worker: Worker, **options: Any) -> Any:
    return worker.new_buffer(1 << 18, num_rdma_bytes=1 << 20, low_latency_mode=True, **options)


def whole_trips(worker: Worker, buffer: Any) -> None:
    """Calls that agree, in every way, with arguments that may differ: numbers of tokens, and what is done with time."""
    pending = PendingCall(worker, buffer, WORK)
    pending.whole_trip()
    pending.cached_dispatch(WORK.next())
    for mode in ("sync", "async", "hook"):
        LowLatencyPendingCall(worker, buffer, WORK, Manner(mode=mode)).whole_trip()


def different_calls(worker: Worker) -> list[str]:
    """The sentences of calls that do not agree. Nothing of them is launched, so the Buffer goes on."""
    with checked_buffer(worker) as buffer:
        sentences = [failure_of(call, ValueError) for call in _different_calls(worker, buffer)]
        whole_trips(worker, buffer)
        worker.barrier()
    return sentences


def _different_calls(worker: Worker, buffer: Any) -> Iterator[Any]:
    own, device = worker.rank, worker.device

    def rows(num_rows: int, hidden: int) -> torch.Tensor:
        return torch.ones(num_rows, hidden, dtype=BF16, device=device)

    topk_idx = torch.tensor([[0, 1], [2, 3]], device=device)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    dispatch = functools.partial(buffer.dispatch,
                                 num_tokens_per_rank=per_rank,
                                 num_tokens_per_expert=per_expert,
                                 is_token_in_rank=in_rank)
    yield lambda: dispatch(rows(2, 64 << own))
    if own == 1:
        topk = {"topk_idx": topk_idx, "topk_weights": torch.ones(2, 2, device=device)}
        yield lambda: dispatch(rows(2, 64), **topk)
        yield lambda: dispatch(rows(2, 64), num_tokens_per_rank=per_rank - 1)
    else:
        yield lambda: dispatch(rows(2, 64))
        yield lambda: dispatch(rows(2, 64))
    received, *_, handle, _ = dispatch(rows(2, 64))
    other_idx = torch.tensor([[0, 1], [0, 1]], device=device)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(other_idx, 4)
    fewer, *_, other_handle, _ = buffer.dispatch(rows(2, 64), None, per_rank, None, in_rank, per_expert)
    yield lambda: dispatch(rows(2, 64), other_handle if own else handle)
    yield (lambda: buffer.combine(fewer, other_handle)) if own else (lambda: buffer.combine(received, handle))
    with checked_buffer(worker) as second:
        yield lambda: (second if own else buffer).dispatch(rows(2, 64), handle)
        worker.barrier()
    yield (lambda: buffer.combine(received, handle)) if own else (lambda: dispatch(rows(2, 64), handle))
    yield lambda: buffer.low_latency_dispatch(rows(2, 512), topk_idx, 4 << own, 4)
    yield lambda: buffer.low_latency_dispatch(rows(2, 512), topk_idx, 4, 4, use_fp8=own == 0)
    recv_x, _, ll_handle, _, _ = buffer.low_latency_dispatch(rows(2, 512), topk_idx, 4, 4, use_fp8=False)
    weights = torch.ones(2, 2, device=device)
    yield lambda: buffer.low_latency_combine(recv_x, topk_idx, weights, ll_handle, use_logfmt=own == 1)
    buffer.low_latency_combine(recv_x, topk_idx, weights, ll_handle)


def absent_rank(worker: Worker) -> Optional[str]:
    """Who does not come is still named, by the call itself."""
    buffer = checked_buffer(worker, timeout_s=SHORT_TIMEOUT_S)
    return None if worker.rank == 1 else failure_of(lambda: whole_trips(worker, buffer), deep_ep.TimeoutError)


AT_EXIT = """
import sys, time, torch, torch.distributed as dist, deep_ep
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
buf = deep_ep.Buffer(dist.group.WORLD, 1 << 20)
idx, x = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 8, dtype=torch.bfloat16)
if rank == 1:
    time.sleep(5)  # skips the call, then leaves
else:
    n, _, e, r, _ = buf.get_dispatch_layout(idx, 2)
    try:
        buf.dispatch(x, None, n, None, r, e, idx, torch.ones(4, 1))
    except deep_ep.Error as error:
        print("caught:", error, flush=True)
    time.sleep(1)
sys.exit(7)
"""
