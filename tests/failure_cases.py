"""What the worker processes do when something goes wrong. Every function runs on all ranks of a group."""

import contextlib
import gc
import io
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, Optional

import torch
from compare import equal
from pending_call import How, PendingCall
from utils import BUFFER_TIMEOUT_S, Worker, device
from workload import Workload

import deep_ep

# Ranks that share one GPU are given it in turns, and the first launch of a process is slow.
SHORT_TIMEOUT_S = 6.0 if device().type == "cuda" else 1.5


def failure_of(call: Any, kinds: Any = deep_ep.Error) -> str:
    """The sentence with which `call` fails, as one of `kinds`."""
    try:
        call()
    except kinds as error:
        return str(error)
    raise AssertionError("a result instead of an error")


def settle(worker: Worker, buffer: Any) -> None:
    """Waits for the kernels and raises what they reported: on a GPU a call returns before they end."""
    if worker.device.type == "cuda":
        torch.cuda.synchronize()
    buffer.check()


def impatient_buffer(worker: Worker) -> Any:
    """A Buffer with a short timeout, once every rank is warm: first calls on a device may take seconds."""
    PendingCall(worker, worker.buffer(), Workload((2, ) * worker.num_ranks)).whole_trip()
    buffer = worker.new_buffer(timeout_s=SHORT_TIMEOUT_S)
    worker.barrier()
    return buffer


def endless_patience(worker: Worker, work: Workload) -> None:
    """A timeout that no clock can count: it means never, and not at once."""
    with worker.new_buffer(timeout_s=math.inf) as buffer:
        worker.barrier()
        time.sleep(0.05 * worker.rank)
        PendingCall(worker, buffer, work).whole_trip()
        worker.barrier()


def absent_rank(worker: Worker, work: Workload, absent: int, step: str) -> Optional[str]:
    """One rank leaves out a call: the others get a TimeoutError that names it, again and again; a new Buffer works."""
    buffer = impatient_buffer(worker)
    pending = PendingCall(worker, buffer, work).layout()
    if step == "combine":
        pending.dispatch()
    message = None
    if worker.rank != absent:
        started = time.monotonic()
        message = failure_of(getattr(pending, step), deep_ep.TimeoutError)
        assert time.monotonic() - started < 10 * SHORT_TIMEOUT_S
        for later in (pending.layout, pending.combine if step == "combine" else pending.dispatch, buffer.check):
            equal("the sentence of a later failure", failure_of(later, deep_ep.TimeoutError), message)
        assert f"rank {absent}" in message, message
    worker.barrier()
    buffer.destroy()
    with worker.new_buffer() as fresh:
        PendingCall(worker, fresh, work).whole_trip()
    return message


def absent_in_async(worker: Worker, work: Workload) -> None:
    """The failure of an asynchronous call is raised by the next call, and on the CPU by the wait."""
    buffer = impatient_buffer(worker)
    pending = PendingCall(worker, buffer, work, How(is_async=True)).layout().dispatch()
    if worker.rank:
        _, _, event = buffer.combine(pending.result[0], pending.handle, async_finish=True)
        if worker.device.type == "cpu":
            failure_of(event.current_stream_wait, deep_ep.TimeoutError)
        failure_of(lambda: settle(worker, buffer), deep_ep.TimeoutError)
    worker.barrier()
    buffer.destroy()


def killed_rank(worker: Worker, work: Workload, victim: int) -> str:
    """A rank dies; the others fail in time, destroy, and exit (pitfall 40)."""
    buffer = impatient_buffer(worker)
    PendingCall(worker, buffer, work).whole_trip()
    if worker.rank == victim:
        os._exit(7)
    message = failure_of(PendingCall(worker, buffer, work).whole_trip)
    started = time.monotonic()
    buffer.destroy()
    buffer.destroy()
    assert time.monotonic() - started < 10
    return message


def failing_construction(worker: Worker, kinds: Any, trouble: Any, **options: Any) -> str:
    """Building a Buffer fails on every rank while there is `trouble` (a context), and works afterwards.

    Returns the class and the sentence of the failure.
    """
    with trouble:
        try:
            worker.new_buffer(**options)
        except kinds as error:
            message = f"{type(error).__name__}: {error}"
        else:
            raise AssertionError("a Buffer was built")
    with worker.new_buffer(1 << 16) as buffer:
        PendingCall(worker, buffer, Workload((2, ) * worker.num_ranks, hidden=16)).whole_trip()
    return message


def failing_constructor(worker: Worker, failing: int, argument: str) -> str:
    """A bad argument on one rank is an exception on all."""
    options: dict[str, Any] = {"num_nvl_bytes": 1 << 12}
    if worker.rank == failing:
        options = {"num_nvl_bytes": 100} if argument == "bad" else {"num_nvl_bytes": 1 << 13}
    return failing_construction(worker, (deep_ep.Error, ValueError), contextlib.nullcontext(), **options)


def bad_expert(worker: Worker) -> str:
    """An expert id out of range is reported with token and value, not written through."""
    with worker.new_buffer() as buffer:
        topk_idx = torch.zeros((4, 2), dtype=torch.int64)
        topk_idx[2, 1] = 1000
        topk_idx = topk_idx.to(worker.device)
        return failure_of(lambda: (buffer.get_dispatch_layout(topk_idx, worker.num_ranks), settle(worker, buffer)))


def too_few_worst_rows(worker: Worker) -> str:
    """num_worst_tokens below what arrives: an error that names it, and no write past the end."""
    work = Workload((9, ) * worker.num_ranks, hidden=64, routing="spread", num_topk=worker.num_ranks)
    buffer = impatient_buffer(worker)
    pending = PendingCall(worker, buffer, work).layout()
    topk = {"topk_idx": pending.topk_idx, "topk_weights": torch.ones(pending.topk_idx.shape, device=worker.device)}
    message = failure_of(lambda: (buffer.dispatch(
        pending.payload(), **pending.layout_tensors, **topk, num_worst_tokens=4), settle(worker, buffer)))
    worker.barrier()
    buffer.destroy()
    return message


def leave_without_destroy(worker: Worker, explicitly: bool) -> str:
    """The destructor: never blocks; warns only when destroy() was promised."""
    buffer = worker.new_buffer(explicitly_destroy=explicitly)
    PendingCall(worker, buffer, Workload((3, ) * worker.num_ranks)).whole_trip()
    caught = io.StringIO()
    with contextlib.redirect_stderr(caught):
        started = time.monotonic()
        del buffer
        gc.collect()
        assert time.monotonic() - started < 3
    return caught.getvalue()


def too_small_buffer(worker: Worker) -> None:
    """An error that says what is needed, on every rank; the Buffer goes on with what fits."""
    big, small = Workload((3, ) * worker.num_ranks, hidden=4096), Workload((3, ) * worker.num_ranks, hidden=16)
    with worker.new_buffer(2 * 512 * worker.num_ranks) as buffer:
        pending = PendingCall(worker, buffer, big).layout()
        message = failure_of(pending.start_dispatch, ValueError)
        assert "num_nvl_bytes" in message, message
        PendingCall(worker, buffer, small).whole_trip()


def late_rank_is_logged(worker: Worker, work: Workload, late: int, signal: Path) -> list[str]:
    """What the logger `deep_ep` says while everybody waits for one rank, which comes once it has said something."""
    records: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> None:
        records.append(record)
        signal.touch()

    handler = logging.Handler()
    handler.emit = keep  # type: ignore[method-assign]
    logger = logging.getLogger("deep_ep")
    logger.addHandler(handler)
    pending = PendingCall(worker, worker.buffer(), work)
    pending.layout()
    deadline = time.monotonic() + BUFFER_TIMEOUT_S / 2
    while worker.rank == late and not signal.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    pending.dispatch()
    pending.combine()
    logger.removeHandler(handler)
    return [record.getMessage() for record in records if record.levelno == logging.WARNING]
