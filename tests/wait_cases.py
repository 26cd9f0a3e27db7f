"""What the worker processes do in tests/test_waits.py. Every function runs on all ranks of a group."""

import time

import torch
from low_latency_cases import GraphedTrip
from low_latency_pending_call import LowLatencyPendingCall, Manner, low_latency_buffer
from pending_call import PendingCall
from utils import Worker
from workload import Workload

NUM_CALLS = 3
DELAY_S = 0.3


def seconds_waited(buffer: object, operation: str) -> list[float]:
    """By rank, at all stages of the operations whose names begin so."""
    counters = buffer.get_wait_counters()  # type: ignore[attr-defined]
    chosen = [i for i, name in enumerate(counters.operations) if name.startswith(operation)]
    return [ns / 1e9 for ns in counters.waited_ns[chosen].sum((0, 1)).tolist()]


def late_rank(worker: Worker, late: int, mode: str) -> tuple[list[float], str, int]:
    """One rank enters each call late. What the others have waited for each rank, as text too, and the most calls."""
    work = Workload(tuple(range(5, 5 + worker.num_ranks)), hidden=512)
    options = {"num_rdma_bytes": 1 << 22, "low_latency_mode": True} if mode == "low-latency" else {}
    with worker.new_buffer(**options) as buffer:
        for _ in range(NUM_CALLS):
            pending = (LowLatencyPendingCall(worker, buffer, work, Manner()) if options else PendingCall(
                worker, buffer, work).layout())
            worker.barrier()
            if worker.rank == late:
                time.sleep(DELAY_S)
            pending.dispatch().combine()
        counters = buffer.get_wait_counters()
        most = int(counters.times_late.max()) if worker.num_ranks > 1 else 0
        found = seconds_waited(buffer, "low_latency_" if options else "dispatch"), buffer.dump_waits(), most
        worker.barrier()
        counters.reset()
        assert not counters.times_late.any() and not counters.waited_ns.any()
        return found


def late_replays(worker: Worker, late: int) -> tuple[list[float], str]:
    """Graphs of low-latency calls, replayed late by one rank. The others read their counters while they wait."""
    work = Workload((4, ) * worker.num_ranks, hidden=512)
    buffer = low_latency_buffer(worker)
    graph = GraphedTrip(worker, buffer, work, Manner())
    before = seconds_waited(buffer, "low_latency_")
    texts = []
    for seed in range(NUM_CALLS):
        worker.barrier()
        if worker.rank == late:
            worker.barrier()  # the others have read
            graph.start(seed)
        else:
            graph.start(seed)
            time.sleep(DELAY_S)
            texts.append(buffer.dump_waits())
            worker.barrier()
        graph.finish()
    after = seconds_waited(buffer, "low_latency_")
    torch.cuda.synchronize()
    return [now - then for now, then in zip(after, before)], "" if worker.rank == late else texts[-1]
