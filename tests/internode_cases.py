"""What the worker processes do in tests/test_internode.py beside the cases of one node, on all ranks of a group."""

import os
import time
from typing import Any

import torch
from compare import equal, same_bits
from failure_cases import failure_of, settle
from lending_cases import LEND_BYTES
from pending_call import How, PendingCall, dispatch_arguments
from utils import Worker
from workload import Workload

from deep_ep import Config

NUM_BANKS = 2


def slot_bytes(row_bytes: int, num_words: int) -> int:
    """Of a row with so many words of metadata, wherever it waits."""
    return -(-(-(-row_bytes // 16) * 16 + 4 * num_words) // 128) * 128


def tiny_windows(worker: Worker, work: Workload, num_slots: int) -> None:
    """Room for so many rows of each stream, within the node and on the rail: everything wraps, nothing stands still."""
    row_bytes, topk = work.hidden * 2, work.num_topk
    with worker.new_buffer(1 << 20) as roomy:
        topology = roomy._session.topology
    nodes, size = topology.num_nodes, topology.ranks_per_node
    num_nvl_bytes = NUM_BANKS * nodes * (size - 1) * slot_bytes(row_bytes, 1 + 2 * topk) * num_slots
    num_rdma_bytes = NUM_BANKS * 2 * (nodes - 1) * slot_bytes(row_bytes, 1 + 2 * topk + size) * num_slots
    with worker.new_buffer(max(num_nvl_bytes, 128), num_rdma_bytes=num_rdma_bytes, num_lend_bytes=0) as buffer:
        pending = PendingCall(worker, buffer, work).layout().dispatch().combine(1)
        pending.cached_dispatch(work.next()).combine()


def too_small_window(worker: Worker) -> str:
    """An error that says what is needed, on every rank; the Buffer goes on with what fits."""
    ranks = worker.num_ranks
    with worker.new_buffer(1 << 20, num_rdma_bytes=4096) as buffer:
        pending = PendingCall(worker, buffer, Workload((3, ) * ranks, hidden=4096)).layout()
        message = failure_of(pending.start_dispatch, ValueError)
        PendingCall(worker, buffer, Workload((3, ) * ranks, hidden=16)).whole_trip()
        return message


def some_lend(worker: Worker, work: Workload) -> None:
    """Every other rank has kept what it could lend: its rows come through slots, as do those that it gives back."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        kept = [buffer.lend((LEND_BYTES, ), torch.uint8)] if worker.rank % 2 else []
        pending = PendingCall(worker, buffer, work, How(lends=not kept)).layout().dispatch().combine(2)
        pending.cached_dispatch(work.next()).combine()


def other_names(worker: Worker, work: Workload) -> None:
    """internode_dispatch and internode_combine are what dispatch and combine come to."""
    buffer, pending = worker.buffer(), PendingCall(worker, worker.buffer(), work).layout().dispatch()
    topk = {
        "topk_idx": pending.topk_idx,
        "topk_weights": pending.mine.topk_weights.to(worker.device)
    }  # type: ignore[union-attr]
    x, config = pending.payload(), Config(4, 4, 8, 2, 8)
    recv_x, idx, weights, counts, handle, _ = buffer.internode_dispatch(x,
                                                                        **pending.layout_tensors,
                                                                        **topk,
                                                                        config=config)
    for name, got, want in zip(("recv_x", "recv_topk_idx", "recv_topk_weights"), (recv_x, idx, weights),
                               pending.result):
        same_bits(name, got, want)
    equal("counts", counts, pending.result[3])
    combined, combined_weights, _ = buffer.internode_combine(recv_x, handle, weights, config=config)
    want = buffer.combine(pending.result[0], pending.handle, pending.result[2])
    same_bits("combined_x", combined, want[0])
    same_bits("combined_topk_weights", combined_weights, want[1])


def cached_graph_replays(worker: Worker, work: Workload) -> None:
    """A cached dispatch and its combine, captured once: replayed with other rows, as when they are called."""
    buffer = worker.buffer()
    pending = PendingCall(worker, buffer, work).layout().dispatch()
    x, handle = pending.payload().clone(), pending.handle

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        rows = buffer.dispatch(x, handle=handle)[0]
        return rows, buffer.combine(rows, handle)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(3):
        x.copy_(x.roll(1, 0) * 3)
        graph.replay()
        called = step()
        torch.cuda.synchronize()
        for name, got, want in zip(("recv_x", "combined_x"), replayed, called):
            same_bits(name, got, want)


def destroyed_in_any_order(worker: Worker, work: Workload) -> None:
    """Ranks destroy their Buffers in different orders, and make others, over the same engine."""
    for turn in range(3):
        buffers = [worker.new_buffer(), worker.new_buffer(1 << 21)]
        for buffer in buffers:
            PendingCall(worker, buffer, work).whole_trip()
            settle(worker, buffer)
        worker.barrier()
        for buffer in buffers[::1 if (worker.rank + turn) % 2 else -1]:
            buffer.destroy()


def as_v1_is_tested(worker: Worker, num_tokens: int, hidden: int, num_experts: int) -> None:
    """What DeepEP's own test of several nodes relies on: arguments, results, and the handle's prefix sum.

    Rows that say which rank and token they come from; every call positional or named as there.
    """
    buffer, rank, num_ranks, device = worker.buffer(), worker.rank, worker.num_ranks, worker.device
    generator = torch.Generator().manual_seed(rank)
    x = torch.full((num_tokens, hidden), float(rank), dtype=torch.bfloat16)
    x[:, -16:] = (torch.arange(num_tokens) % 251).bfloat16()[:, None]
    x = x.to(device)
    topk_idx = torch.rand((num_tokens, num_experts), generator=generator).topk(4).indices.to(device)
    topk_weights = torch.full((num_tokens, 4), float(rank), device=device)
    config = Config(4, 8, 512, 16, 128)
    counted = buffer.get_dispatch_layout(topk_idx, num_experts)
    in_rank = counted[3]
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(x=x,
                                                                            **dispatch_arguments(counted),
                                                                            topk_idx=topk_idx,
                                                                            topk_weights=topk_weights,
                                                                            config=config,
                                                                            async_finish=True)
    event.current_stream_wait()
    prefix = handle[-4].tolist()
    equal("rows", recv_x.shape[0], prefix[-1])
    for source in range(num_ranks):
        rows = recv_x[0 if source == 0 else prefix[source - 1]:prefix[source]]
        assert (rows[:, :-16] == source).all(), f"rows of rank {source}"
    assert (recv_weights[recv_idx >= 0] <= num_ranks).all()
    equal("counts", counts, [(recv_idx == expert).sum().item() for expert in range(num_experts // num_ranks)])
    again, *nothing, _ = buffer.dispatch(x=x, handle=handle, config=config)
    equal("cached results", nothing, [None] * 4)
    same_bits("cached recv_x", again, recv_x)
    combined, combined_weights, _ = buffer.combine(x=recv_x,
                                                   bias=None,
                                                   handle=handle,
                                                   topk_weights=recv_weights,
                                                   config=config)
    copies = in_rank.sum(1, keepdim=True)
    error = (combined.float() / copies - x.float()).abs().max().item()
    assert error <= 0.01 * x.float().abs().max().item(), error
    same_bits("combined weights", combined_weights, topk_weights)


def killed_in_another_node(worker: Worker, work: Workload, victim: int) -> tuple[str, float]:
    """A rank dies between calls: who shares its rail knows at once. The sentence, and the seconds until it came."""
    with worker.new_buffer() as warm:
        PendingCall(worker, warm, work).whole_trip()
        buffer = worker.new_buffer()  # with the patience of all other cases: no deadline is to speak here
        PendingCall(worker, buffer, work).whole_trip()
        worker.barrier()
        if worker.rank == victim:
            os._exit(7)
        started = time.monotonic()
        message = failure_of(lambda: (PendingCall(worker, buffer, work).whole_trip(), settle(worker, buffer)))
        took = time.monotonic() - started
        buffer.destroy()
    return message, took


def bad_arguments(worker: Worker, work: Workload) -> None:
    """What only a dispatch across nodes is given, refused with a sentence on every rank before anything is launched."""
    buffer = worker.buffer()
    pending = PendingCall(worker, buffer, work).layout().dispatch()
    x, layout_tensors, handle = pending.payload(), pending.layout_tensors, pending.handle
    per_node = layout_tensors["num_tokens_per_rdma_rank"]

    def refused(parts: tuple[str, ...], kinds: Any, call: Any) -> None:
        message = failure_of(call, kinds)
        assert all(part in message for part in parts), message

    def dispatch(**given: Any) -> Any:
        return lambda: buffer.dispatch(x, **{**layout_tensors, **given})

    name = "num_tokens_per_rdma_rank"
    refused((name, "get_dispatch_layout"), ValueError, dispatch(**{name: None}))
    refused((name, f"[{pending.num_nodes}]"), ValueError, dispatch(**{name: per_node[:1]}))
    refused((name, "int32"), TypeError, dispatch(**{name: per_node.long()}))
    refused((name, "torch.Tensor"), TypeError, dispatch(**{name: per_node.tolist()}))
    refused(("handle must have 10 tensors, got 6", ), ValueError, lambda: buffer.combine(pending.result[0], handle[:6]))
    for place, what in ((2, "send_head"), (4, "rail_prefix"), (5, "rank_prefix_matrix"), (7, "recv_src_idx"),
                        (8, "send_rail_head"), (9, "rail_head")):
        for bad, kind in ((handle[place].long(), TypeError), (handle[place][None], ValueError), (None, TypeError)):
            other = (*handle[:place], bad, *handle[place + 1:])
            refused((f"handle[{place}] ({what})", ), kind, lambda other=other: buffer.dispatch(x, other))
    short = (*handle[:8], handle[8][:-1], handle[9])
    refused((f"handle[8] (send_rail_head) must have shape [{x.shape[0]}, {pending.num_nodes}]", ), ValueError,
            lambda: buffer.dispatch(x, short))
    pending.cached_dispatch().combine()


def described(worker: Worker) -> str:
    return repr(worker.buffer())


def different_calls(worker: Worker) -> list[str]:
    """DEEP_EP_CHECK_CALLS across nodes: the sentences of calls that do not agree; the Buffer goes on."""
    work = Workload((5, 0, 3, 6))
    with worker.new_buffer() as buffer:
        one = PendingCall(worker, buffer, work).layout().dispatch()
        other = PendingCall(worker, buffer, work.next()).layout().dispatch()
        layout_tensors = dict(one.layout_tensors)
        if worker.rank == 0:
            layout_tensors["num_tokens_per_rdma_rank"] = layout_tensors["num_tokens_per_rdma_rank"] + 1
        handle = other.handle if worker.rank == worker.num_ranks - 1 else one.handle
        sentences = [
            failure_of(lambda: buffer.dispatch(one.payload(), **layout_tensors), ValueError),
            failure_of(lambda: buffer.dispatch(one.payload(), handle), ValueError)
        ]
        one.combine()
        other.cached_dispatch().combine()
        worker.barrier()
    return sentences
