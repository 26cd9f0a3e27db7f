"""What the worker processes do in tests/test_co_residency.py, on GPUs: calls while others have nearly all SMs."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lending_cases import LEND_BYTES
from low_latency_pending_call import BF16, FP8, LowLatencyPendingCall, Manner, low_latency_buffer
from pending_call import How, PendingCall
from utils import BUFFER_TIMEOUT_S, Worker
from workload import Workload

HELD_FOR_S = BUFFER_TIMEOUT_S * 2  # a call that waits for these SMs fails by itself before


def all_but(held: Any, num_free: int) -> int:
    return int(held.num_sms) - num_free


@contextlib.contextmanager
def others_on(worker: Worker) -> Iterator[Any]:
    from deep_ep_bench_cpp import HeldSms

    held = HeldSms(torch.cuda.current_device())
    try:
        yield held
    finally:
        held.release()
        held.synchronize()


def beside_others(worker: Worker, num_free: int, trip: Callable[[], None]) -> None:
    """`trip` while all SMs but `num_free` are held. Once before: what is loaded lazily waits for a quiet device."""
    trip()
    with others_on(worker) as held:
        num_held = all_but(held, num_free)
        held.hold(num_held, HELD_FOR_S, 0)
        started = time.monotonic()
        while held.num_held < num_held:
            assert time.monotonic() - started < HELD_FOR_S / 2, f"{held.num_held} of {num_held} SMs are held"
        worker.barrier()
        trip()
        torch.cuda.current_stream().synchronize()
        took_s = time.monotonic() - started
        assert took_s < HELD_FOR_S, "the SMs were given back before the calls had ended"
        worker.barrier()


def high_throughput(worker: Worker, work: Workload, how: How, has_cached: bool) -> None:
    buffer = worker.new_buffer(num_lend_bytes=LEND_BYTES if how.lends else 0)

    def trip() -> None:
        pending = PendingCall(worker, buffer, work, how).layout().dispatch().combine(1)
        if has_cached:
            pending.cached_dispatch()

    beside_others(worker, how.num_sms, trip)
    buffer.destroy()


def low_latency(worker: Worker, work: Workload, num_free: int) -> None:
    """Every way to make the calls."""

    def trip() -> None:
        for cast in (BF16, FP8):
            for mode in ("sync", "async", "hook"):
                pending = LowLatencyPendingCall(worker, low_latency_buffer(worker), work, Manner(cast, mode=mode))
                # As it is, it waits for the whole device: for the others too.
                pending.landed = functools.partial(landed, pending)  # type: ignore[method-assign]
                pending.whole_trip()

    beside_others(worker, num_free, trip)


def landed(pending: LowLatencyPendingCall, event: Any, hook: Any) -> None:
    if hook is not None:
        hook()
    if event.event is not None:
        event.current_stream_wait()
    torch.cuda.current_stream().synchronize()
    pending.buffer.check()


def in_other_orders(worker: Worker, work: Workload, num_rounds: int) -> None:
    """Every other rank launches a collective of NCCL before a call, the others after it. Needs a group of NCCL."""
    buffer = low_latency_buffer(worker)
    rows = torch.full((1 << 24, ), float(worker.rank + 1), device=worker.device)
    total = float(sum(range(1, worker.num_ranks + 1)))

    def collective() -> Any:
        rows.fill_(worker.rank + 1)
        return dist.all_reduce(rows, group=worker.group, async_op=True)

    collective().wait()  # NCCL builds its communicator in the first one, and the host waits for that of the other rank
    for i in range(num_rounds):
        is_first = (worker.rank + i) % 2 == 0
        pending: Any
        if i % 4 < 2:
            pending = PendingCall(worker, worker.buffer(), work, How(is_async=True)).layout()
        else:
            pending = LowLatencyPendingCall(worker, buffer, work, Manner(FP8, mode=("async", "hook")[i % 2]))
        torch.cuda.synchronize()
        collectives = [collective()] if is_first else []
        pending.start_dispatch()
        collectives = collectives or [collective()]
        pending.finish_dispatch()
        pending.combine()
        collectives[0].wait()
        torch.cuda.synchronize()
        assert (rows == total).all(), "the collective of the others"


def before_and_after(worker: Worker, work: Workload, num_free: int) -> None:
    """Rank 0 launches other work before its calls, the others after theirs, which wait for rank 0."""
    buffer = low_latency_buffer(worker)

    def trip(begin_others: Callable[[], None]) -> None:
        pending = LowLatencyPendingCall(worker, buffer, work, Manner(mode="async"))
        torch.cuda.synchronize()
        worker.barrier()
        if worker.rank == 0:
            begin_others()
            time.sleep(0.2)
        pending.start_dispatch()
        if worker.rank:
            begin_others()
        landed(pending, *pending.received[3:])

    trip(lambda: None)
    with others_on(worker) as held:
        started = time.monotonic()
        trip(lambda: held.hold(all_but(held, num_free), HELD_FOR_S, 0))
        assert time.monotonic() - started < HELD_FOR_S
        worker.barrier()
