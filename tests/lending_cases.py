"""What the worker processes do in tests/test_lending.py. Every function runs on all ranks of a group."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional

import torch
from compare import same_bits
from failure_cases import failure_of
from pending_call import How, PendingCall
from utils import Worker
from workload import Workload

from deep_ep import Buffer, Config, Error

LEND_BYTES = 1 << 22
MIB = 1 << 20
HIDDEN = 7168  # of the models that frameworks build Buffers for


def lent_region(buffer: Any, num_bytes: int = LEND_BYTES) -> range:
    """The addresses that a Buffer lends, from one that has lent nothing yet: it lends them all at once."""
    begin = buffer.lend((num_bytes, ), torch.uint8).data_ptr()
    return range(begin, begin + num_bytes)


def outputs_are_lent(worker: Worker, work: Workload, how: How) -> list[bool]:
    """Of a fresh dispatch that is right: which outputs lie in lent memory, the handle's indices included."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        region = lent_region(buffer)
        pending = PendingCall(worker, buffer, work, how).layout().dispatch()
        x, topk_idx, topk_weights = pending.result[:3]
        rows = list(x) if isinstance(x, tuple) else [x]
        found = [tensor.data_ptr() in region for tensor in (*rows, topk_idx, topk_weights, pending.recv_src_idx)]
        pending.combine()
        return found


def freed_rows_are_lent_again(worker: Worker, work: Workload) -> None:
    """Far more dispatches than there is room for, each dropped before the next: all of them are lent."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        region = lent_region(buffer)
        for _ in range(20):
            pending = PendingCall(worker, buffer, work, How(lends=True)).layout().dispatch()
            assert pending.result[0].data_ptr() in region
            pending.combine()
            del pending
            gc.collect()


def no_room_is_no_error(worker: Worker, work: Workload) -> list[bool]:
    """Dispatches whose rows are all kept: the first are lent, the others are not, and every one is right."""
    with worker.new_buffer(num_lend_bytes=MIB) as buffer:
        region = lent_region(buffer, MIB)
        pending_calls = [PendingCall(worker, buffer, work).layout().dispatch() for _ in range(6)]
        found = [pending.result[0].data_ptr() in region for pending in pending_calls]
        for pending in reversed(pending_calls):
            pending.check_payload(pending.result[0])
            pending.combine()
        return found


def rows_outlive_the_buffer(worker: Worker, work: Workload) -> None:
    buffer = worker.new_buffer(num_lend_bytes=LEND_BYTES)
    region = lent_region(buffer)
    pending = PendingCall(worker, buffer, work).layout().dispatch()
    assert pending.result[0].data_ptr() in region
    worker.barrier()
    buffer.destroy()
    pending.check_payload(pending.result[0])
    pending.result[0].zero_()
    del pending
    gc.collect()


def views_hold_the_memory(worker: Worker, work: Workload) -> None:
    """A view of one row keeps the bytes from being lent again."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        pending = PendingCall(worker, buffer, work).layout().dispatch()
        row = pending.result[0][3:4]
        want = row.cpu()
        pending.result = None
        gc.collect()
        for _ in range(8):
            PendingCall(worker, buffer, work.next(), How(lends=True)).whole_trip()
        same_bits("a row that somebody holds", row.cpu(), want)


def part_of_a_lent_tensor(worker: Worker, work: Workload) -> None:
    """combine reads a slice of what was lent."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        pending = PendingCall(worker, buffer, work).layout().dispatch()
        rows = pending.recv_src_idx.shape[0]
        lent = buffer.lend((rows + 7, work.hidden))
        lent.fill_(float("nan"))
        pending.combine_input = lambda given: lent[5:5 + rows].copy_(given)  # type: ignore[method-assign]
        pending.combine(1)


def is_lent(buffer: Any, tensor: torch.Tensor) -> bool:
    """By a Buffer that lends a part of num_nvl_bytes."""
    begin = buffer.runtime.data_ptr
    return begin <= tensor.data_ptr() < begin + buffer.num_nvl_bytes


@contextmanager
def dispatches_watched() -> Iterator[list[tuple[str, bool]]]:
    """Of every dispatch with rows: what kind it was, and whether all it returned is lent."""
    found: list[tuple[str, bool]] = []
    original = Buffer.dispatch

    def dispatch(self: Buffer, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        rows, topk_idx, topk_weights, _, handle, _ = result
        outputs = [*(rows if isinstance(rows, tuple) else [rows]), topk_idx, topk_weights]
        if handle is not None:
            outputs.append(handle[3])
        kind = "cached" if handle is None else "fresh"
        if outputs[0].shape[0]:
            found.append((kind, all(is_lent(self, output) for output in outputs if output is not None)))
        return result

    Buffer.dispatch = dispatch  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Buffer.dispatch = original  # type: ignore[method-assign]


def client_gets_lent(worker: Worker, client: Callable[[Worker], None]) -> set[tuple[str, bool]]:
    """Nothing in the client's calls speaks of lending."""
    with dispatches_watched() as found:
        client(worker)
    return set(found)


def hinted_bytes(num_ranks: int, *configs: Config) -> int:
    return max(config.get_nvl_buffer_size_hint(HIDDEN * 2, num_ranks) for config in configs)


def default_builds(num_ranks: int) -> dict[str, tuple[int, Optional[Config]]]:
    """num_nvl_bytes and the config of calls, as frameworks have them."""
    defaults = Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)
    explicit = Config(num_sms=24,
                      num_max_nvl_chunked_send_tokens=16,
                      num_max_nvl_chunked_recv_tokens=512,
                      num_max_rdma_chunked_send_tokens=6,
                      num_max_rdma_chunked_recv_tokens=128)
    return {
        "vllm": (1 << 30, defaults[0]),
        "sglang": (hinted_bytes(num_ranks, *defaults), None),
        "sglang --deepep-config": (hinted_bytes(num_ranks, explicit), explicit),
        "megatron": (hinted_bytes(num_ranks, *defaults), None),
        "lmdeploy": (hinted_bytes(num_ranks, *defaults), None),
        "lightllm": (int(1e9), None),
        "rtp-llm": (int(2e9), None),
    }


def builds_lend(worker: Worker, work: Workload) -> dict[str, bool]:
    """Whether the rows of a dispatch come into lent memory, for Buffers of real sizes; the results are right."""
    found = {}
    for name, (num_bytes, config) in default_builds(worker.num_ranks).items():
        with Buffer(worker.group, num_bytes, 0) as buffer:
            pending = PendingCall(worker, buffer, work).layout()
            pending.config = config
            pending.dispatch().combine()
            found[name] = is_lent(buffer, pending.result[0])
            worker.barrier()
    return found


class NativeCalls:
    """The native Buffer, which notes how a dispatch is made."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def notify_dispatch(self, args: Any, stream: int) -> None:
        self.made.append("counts")
        self._runtime.notify_dispatch(args, stream)

    def dispatch(self, args: Any, num_sms: int, stream: int) -> None:
        self.made.append("guess" if args.expert_alignment > 0 else "rows")
        self._runtime.dispatch(args, num_sms, stream)


def guesses(worker: Worker, num_tokens: list[tuple[int, int]], how: How, leaves_room: bool = True) -> list[str]:
    """How fresh dispatches of changing sizes are made; all of them are right, as they are when made in one step."""
    with worker.new_buffer(1 << 24) as buffer:
        for i, tokens in enumerate(num_tokens):
            PendingCall(worker, buffer, Workload(tokens, seed=i), how).layout().dispatch().combine()
        buffer._session.direct = None  # where the native Buffer is called by Python
        buffer._session.lender._last = None
        native = buffer._session.runtime
        calls = buffer._session.runtime = NativeCalls(native)
        held = None if leaves_room else buffer.lend((buffer.num_lend_bytes - 4096, ), torch.uint8)
        for i, tokens in enumerate(num_tokens):
            pending = PendingCall(worker, buffer, Workload(tokens, seed=i), how).layout().dispatch()
            calls.made.append("|")
            pending.combine()
            del pending
        del held
        worker.barrier()
        buffer._session.runtime = native
        return "".join(call[0] for call in calls.made).split("|")[:-1]


def rows_kept(worker: Worker, work: Workload) -> None:
    """A received tensor keeps its own rows alive, and not those that there was room for."""
    with worker.new_buffer(1 << 24) as buffer:
        for _ in range(2):
            pending = PendingCall(worker, buffer, work).layout().dispatch()
            rows, row_bytes = pending.result[0].shape[0], pending.result[0].shape[1] * 2
            num_bytes = rows * (row_bytes + 12 * work.num_topk + 4)
            free = buffer.num_lend_bytes - num_bytes * 5 // 4
            assert buffer.lend((free, ), torch.uint8).shape[0] == free
            del pending
            gc.collect()
        worker.barrier()


def outputs_are_kept_one_by_one(worker: Worker, work: Workload) -> None:
    """Weights that somebody keeps do not keep the rows."""
    with worker.new_buffer(1 << 24) as buffer:
        pending = PendingCall(worker, buffer, work).layout().dispatch()
        rows, _, weights, _, handle, _ = pending.result
        row_bytes = rows.numel() * rows.element_size()
        del rows
        pending.result = None
        gc.collect()
        free = buffer.num_lend_bytes - 2 * MIB
        assert row_bytes > 4 * MIB
        assert buffer.lend((free, ), torch.uint8).shape[0] == free
        assert is_lent(buffer, weights)
        assert is_lent(buffer, handle[3])
        worker.barrier()


def lending_can_be_turned_off(worker: Worker, work: Workload) -> list[bool]:
    with worker.new_buffer(1 << 26, num_lend_bytes=0) as silent, worker.new_buffer(1 << 26) as lending:
        found = []
        for buffer in (silent, lending):
            pending = PendingCall(worker, buffer, work).layout().dispatch()
            pending.combine()
            found += [is_lent(buffer, pending.result[0]), buffer.num_lend_bytes > 0]
        worker.barrier()
        return found


def several_buffers(worker: Worker, work: Workload) -> None:
    """Rows of one Buffer stay what they are whatever another does; each is right after the other is gone."""
    first, second = worker.new_buffer(1 << 25), worker.new_buffer(1 << 26)
    pending = PendingCall(worker, first, work).layout().dispatch()
    for _ in range(3):
        PendingCall(worker, second, work.next()).whole_trip()
    pending.check_payload(pending.result[0])
    worker.barrier()
    second.destroy()
    pending.combine()
    other = PendingCall(worker, first, work.next()).layout().dispatch()
    worker.barrier()
    first.destroy()
    for kept in (pending, other):
        kept.check_payload(kept.result[0])


def dropped_by_another_thread(worker: Worker, work: Workload) -> None:
    """While calls go on: every result is right, and the memory comes back."""
    with worker.new_buffer(1 << 24) as buffer:
        dropped: list[Any] = []
        has_more, is_over = threading.Event(), threading.Event()

        def drop() -> None:
            while not is_over.is_set():
                has_more.wait(1)
                has_more.clear()
                dropped.clear()

        thread = threading.Thread(target=drop)
        thread.start()
        try:
            for i in range(30):
                pending = PendingCall(worker, buffer, work.next() if i % 2 else work).layout().dispatch()
                assert is_lent(buffer, pending.result[0])
                pending.combine()
                dropped.append(pending.result)
                pending.result = None
                has_more.set()
        finally:
            is_over.set()
            has_more.set()
            thread.join()
        dropped.clear()
        gc.collect()
        held = buffer.lend((buffer.num_lend_bytes // 2, ), torch.uint8)
        assert held.shape[0] == buffer.num_lend_bytes // 2
        worker.barrier()


def captured_calls_lend(worker: Worker, work: Workload) -> None:
    """A graph has memory of its own: calls between its replays leave it alone, and it comes back with the graph."""
    with worker.new_buffer(1 << 26) as buffer:
        pending = PendingCall(worker, buffer, work, How(worst_factor=1)).layout()
        x, weights = pending.payload(), torch.rand(pending.topk_idx.shape, device=worker.device)
        num_rows = sum(work.num_tokens)

        def step() -> Any:
            received = buffer.dispatch(x, **pending.layout_tensors, topk_idx=pending.topk_idx, topk_weights=weights,
                                       num_worst_tokens=num_rows)  # yapf: disable
            return received, buffer.combine(received[0], received[4])[0]

        eager, eager_combined = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            received, combined = step()
        assert is_lent(buffer, eager[0])
        assert is_lent(buffer, received[0])
        rows = pending.arrival.x.shape[0]
        held = []
        for seed in range(4):
            between = PendingCall(worker, buffer, Workload(work.num_tokens, work.hidden, seed=seed)).layout().dispatch()
            held.append(between)
            received[0].fill_(7)
            combined.zero_()
            graph.replay()
            torch.cuda.synchronize()
            same_bits("recv_x", received[0][:rows], pending.arrival.x)
            same_bits("combined", combined, eager_combined.cpu())
            for kept in held:
                kept.check_payload(kept.result[0])
        worker.barrier()
        lent = [buffer.lend((buffer.num_lend_bytes // 3, ), torch.uint8).fill_(9) for _ in range(2)]
        graph.replay()
        torch.cuda.synchronize()
        assert all((tensor == 9).all() for tensor in lent)
        worker.barrier()
        del lent, held, between, kept, eager, received, combined, graph
        pending.result = None
        gc.collect()
        torch.cuda.synchronize()
        for _ in range(200):  # the driver gives the graph up on a thread of its own
            try:
                assert buffer.lend((buffer.num_lend_bytes, ), torch.uint8) is not None
                break
            except Error:
                time.sleep(0.05)
        else:
            raise AssertionError("the memory of the graph does not come back")
        worker.barrier()


def lend_errors(worker: Worker) -> list[str]:
    with worker.new_buffer(num_lend_bytes=MIB) as buffer, worker.new_buffer(num_lend_bytes=0) as other:
        held = buffer.lend((1000, ), torch.float32)
        assert held.shape == (1000, )
        assert held.dtype == torch.float32
        return [
            failure_of(lambda: buffer.lend((MIB + 1, ), torch.uint8)),
            failure_of(lambda: buffer.lend((-1, 8)), ValueError),
            failure_of(lambda: buffer.lend((2.5, 8)), TypeError),
            failure_of(lambda: other.lend((4, 8))),
            failure_of(lambda: worker.new_buffer(num_lend_bytes=100), ValueError),
        ]


def sums_are_lent(worker: Worker, work: Workload, how: How) -> dict[str, bool]:
    """Which outputs of combine lie in lent memory; every one is right."""
    cases = {"plain": (0, False), "with a bias": (1, False), "of lent rows": (0, True)}
    found = []
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        region = lent_region(buffer)
        original = buffer.combine

        def combine(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            found.append(result[0].data_ptr() in region)
            return result

        buffer.combine = combine
        for num_biases, lends in cases.values():
            calls = replace(how, lends=lends, num_sms=14)
            PendingCall(worker, buffer, work, calls).layout().dispatch().combine(num_biases)
            gc.collect()
            work = work.next()
    return dict(zip(cases, found))
