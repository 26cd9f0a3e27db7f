"""What the worker processes do in tests/test_intranode.py. Every function runs on all ranks of a group."""

import functools
import itertools
import time
from typing import Any, Optional

import torch
import torch.distributed as dist
from compare import bits, equal, poisoned, same_bits
from failure_cases import failure_of
from pending_call import How, PendingCall, dispatch_arguments, expected
from utils import Worker, wait_as_clients_do
from workload import Workload

from deep_ep import Buffer, Config


def whole_trip(worker: Worker,
               work: Workload,
               how: Optional[How] = None,
               num_biases: int = 0,
               num_nvl_bytes: int = 1 << 22) -> None:
    PendingCall(worker, worker.buffer(num_nvl_bytes), work, how).whole_trip(num_biases)


def trips(worker: Worker, works: list[Workload], how: Optional[How] = None) -> None:
    for work in works:
        PendingCall(worker, worker.buffer(), work, how).whole_trip()


def scaled_trip(worker: Worker, work: Workload, how: Optional[How] = None) -> None:
    """Payload with scales, fresh and cached."""
    pending = PendingCall(worker, worker.buffer(), work, how).layout().dispatch()
    pending.cached_dispatch(work.next())


def one_byte_trip(worker: Worker, works: list[Workload]) -> None:
    for work in works:
        scaled_trip(worker, work)


def reused_handle(worker: Worker, work: Workload) -> None:
    """A handle serves combine, cached dispatch and a second combine, also after other dispatches."""
    pending = PendingCall(worker, worker.buffer(), work).layout().dispatch()
    pending.combine()
    PendingCall(worker, worker.buffer(), work.next()).whole_trip()
    pending.cached_dispatch(work.next()).combine(2)
    pending.cached_dispatch()


def cached_after_worst_case(worker: Worker, work: Workload) -> None:
    pending = PendingCall(worker, worker.buffer(), work, How(worst_factor=2)).layout().dispatch()
    pending.cached_dispatch(work.next()).combine()


def two_in_flight(worker: Worker, work: Workload, is_async: bool) -> None:
    """dispatch, dispatch, then both combines, in either order (pitfalls 10, 12)."""
    for flip in (False, True):
        how = How(is_async=is_async)
        pair = [PendingCall(worker, worker.buffer(), work, how).layout()]
        pair.append(PendingCall(worker, worker.buffer(), work.next().next(), how).layout())
        for pending in pair:
            pending.start_dispatch()
        for pending in pair:
            pending.finish_dispatch()
        for pending in reversed(pair) if flip else pair:
            pending.combine()


def two_buffers(worker: Worker, work: Workload) -> None:
    """Interleaved calls on two Buffers of the same group, and one destroyed while the other goes on."""
    first, second = worker.new_buffer(), worker.new_buffer(1 << 21)
    one, two = PendingCall(worker, first, work).layout(), PendingCall(worker, second, work.next()).layout()
    one.dispatch()
    two.dispatch()
    one.combine()
    second.destroy()
    one.cached_dispatch().combine()
    first.destroy()


def bitwise_repeats(worker: Worker, work: Workload, rounds: int) -> None:
    """The same call gives the same bits, whatever the timing (and the stragglers) of a round."""
    buffer, results = worker.buffer(), []
    for i in range(rounds):
        if worker.rank == i % worker.num_ranks:
            time.sleep(0.01)
        pending = PendingCall(worker, buffer, work, How(num_sms=2 + 2 * (i % 3))).layout().dispatch()
        combined, _, _ = buffer.combine(pending.result[0], pending.handle)
        results.append([bits(pending.result[0].cpu()), bits(combined.cpu())])
    for result in results[1:]:
        for got, want in zip(result, results[0]):
            same_bits("a repeated call", got, want)


def freed_inputs(worker: Worker, work: Workload) -> None:
    """Inputs that nobody holds after an asynchronous call, their memory wanted by others (pitfall 28)."""
    buffer = worker.buffer()
    for on_comm_stream in (False, True):
        how = How(is_async=True, on_comm_stream=on_comm_stream)
        pending = PendingCall(worker, buffer, work, how).layout().start_dispatch()
        del pending.layout_tensors, pending.topk_idx
        garbage = [
            torch.full(pending.mine.x.shape, float("nan"), dtype=torch.bfloat16, device=worker.device) for _ in range(8)
        ]
        pending.finish_dispatch().combine()
        del garbage


def dropped_event(worker: Worker, work: Workload) -> None:
    """Results of an asynchronous call that are dropped at once, event included."""
    for _ in range(3):
        pending = PendingCall(worker, worker.buffer(), work, How(is_async=True)).layout().start_dispatch()
        del pending
    PendingCall(worker, worker.buffer(), work).whole_trip()


def chained_events(worker: Worker, work: Workload) -> None:
    """Layout, dispatch and combine all asynchronous, each ordered behind the one before by its event alone."""
    buffer = worker.buffer()
    pending = PendingCall(worker, buffer, work)
    topk_idx, x = pending.mine.topk_idx.to(worker.device), pending.mine.x.to(worker.device)
    weights = pending.mine.topk_weights
    assert weights is not None
    weights = weights.to(worker.device)
    options: dict[str, Any] = {"async_finish": True, "allocate_on_comm_stream": True}
    counted = buffer.get_dispatch_layout(topk_idx, work.num_experts, previous_event=buffer.capture(), **options)
    recv_x, _, recv_weights, _, handle, event = buffer.dispatch(x,
                                                                **dispatch_arguments(counted),
                                                                topk_idx=topk_idx,
                                                                topk_weights=weights,
                                                                previous_event=counted[4],
                                                                **options)
    combined, combined_weights, event = buffer.combine(recv_x, handle, recv_weights, previous_event=event, **options)
    with event:
        pass
    same_bits("recv_x", recv_x, pending.arrival.x)
    same_bits("combined_x", combined + 0.0, pending.sum_of_copies() + 0.0)
    # A weight comes back from each rank that owns the expert: exactly one.
    same_bits("combined weights", combined_weights, torch.where(topk_idx >= 0, weights, 0 * weights).cpu())


def late_rank(worker: Worker, work: Workload, late: int) -> None:
    """Everybody waits for a late rank, at each step (pitfall 34)."""
    pending = PendingCall(worker, worker.buffer(), work)
    for step in (pending.layout, pending.dispatch, pending.combine, pending.cached_dispatch):
        if worker.rank == late:
            time.sleep(0.15)
        step()


def empty_subsets(worker: Worker, work: Workload) -> None:
    """Every subset of the ranks without tokens (pitfall 23)."""
    for subset in itertools.product((False, True), repeat=worker.num_ranks):
        tokens = tuple(0 if is_empty else count for is_empty, count in zip(subset, work.num_tokens))
        PendingCall(worker, worker.buffer(), Workload(tokens, hidden=work.hidden, seed=work.seed)).whole_trip(1)


def many_shapes(worker: Worker, rounds: int, seed: int, num_nvl_bytes: int) -> None:
    """Back-to-back calls whose shapes, modes and routing change each time."""
    random = torch.Generator().manual_seed(seed)

    def choose(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1, ), generator=random))]

    for i in range(rounds):
        tokens = tuple(choose(0, 1, 2, 7, 19, 40) for _ in range(worker.num_ranks))
        work = Workload(tokens,
                        hidden=choose(8, 64, 264, 512, 1032),
                        num_topk=choose(1, 2, 5, 8),
                        experts_per_rank=choose(1, 3, 8),
                        routing=choose("random", "holes", "duplicates", "one_rank", "spread"),
                        idx_dtype=choose(torch.int64, torch.int32),
                        seed=seed * 1000 + i)
        how = How(is_async=choose(False, True), worst_factor=choose(0, 0, 1), num_sms=choose(1, 2, 4))
        pending = PendingCall(worker, worker.buffer(num_nvl_bytes), work,
                              how).layout().dispatch().combine(choose(0, 1, 2))
        if choose(False, True):
            pending.cached_dispatch(work.next())


def tiny_window(worker: Worker, work: Workload, num_slots: int) -> None:
    """Far more tokens than the buffer has slots: every ring wraps (pitfalls 7, 20)."""
    row_bytes = work.hidden * 2
    # What a window of one slot needs: two banks, each source its slot, metadata included.
    slot = -(-(row_bytes + 4 + 8 * work.num_topk) // 128) * 128
    needed = 2 * (worker.num_ranks - 1) * slot * num_slots
    assert needed < Config().get_nvl_buffer_size_hint(row_bytes, worker.num_ranks), "not a tiny window"
    with worker.new_buffer(max(needed, 128)) as buffer:
        pending = PendingCall(worker, buffer, work).layout().dispatch().combine(1)
        pending.cached_dispatch(work.next()).combine()


def worst_case_tail(worker: Worker, work: Workload) -> None:
    """Unused rows are marked, in tensors that start with garbage, and the host never waits (pitfall 14)."""
    for factor in (1, 3):
        PendingCall(worker, worker.buffer(), work, How(worst_factor=factor)).whole_trip()
    # Less rows in the next call: nothing of the earlier one may show.
    PendingCall(worker, worker.buffer(), Workload((1, ) * worker.num_ranks, hidden=work.hidden, routing="holes",
                                                  seed=3), How(worst_factor=9)).whole_trip()


def sub_groups(worker: Worker, work: Workload) -> None:
    PendingCall(worker, worker.new_buffer(), work).whole_trip()


def raw_rows(worker: Worker, hidden: int, dtype_name: str) -> None:
    """Any dtype: dispatch moves bytes."""
    dtype = getattr(torch, dtype_name)
    work = Workload((5, ) * worker.num_ranks, hidden=hidden, dtype=dtype, is_bit_noise=True)
    PendingCall(worker, worker.buffer(), work, How(has_topk=False)).layout().dispatch()


def local_buffer_views(worker: Worker) -> None:
    """The whole RDMA region may be zeroed by callers; the high-throughput region is the size that was asked for."""
    with worker.new_buffer(1 << 16, num_rdma_bytes=1 << 12) as buffer:
        region = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
        equal("RDMA bytes", region.numel(), 1 << 12)
        assert not region.any()
        region.zero_()
        data = buffer.get_local_buffer_tensor(torch.bfloat16)
        equal("elements", data.numel(), (1 << 16) // 2)
        equal("device", data.device, worker.device)
        part = buffer.get_local_buffer_tensor(torch.int32, torch.Size((3, 5)), 64)
        equal("shape", list(part.shape), [3, 5])
        equal("address", part.data_ptr() - data.data_ptr(), 64)
        part.fill_(7)
        equal("seen through the other view", data.view(torch.int32)[16:31].tolist(), [7] * 15)
        for bad in ({"offset": 2}, {"offset": 1 << 17}, {"size": torch.Size((1 << 15, ))}):
            failure_of(functools.partial(buffer.get_local_buffer_tensor, torch.int32, **bad), ValueError)
        PendingCall(worker, buffer, Workload((4, ) * worker.num_ranks)).whole_trip()


def autograd_round_trip(worker: Worker, work: Workload) -> None:
    """dispatch and combine as a pair of autograd functions, the handle saved as tensors."""
    buffer = worker.buffer()
    pending = PendingCall(worker, buffer, work).layout()

    class Dispatch(torch.autograd.Function):

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> Any:
            recv_x, _, _, _, handle, event = buffer.dispatch(x, **pending.layout_tensors, async_finish=True)
            wait_as_clients_do(event)
            ctx.save_for_backward(*handle)
            return (recv_x, *handle)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
            return buffer.combine(grad.contiguous(), ctx.saved_tensors)[0]

    class Combine(torch.autograd.Function):

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, *handle: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*handle)
            return buffer.combine(x, handle)[0]

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return (buffer.dispatch(grad.contiguous(), handle=ctx.saved_tensors)[0], *[None] * len(ctx.saved_tensors))

    x = pending.mine.x.to(worker.device).requires_grad_()
    recv_x, *handle = Dispatch.apply(x)
    combined = Combine.apply(recv_x * 2, *handle)
    combined.backward(torch.ones_like(combined))
    # x -> copies -> doubled -> summed: each is multiplied by twice the number of ranks that the token went to.
    factor = 2 * pending.layout_tensors["is_token_in_rank"].sum(1, keepdim=True).cpu()
    same_bits("combined", combined + 0.0, pending.sum_of_copies(2) + 0.0)
    assert x.grad is not None
    same_bits("gradient", x.grad, factor.expand(x.shape).bfloat16())


def other_communicator(worker: Worker, work: Workload) -> None:
    """mpi4py's interface instead of a ProcessGroup."""

    class Comm:

        def Get_rank(self) -> int:
            return worker.rank

        def Get_size(self) -> int:
            return worker.num_ranks

        def allgather(self, item: Any) -> list[Any]:
            gathered: list[Any] = [None] * worker.num_ranks
            dist.all_gather_object(gathered, item, group=worker.group)
            return gathered

    buffer = Buffer(None, 1 << 20, comm=Comm())
    assert buffer.group is None
    equal("group_size", buffer.group_size, worker.num_ranks)
    PendingCall(worker, buffer, work).whole_trip()
    del buffer


def graph_replays(worker: Worker, work: Workload) -> None:
    """layout, worst-case dispatch and combine captured once, replayed with other numbers."""
    buffer = worker.buffer()
    pending = PendingCall(worker, buffer, work, How(worst_factor=1)).layout()
    x, topk_idx = pending.payload(), pending.topk_idx
    weights = torch.zeros(topk_idx.shape, device=worker.device)

    def step() -> Any:
        received = buffer.dispatch(x,
                                   **dispatch_arguments(buffer.get_dispatch_layout(topk_idx, work.num_experts)),
                                   topk_idx=topk_idx,
                                   topk_weights=weights,
                                   num_worst_tokens=sum(work.num_tokens))
        return received, buffer.combine(received[0], received[4])[0]

    step()
    gone = worker.new_buffer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        received, combined = step()
        gone.destroy()  # of no concern to the capture
        for refused in (worker.new_buffer, lambda: buffer.dispatch(x, **pending.layout_tensors)):
            message = failure_of(refused)
            assert "graph" in message, message
    for seed in range(3):
        now = Workload(work.num_tokens, work.hidden, work.num_topk, work.experts_per_rank, seed=100 + seed)
        sent, arrivals = expected(now, 1)
        x.copy_(sent[worker.rank].x)
        topk_idx.copy_(sent[worker.rank].topk_idx)
        graph.replay()
        torch.cuda.synchronize()
        rows = arrivals[worker.rank].x.shape[0]
        same_bits("recv_x", received[0][:rows], arrivals[worker.rank].x)
        assert (received[1][rows:] == -1).all()
        same_bits("combined", combined + 0.0, PendingCall(worker, buffer, now).sum_of_copies() + 0.0)


def poisoned_alloc_order(worker: Worker, work: Workload) -> None:
    """torch fills fresh outputs on the allocating stream: the kernel must come after that (pitfall 27)."""
    buffer = worker.buffer()
    for on_comm_stream in (False, True):
        for is_async in (True, ) if on_comm_stream else (False, True):
            with poisoned():
                busy = torch.empty(1 << 20, device=worker.device)
                busy.add_(1)
            how = How(is_async=is_async, on_comm_stream=on_comm_stream, has_previous=True)
            PendingCall(worker, buffer, work, how).whole_trip(2)
