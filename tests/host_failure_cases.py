"""What the worker processes do when the host of a rank fails, waits or goes. Every function runs on all ranks."""

import contextlib
import gc
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from failure_cases import SHORT_TIMEOUT_S, failing_construction, failure_of, impatient_buffer, settle
from low_latency_pending_call import LowLatencyPendingCall, Manner
from pending_call import How, PendingCall, dispatch_arguments
from single_rank import single_rank_buffer
from utils import Worker
from workload import Workload

import deep_ep
import deep_ep_cpp
from deep_ep import _env, _high_throughput, _session, _streams

FAR_AWAY_S = 20.0  # an error that comes by itself comes long before
WORK_SEED = 3


def small_work(num_ranks: int) -> Workload:
    return Workload((4, ) * num_ranks, hidden=64, seed=WORK_SEED)


def mapped_regions() -> list[str]:
    """Shared memory of this library that this process maps."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "deep_ep-" in line]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def captured_stderr() -> Iterator[Path]:
    """Everything that this process writes there, native threads too."""
    with tempfile.NamedTemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield Path(file.name)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + FAR_AWAY_S
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened: {what}"
        time.sleep(0.01)


def raising(error: BaseException) -> Callable[..., Any]:

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def failing_at_its_end(worker: Worker, error: BaseException) -> contextlib.AbstractContextManager[None]:
    """Synchronous calls made by way of Python fail when their kernels are launched already."""
    operation = _streams._DirectOperation if worker.device.type == "cuda" else _streams._HostOperation
    return replaced(operation, "finish", raising(error))


# Calls that are announced and not finished


def parted(worker: Worker, buffer: deep_ep.Buffer, message: str) -> str:
    """`message`, when every rank has its own and nobody uses the Buffer any more."""
    worker.barrier()
    buffer.destroy()
    return message


def unfinished_dispatch(worker: Worker, error: BaseException, failing: int, is_direct: bool) -> str:
    """The allocation of the rows fails on one rank (in a direct call the wait for counts), which goes on with its next
    batch: nobody gets rows of another."""
    buffer = worker.new_buffer(1 << 24)
    pending = PendingCall(worker, buffer, small_work(worker.num_ranks)).layout()
    worker.barrier()
    if worker.rank == failing:
        owner, name = (deep_ep_cpp.Buffer, "wait_counts") if is_direct else (_high_throughput.Dispatch, "_outputs")
        # Within the guess no outputs are made after the counts.
        buffer._session.lender = buffer._session.lender if is_direct else None
        buffer._session.direct = buffer._session.direct if is_direct else None
        with replaced(owner, name, raising(error)):
            failure_of(pending.start_dispatch, type(error))
        message = failure_of(pending.start_dispatch)
    elif is_direct:  # its rows were under way when the host failed, and the others may have theirs before they are told
        with contextlib.suppress(deep_ep.Error):
            pending.dispatch()
        until(lambda: buffer.runtime.failure != "", "the reason of the other rank")
        message = failure_of(pending.start_dispatch)
    else:
        message = failure_of(lambda: (pending.dispatch(), settle(worker, buffer)))
    assert failure_of(buffer.check) == message
    return parted(worker, buffer, message)


def interrupted_after_launch(worker: Worker, failing: int) -> str:
    """An exception as the call returns: its rows are lost, so it is no finished call either."""
    buffer = worker.new_buffer()
    pending = PendingCall(worker, buffer, small_work(worker.num_ranks)).layout().dispatch()
    worker.barrier()
    message = ""
    if worker.rank == failing:
        buffer._session.direct = None  # which closes by itself
        with failing_at_its_end(worker, KeyboardInterrupt()):
            failure_of(pending.combine, KeyboardInterrupt)
        message = failure_of(buffer.check)
    worker.barrier()
    if worker.rank != failing:
        until(lambda: buffer.runtime.failure != "", "the reason of the other rank")
        message = failure_of(pending.layout)
    return parted(worker, buffer, message)


def dropped_hook(worker: Worker, dropping: int) -> str:
    """A hook that nobody can call any more is an unfinished call."""
    buffer = worker.new_buffer(num_rdma_bytes=1 << 20, low_latency_mode=True)
    pending = LowLatencyPendingCall(worker, buffer, small_work(worker.num_ranks), Manner(mode="hook")).start_dispatch()
    if worker.rank == dropping:
        worker.barrier()
        pending.received = None
        gc.collect()
    else:
        pending.finish_dispatch()
        worker.barrier()
        until(lambda: buffer.runtime.failure != "", "the reason of the other rank")
    message = failure_of(buffer.check)
    return parted(worker, buffer, message)


# Refusals and bad input


def bad_expert_stops_peers(worker: Worker, failing: int) -> str:
    """The peers wait for counts when one rank finds the bad id, and stop at once."""
    buffer = worker.new_buffer()
    pending = PendingCall(worker, buffer, small_work(worker.num_ranks)).layout()
    worker.barrier()
    if worker.rank == failing:
        topk_idx = torch.full((4, 2), 1000, dtype=torch.int64).to(worker.device)
        message = failure_of(lambda: (buffer.get_dispatch_layout(topk_idx, worker.num_ranks), settle(worker, buffer)),
                             ValueError)
    else:
        message = failure_of(lambda: (pending.dispatch(), settle(worker, buffer)))
    return parted(worker, buffer, message)


def refused_call(worker: Worker, refusing: int, is_made_good: bool) -> Optional[str]:
    """A bad argument is the business of its rank alone, until a peer has waited in vain."""
    buffer = impatient_buffer(worker)
    pending = PendingCall(worker, buffer, small_work(worker.num_ranks)).layout()
    message = None
    if worker.rank == refusing:
        failure_of(lambda: buffer.dispatch("no tensor", **pending.layout_tensors), TypeError)
        buffer.check()
    if is_made_good:
        pending.dispatch().combine()
        buffer.check()
    elif worker.rank != refusing:
        message = failure_of(pending.dispatch, deep_ep.TimeoutError)
    return parted(worker, buffer, message)


# Ctrl-C


def interrupt_soon(delay_s: float = 0.3) -> list[float]:
    # A runner in the background of a shell has Ctrl-C ignored, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[float] = []

    def send() -> None:
        time.sleep(delay_s)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    return sent


def interrupted_wait(worker: Worker, waiting: int, where: str) -> str:
    """Ctrl-C while a call of one rank waits for the others, which come later and hear of it."""
    buffer = worker.new_buffer()
    pending = PendingCall(worker, buffer, small_work(worker.num_ranks)).layout()
    if where != "dispatch":
        pending.dispatch()
    worker.barrier()
    message = ""
    if worker.rank == waiting:
        sent = interrupt_soon()
        try:
            getattr(pending, where)()
        except KeyboardInterrupt:
            took_s = time.monotonic() - sent[0]
        else:
            raise AssertionError("a result")
        assert took_s < 2, f"heard after {took_s:.1f} s"
        message = failure_of(buffer.check)
    worker.barrier()
    if worker.rank != waiting:
        message = failure_of(lambda: (getattr(pending, where)(), settle(worker, buffer)))
    return parted(worker, buffer, message)


# Peers that go


def gone_peer(worker: Worker, victim: int) -> tuple[int, float]:
    """How many regions remain mapped after destroy() and three more Buffers, and how long destroy() took."""
    gc.collect()
    single_rank_buffer().destroy()  # what the cases before have dropped is released when the next one is built
    before = len(mapped_regions())
    buffer = worker.new_buffer()
    PendingCall(worker, buffer, small_work(worker.num_ranks)).whole_trip()
    worker.barrier()
    if worker.rank == victim:
        os._exit(0)
    started = time.monotonic()
    buffer.destroy()
    took_s = time.monotonic() - started
    for _ in range(3):
        single_rank_buffer().destroy()
    return len(mapped_regions()) - before, took_s


def gone_peer_is_named(worker: Worker, victim: int) -> str:
    buffer = impatient_buffer(worker)
    pending = PendingCall(worker, buffer, small_work(worker.num_ranks)).layout()
    if worker.rank == victim:
        os._exit(0)
    message = failure_of(pending.dispatch, deep_ep.TimeoutError)
    buffer.destroy()
    return message


# The watcher


def watched_without_calls(worker: Worker, failing: int) -> tuple[str, str, list[str]]:
    """One rank fails; the others make no call. Returns stderr, and the sentences of check() and on_failure."""
    reported: list[str] = []
    with captured_stderr() as written:
        buffer = worker.new_buffer(on_failure=reported.append)
        pending = PendingCall(worker, buffer, small_work(worker.num_ranks)).layout().dispatch()
        worker.barrier()
        if worker.rank == failing:
            buffer._session.direct = None  # which closes by itself
            with failing_at_its_end(worker, MemoryError("simulated")):
                failure_of(pending.combine, MemoryError)
        else:
            until(lambda: "DeepEP" in written.read_text(), "a word on stderr")
            assert not reported, "on_failure was not called from a call of ours"
        worker.barrier()
        message = failure_of(buffer.check)
        failure_of(buffer.check)
        worker.barrier()
        buffer.destroy()
        return written.read_text(), message, reported


def watched_kernel(worker: Worker, absent: int) -> tuple[str, str]:
    """A kernel that nobody waits for gives up: stderr says so before any call, and check() raises it."""
    with captured_stderr() as written:
        buffer = impatient_buffer(worker)
        pending = PendingCall(worker, buffer, small_work(worker.num_ranks), How(is_async=True)).layout().dispatch()
        worker.barrier()
        message = ""
        if worker.rank != absent:
            event = buffer.combine(pending.result[0], pending.handle, async_finish=True)[2]
            until(lambda: "DeepEP" in written.read_text(), "a word on stderr")
            message = failure_of(buffer.check)
            del event
        worker.barrier()
        buffer.destroy()
        return written.read_text(), message


# Construction


def failing_alone(worker: Worker, failing: int, where: str) -> str:
    """Whatever fails on one rank while it builds is an exception on all of them, and names the rank."""
    trouble = OSError("simulated trouble")
    places: dict[str, tuple[Any, str]] = {
        "environment": (deep_ep_cpp, "get_environment"),
        "lend_bytes": (_env, "lend_bytes"),
        "qp_depth": (_env, "nvshmem_qp_depth"),
        "capture": (_session, "is_capturing"),
        "streams": (_streams, "open_streams"),
        "cost_model": (_session, "find_cost_model"),
        "session": (_session, "Session"),
    }
    is_failing = worker.rank == failing
    context = replaced(*places[where], raising(trouble)) if is_failing else contextlib.nullcontext()
    return failing_construction(worker, (deep_ep.Error, OSError),
                                context,
                                num_rdma_bytes=1 << 12,
                                low_latency_mode=True)


def different_nodes(worker: Worker, odd: int) -> str:
    """A rank that takes the group for several nodes must not be the only one to stop."""
    environment = deep_ep_cpp.get_environment()
    with contextlib.ExitStack() as stack:
        if worker.rank == odd:
            changed = {**environment, "ranks_per_node": 1}
            stack.enter_context(replaced(deep_ep_cpp, "get_environment", lambda: changed))
        return failure_of(worker.new_buffer, ValueError)


# Graphs


def replayed_graph(worker: Worker, absent: int, operation: str) -> dict[str, Any]:
    """A loop that only replays: a peer stalls beyond the timeout, five more replays, and only then does anybody ask."""
    with captured_stderr() as written:
        buffer = worker.new_buffer(num_rdma_bytes=1 << 20, low_latency_mode=True, timeout_s=SHORT_TIMEOUT_S)
        x = torch.full((4, 64), float(worker.rank + 1), dtype=torch.bfloat16, device=worker.device)
        topk_idx = (torch.arange(8, device=worker.device) % worker.num_ranks).view(4, 2)
        layout = buffer.get_dispatch_layout(topk_idx, worker.num_ranks)
        weights = torch.ones((4, 2), device=worker.device)
        num_rows = 4 * worker.num_ranks

        def call() -> Any:
            if operation == "low_latency_dispatch":
                return buffer.low_latency_dispatch(x, topk_idx, 4, worker.num_ranks, use_fp8=False)
            return buffer.dispatch(x,
                                   **dispatch_arguments(layout),
                                   topk_idx=topk_idx,
                                   topk_weights=weights,
                                   num_worst_tokens=num_rows)

        call()
        torch.cuda.synchronize()
        worker.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        graph.replay()
        torch.cuda.synchronize()
        buffer.check()
        worker.barrier()
        found: dict[str, Any] = {}
        if worker.rank != absent:
            graph.replay()  # which nobody joins
            torch.cuda.synchronize()
            until(lambda: "DeepEP" in written.read_text(), "a word on stderr")
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
            found["message"] = failure_of(buffer.check)
            found["written"] = written.read_text()
            if operation == "dispatch":
                found["rows"], found["topk_idx"] = result[0].cpu(), result[1].cpu()
        worker.barrier()
        buffer.destroy()
        return found
