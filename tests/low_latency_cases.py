"""What the worker processes do in tests/test_low_latency.py. Every function runs on all ranks of a group."""

import os
import time
from dataclasses import replace
from typing import Any, Optional

import torch
import torch.distributed as dist
from compare import bits, equal, same_bits
from failure_cases import SHORT_TIMEOUT_S, failure_of, settle
from low_latency_pending_call import (
    BF16,
    CASTS,
    FP8,
    LowLatencyPendingCall,
    Manner,
    answers_of,
    finish_together,
    low_latency_buffer,
)
from pending_call import PendingCall
from reference import Cast, low_latency_parts
from utils import Worker, device
from workload import Workload

import deep_ep
from deep_ep import Buffer

MODES = ("sync", "async", "hook")


def whole_trip(worker: Worker, work: Workload, manner: Optional[Manner] = None, num_rdma_bytes: int = 1 << 22) -> None:
    LowLatencyPendingCall(worker, low_latency_buffer(worker, num_rdma_bytes), work, manner).whole_trip()


def trips(worker: Worker,
          works: list[Workload],
          manner: Optional[Manner] = None,
          num_rdma_bytes: int = 1 << 22) -> None:
    for work in works:
        whole_trip(worker, work, manner, num_rdma_bytes)


def every_manner(worker: Worker, work: Workload) -> None:
    for cast in CASTS:
        for mode in MODES:
            whole_trip(worker, work, Manner(cast, mode, has_stats=True, has_out=mode == "hook"))


def two_micro_batches(worker: Worker, work: Workload, cast: Cast) -> None:
    """Two calls open at a time, received in either order; a third is refused."""
    manner = Manner(cast, "hook")
    buffer = low_latency_buffer(worker)
    for flip in (False, True, False):
        pair = [LowLatencyPendingCall(worker, buffer, w, manner) for w in (work, work.next().next())]
        order = list(reversed(pair)) if flip else pair
        for pending in pair:
            pending.start_dispatch()
        message = failure_of(pair[0].start_dispatch)
        assert "at most 2" in message, message
        finish_together(pair, order)


def overlapped_layers(worker: Worker, work: Workload) -> None:
    """As engines do it: while one micro-batch computes, the other one's rows are on their way."""
    buffer, manner = low_latency_buffer(worker), Manner(FP8, "hook")
    one, two = (LowLatencyPendingCall(worker, buffer, w, manner) for w in (work, work.next()))
    one.start_dispatch().finish_dispatch()
    for _ in range(3):
        two.start_dispatch()
        one.start_combine()
        two.finish_dispatch()
        one.finish_combine()
        one.start_dispatch()
        two.start_combine()
        one.finish_dispatch()
        two.finish_combine()
    one.combine()


def held_back_hook(worker: Worker, work: Workload) -> None:
    """A hook that is never called in time blocks its bank: the call after the next is refused, nothing hangs."""
    buffer = low_latency_buffer(worker)
    held = LowLatencyPendingCall(worker, buffer, work, Manner(mode="hook")).start_dispatch()
    passing = LowLatencyPendingCall(worker, buffer, work.next()).dispatch()
    message = failure_of(passing.start_combine)
    assert "call the hook" in message, message
    held.finish_dispatch()
    held.received[4]()  # a second time: nothing happens
    passing.combine()
    held.combine()


def hooks_in_turn(worker: Worker, work: Workload, order: list[int]) -> None:
    """No rank calls its hook before the one ahead of it in `order` has received: nobody may need another's hook."""
    pending = LowLatencyPendingCall(worker, low_latency_buffer(worker), work, Manner(FP8, "hook")).start_dispatch()
    for turn in order:
        if worker.rank == turn:
            pending.finish_dispatch()
        worker.barrier()
    pending.combine()


def gone_after_its_last_call(worker: Worker, rounds: int) -> None:
    """All rows are for rank 1, from rank 2. The others wait for nothing, and go; also who holds the rows for it."""
    num_tokens, hidden, num_ranks = 64, 7168, len(worker.ranks)
    topk_idx = torch.ones((num_tokens if worker.rank == 2 else 0, 1), dtype=torch.int64, device=device())
    for value in range(1, rounds + 1):
        num_bytes = Buffer.get_low_latency_rdma_size_hint(num_tokens, hidden, num_ranks, num_ranks)
        buffer = worker.new_buffer(1 << 12, num_rdma_bytes=num_bytes, low_latency_mode=True)
        x = torch.full((len(topk_idx), hidden), value, dtype=torch.bfloat16, device=device())
        rows, count, *_ = buffer.low_latency_dispatch(x, topk_idx, num_tokens, num_ranks, use_fp8=False)
        assert count.tolist() == [num_tokens if worker.rank == 1 else 0]
        buffer.destroy()
        assert worker.rank != 1 or bool((rows[0, :num_tokens] == value).all())


def side_by_side(worker: Worker, work: Workload) -> None:
    """Several Buffers with different shapes, calls interleaved, one destroyed while the others go on."""
    shapes = ((work, 1 << 22), (Workload(work.num_tokens, 128, 2, 1, seed=5), 1 << 19), (work.next(), 1 << 21))
    pending_calls = []
    for w, num_bytes in shapes:
        buffer = worker.new_buffer(1 << 12, num_rdma_bytes=num_bytes, low_latency_mode=True)
        pending_calls.append(LowLatencyPendingCall(worker, buffer, w, Manner(mode="hook")))
    for pending in pending_calls:
        pending.start_dispatch()
    for pending in reversed(pending_calls):
        pending.finish_dispatch()
    worker.barrier()
    pending_calls[1].buffer.destroy()
    for pending in (pending_calls[0], pending_calls[2]):
        pending.combine()
    worker.barrier()
    for pending in pending_calls:
        pending.buffer.destroy()


def many_shapes(worker: Worker, rounds: int, seed: int) -> None:
    """Back-to-back calls on one Buffer whose shapes, formats, modes and routing change each time (pitfall 9)."""
    random = torch.Generator().manual_seed(seed)

    def choose(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1, ), generator=random))]

    for i in range(rounds):
        cast, max_tokens = choose(*CASTS), choose(1, 3, 16, 24)
        work = Workload(tuple(choose(0, 1, max_tokens // 2, max_tokens) for _ in range(worker.num_ranks)),
                        hidden=choose(8, 264, 520) if cast == BF16 else choose(512, 1536),
                        num_topk=choose(1, 2, 5, 8),
                        experts_per_rank=choose(1, 3, 8),
                        routing=choose("random", "holes", "duplicates", "one_rank", "spread"),
                        idx_dtype=choose(torch.int64, torch.int32),
                        seed=seed * 1000 + i)
        manner = Manner(cast, choose(*MODES), max_tokens, zero_copy=choose(False, False, True))
        manner = replace(manner, use_logfmt=not manner.zero_copy and choose(False, True))
        pending = LowLatencyPendingCall(worker, low_latency_buffer(worker), work, manner).dispatch()
        if choose(False, True):
            low_latency_buffer(worker).clean_low_latency_buffer(max_tokens, 128, work.num_experts)
        pending.combine()


def modes_in_turn(worker: Worker, work: Workload) -> None:
    """One Buffer for high throughput and low latency (contract 7, 2 and 12)."""
    buffer = low_latency_buffer(worker)
    for i in range(3):
        PendingCall(worker, buffer, work).whole_trip()
        buffer.clean_low_latency_buffer(max(work.num_tokens), work.hidden, work.num_experts)
        LowLatencyPendingCall(worker, buffer, work, Manner(mode=MODES[i])).whole_trip()
    pending = LowLatencyPendingCall(worker, buffer, work, Manner(mode="hook")).start_dispatch()
    PendingCall(worker, buffer, work.next()).whole_trip()
    pending.finish_dispatch().combine()


def zeroed_by_caller(worker: Worker, work: Workload) -> None:
    """vLLM zeroes the whole region between steps (contract 7, 11)."""
    buffer = low_latency_buffer(worker, 1 << 20)
    region = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
    equal("bytes of the region", region.numel(), 1 << 20)
    for _ in range(4):
        LowLatencyPendingCall(worker, buffer, work).whole_trip()
        if worker.device.type == "cuda":
            torch.cuda.synchronize()
        worker.barrier()
        region.zero_()
        if worker.device.type == "cuda":
            torch.cuda.synchronize()
        worker.barrier()


def bitwise_repeats(worker: Worker, work: Workload, cast: Cast, rounds: int) -> None:
    """The same call gives the same bits, whatever the timing of a round."""
    buffer, want = low_latency_buffer(worker, _bytes_for(work)), None
    for done in range(rounds):
        if worker.rank == done % worker.num_ranks and done % 8 == 0:
            time.sleep(0.01)
        pending = LowLatencyPendingCall(worker, buffer, work, Manner(cast, MODES[done % 3])).start_dispatch()
        pending = pending.finish_dispatch() if done == 0 else pending
        if done:
            pending.landed(*pending.received[3:])
        pending.start_combine()
        pending.landed(*pending.combined[1:])
        counts = [len(expert.rows) for expert in pending.arrivals[worker.rank]]
        recv_x = pending.received[0][0] if cast.use_fp8 else pending.received[0]
        got = [bits(recv_x[i, :count].cpu()) for i, count in enumerate(counts)] + [bits(pending.combined[0].cpu())]
        want = want or got
        for one, other in zip(got, want):
            same_bits("a repeated call", one, other)


def _bytes_for(work: Workload) -> int:
    return Buffer.get_low_latency_rdma_size_hint(max(1, *work.num_tokens), work.hidden, work.num_ranks,
                                                 work.num_experts)


def freed_inputs(worker: Worker, work: Workload) -> None:
    """Inputs and results that nobody holds, their memory wanted by others (pitfall 28)."""
    for mode in ("async", "hook"):
        pending = LowLatencyPendingCall(worker, low_latency_buffer(worker), work, Manner(FP8, mode)).start_dispatch()
        topk_idx = pending.topk_idx
        del pending.x, pending.topk_idx
        garbage = [torch.full(pending.mine.x.shape, float("nan"), device=worker.device).bfloat16() for _ in range(8)]
        pending.finish_dispatch()
        pending.topk_idx, pending.x = topk_idx, pending.mine.x.to(worker.device)
        pending.combine()
        del garbage
    for _ in range(2):
        received = LowLatencyPendingCall(worker, low_latency_buffer(worker), work, Manner(mode="hook")).start_dispatch()
        hook = received.received[4]
        del received
        hook()
    whole_trip(worker, work)


def overwritten_inputs(worker: Worker, work: Workload) -> None:
    """After a call with a hook its inputs belong to the caller again, who uses them for the next layer at once.

    But for combine's topk_idx and topk_weights on a GPU, which the hook reads again."""
    for cast in (BF16, FP8):
        for zero_copy in (False, True):
            pending = LowLatencyPendingCall(worker, low_latency_buffer(worker), work,
                                            Manner(cast, "hook", zero_copy=zero_copy))
            topk_idx = pending.topk_idx
            pending.x, pending.topk_idx, pending.topk_weights = (  # the pending compares with its own
                tensor.clone() for tensor in (pending.x, topk_idx, pending.topk_weights))
            pending.start_dispatch()
            pending.x.fill_(float("nan"))
            pending.topk_idx.fill_(-1)
            pending.finish_dispatch()
            pending.topk_idx.copy_(topk_idx)
            rows = pending.expert_rows()
            lent = pending.buffer.get_next_low_latency_combine_buffer(pending.handle) if zero_copy else rows
            pending.start_combine(rows)
            lent.fill_(float("nan"))
            if worker.device.type == "cpu":
                pending.topk_weights.fill_(float("nan"))
                pending.topk_idx.fill_(-1)
            pending.finish_combine()


def late_rank(worker: Worker, work: Workload, late: int) -> None:
    """Everybody waits for a late rank, and the statistics say for which."""
    buffer = low_latency_buffer(worker)
    pending = LowLatencyPendingCall(worker, buffer, work, Manner(has_stats=True))
    if worker.rank == late:
        time.sleep(0.3)
    pending.dispatch()
    if worker.rank != late and worker.device.type == "cpu":
        assert pending.waits is not None
        waits = pending.waits.tolist()
        equal("the rank that was waited for longest", waits.index(max(waits)), late)
        assert waits[late] > 100_000_000, waits  # nanoseconds; other ranks cannot be that late
    if worker.rank == late:
        time.sleep(0.1)
    pending.combine()


def weighted_sum_error(worker: Worker, work: Workload, use_logfmt: bool) -> float:
    """Where the parts are rounded on their way, the result stays within the bound that the documents state.

    Against the exact sum: half a unit in the last place (2**-8) of every part, and of the result; and float32 noise.
    With use_logfmt a part is off by half a step: 12 / 1018 of a channel's size, or 2**-13 of the group's largest.
    Returns the root mean square of the error, relative to that of the result.
    """
    manner = Manner(use_logfmt=use_logfmt)
    pending = LowLatencyPendingCall(worker, low_latency_buffer(worker), work, manner).dispatch().start_combine()
    pending.landed(*pending.combined[1:])
    parts = low_latency_parts(answers_of(work, pending.arrivals), pending.arrivals, pending.mine, worker.rank)
    unit, errors, results = 2.0**-8, 0.0, 0.0
    for token, of_ranks in enumerate(parts):
        if not of_ranks:
            assert not pending.combined[0][token].any()
            continue
        stacked = torch.stack(of_ranks).double()
        exact, size = stacked.sum(0), stacked.abs().sum(0)
        error = (pending.combined[0][token].cpu().double() - exact).abs()
        wire = unit * size
        if use_logfmt:
            largest = stacked.abs().reshape(len(of_ranks), -1, 128).amax(2).repeat_interleave(128, 1)
            wire = 1.01 * torch.maximum(12 / 1018 * stacked.abs(), 2.0**-13 * largest).sum(0)
        bound = wire + unit * (exact.abs() + wire) + 2.0**-18 * size
        assert (error <= bound).all(), (token, float((error / bound).max()))
        errors, results = errors + float(error.square().sum()), results + float(exact.square().sum())
    return float((errors / results)**0.5)


def zero_tokens_everywhere(worker: Worker) -> None:
    work = Workload((0, ) * worker.num_ranks)
    for mode in MODES:
        whole_trip(worker, work, Manner(FP8, mode))


def empty_subsets(worker: Worker, work: Workload) -> None:
    """Every subset of the ranks without tokens (pitfall 23)."""
    for subset in range(1 << worker.num_ranks):
        tokens = tuple(0 if subset >> rank & 1 else count for rank, count in enumerate(work.num_tokens))
        whole_trip(worker, Workload(tokens, hidden=work.hidden, seed=work.seed), Manner(max_tokens=12))


def any_bits(worker: Worker, work: Workload) -> None:
    LowLatencyPendingCall(worker, low_latency_buffer(worker), work).dispatch()


# Failures


def impatient(worker: Worker, **options: Any) -> Any:
    """A Buffer with a short timeout, once every rank is warm."""
    whole_trip(worker, Workload((2, ) * worker.num_ranks))
    buffer = worker.new_buffer(num_rdma_bytes=1 << 22, low_latency_mode=True, timeout_s=SHORT_TIMEOUT_S, **options)
    worker.barrier()
    return buffer


def killed_rank(worker: Worker, work: Workload, victim: int, kinds: Any = deep_ep.TimeoutError) -> str:
    """Without enable_shrink: the others get an error that names the rank, and can destroy and exit."""
    buffer = impatient(worker)
    LowLatencyPendingCall(worker, buffer, work).whole_trip()
    worker.barrier()  # what the victim has posted to other nodes has come
    if worker.rank == victim:
        os._exit(7)
    message = failure_of(LowLatencyPendingCall(worker, buffer, work, Manner(settles=True)).whole_trip, kinds)
    equal("a later failure", failure_of(lambda: buffer.low_latency_dispatch(None, None, 1, 1)), message)
    started = time.monotonic()
    buffer.destroy()
    assert time.monotonic() - started < 10
    return message


def survivors_of(work: Workload, victim: int) -> Workload:
    return Workload(tuple(0 if rank == victim else count for rank, count in enumerate(work.num_tokens)), work.hidden,
                    work.num_topk, work.experts_per_rank, work.routing, work.seed)


def shrunk_group(worker: Worker, work: Workload, victim: int, dies: bool) -> Optional[list[int]]:
    """With enable_shrink: the first call after the death takes a timeout, then the others go on without the rank."""
    buffer = impatient(worker, enable_shrink=True)
    LowLatencyPendingCall(worker, buffer, work).whole_trip()
    worker.barrier()  # what the victim has posted to other nodes has come
    if worker.rank == victim:
        if dies:
            os._exit(7)
        return None
    without = survivors_of(work, victim)
    manner = Manner(max_tokens=max(work.num_tokens))
    status = torch.full((worker.num_ranks, ), 7, dtype=torch.int32, device=worker.device)
    for _ in range(3):
        pending = LowLatencyPendingCall(worker, buffer, without, manner)
        # What the victim's experts would have done is missing.
        first = victim * work.experts_per_rank
        dead = (pending.mine.topk_idx >= first) & (pending.mine.topk_idx < first + work.experts_per_rank)
        pending.mine.topk_idx = torch.where(dead, -1, pending.mine.topk_idx)
        pending.whole_trip()
        buffer.low_latency_query_mask_buffer(status)
        equal("masked ranks", status.tolist(), [int(rank == victim) for rank in range(worker.num_ranks)])
    buffer.check()
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    masked = status.tolist()
    buffer.low_latency_update_mask_buffer(victim, True)
    started = time.monotonic()
    LowLatencyPendingCall(worker, buffer, survivors_of(work, victim), manner).dispatch()
    assert time.monotonic() - started < 30
    buffer.destroy()
    return masked


def clean_is_a_barrier(worker: Worker, work: Workload) -> None:
    """No rank leaves before the last has come; refused while a hook is open; calls go on as if nothing had been."""
    buffer = low_latency_buffer(worker)
    arguments = max(work.num_tokens), work.hidden, work.num_experts
    for _ in range(3):
        LowLatencyPendingCall(worker, buffer, work).whole_trip()
        buffer.clean_low_latency_buffer(*arguments)
    worker.barrier()
    entered = time.time()
    if worker.rank == 0:
        time.sleep(0.5)
        entered = time.time()
    buffer.clean_low_latency_buffer(*arguments)
    if worker.device.type == "cuda":
        torch.cuda.synchronize()
    left = time.time()
    times: list[Any] = [None] * worker.num_ranks
    dist.all_gather_object(times, entered, group=worker.group)
    assert left >= max(times), "a rank left before the last had come"
    pending = LowLatencyPendingCall(worker, buffer, work, Manner(mode="hook")).start_dispatch()
    message = failure_of(lambda: buffer.clean_low_latency_buffer(*arguments))
    assert "no low-latency call may be open" in message, message
    pending.finish_dispatch().combine()
    buffer.clean_low_latency_buffer(*arguments)


def clean_without_a_rank(worker: Worker, absent: int, enable_shrink: bool) -> Any:
    """With enable_shrink whoever does not come is masked; without, everybody else gets an error that names it."""
    buffer = impatient(worker, enable_shrink=enable_shrink)
    found: Any = None
    if worker.rank != absent:

        def clean() -> None:
            buffer.clean_low_latency_buffer(8, 512, worker.num_ranks)
            if worker.device.type == "cuda":
                torch.cuda.synchronize()
            buffer.check()

        if enable_shrink:
            clean()
            status = torch.full((worker.num_ranks, ), 7, dtype=torch.int32, device=worker.device)
            buffer.low_latency_query_mask_buffer(status)
            found = status.tolist()
        else:
            found = failure_of(clean, deep_ep.TimeoutError)
    worker.barrier()
    buffer.destroy()
    return found


def entries_of_another_dispatch(worker: Worker, work: Workload) -> str:
    """A combine with another topk_idx than its dispatch fails on every rank; -1 is legal."""
    buffer = worker.new_buffer(num_rdma_bytes=1 << 22, low_latency_mode=True)
    pending = LowLatencyPendingCall(worker, buffer, work).dispatch()
    rows = pending.expert_rows()
    dropped = torch.where(torch.arange(work.num_topk, device=worker.device) == 1, -1, pending.topk_idx)
    buffer.low_latency_combine(rows, dropped, pending.topk_weights, pending.handle)
    settle(worker, buffer)
    other = (pending.topk_idx + 1) % work.num_experts

    def combine() -> None:
        buffer.low_latency_combine(rows, other, pending.topk_weights, pending.handle)
        settle(worker, buffer)

    message = failure_of(combine)
    worker.barrier()
    buffer.destroy()
    return message


# Graphs


class GraphedTrip:
    """A dispatch and a combine, captured; inputs are copied in, results compared after a replay."""

    def __init__(self, worker: Worker, buffer: Any, work: Workload, manner: Manner, has_combine: bool = True) -> None:
        self.worker, self.work, self.manner, self.has_combine = worker, work, manner, has_combine
        self.pending = LowLatencyPendingCall(worker, buffer, work, manner)
        self.rows = self.pending.expert_rows()
        self.step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.received, self.combined = self.step()

    def step(self) -> Any:
        f, cast = self.pending, self.manner.cast
        shape = (f.max_tokens, f.work.num_experts)
        received = f.buffer.low_latency_dispatch(f.x, f.topk_idx, *shape, use_fp8=cast.use_fp8, **f.mode_options())
        self._wait(*received[3:])
        if not self.has_combine:
            return received, None
        combined = f.buffer.low_latency_combine(self.rows, f.topk_idx, f.topk_weights, received[2], **f.mode_options())
        self._wait(*combined[1:])
        return received, combined

    def _wait(self, event: Any, hook: Any) -> None:
        if hook is not None:
            hook()
        if event.event is not None:
            event.current_stream_wait()

    def replay(self, seed: int) -> None:
        self.start(seed)
        self.finish()

    def start(self, seed: int) -> None:
        """With other numbers of the same shape."""
        now = Workload(self.work.num_tokens,
                       self.work.hidden,
                       self.work.num_topk,
                       self.work.experts_per_rank,
                       seed=seed)
        fresh = LowLatencyPendingCall(self.worker, self.pending.buffer, now, self.manner)
        for name in ("x", "topk_idx", "topk_weights"):
            getattr(self.pending, name).copy_(getattr(fresh, name))
        self.rows.copy_(fresh.expert_rows())
        self.fresh = fresh
        self.graph.replay()

    def finish(self) -> None:
        torch.cuda.synchronize()
        fresh = self.fresh
        fresh.received, fresh.combined = self.received, self.combined
        fresh.counts = fresh.waits = None
        fresh.landed = lambda *_: None  # type: ignore[method-assign]
        fresh.finish_dispatch()
        if self.has_combine:
            fresh.finish_combine()


def graph_replays(worker: Worker, works: list[Workload], mode: str) -> None:
    """Graphs of different sizes, interleaved on one Buffer, no clean-up between (pitfall 9)."""
    buffer = low_latency_buffer(worker)
    graphs = [GraphedTrip(worker, buffer, work, Manner(FP8 if i % 2 else BF16, mode)) for i, work in enumerate(works)]
    for seed in range(6):
        graphs[seed * 2 % len(graphs)].replay(200 + seed)
        if seed % 2:
            whole_trip(worker, works[0])


def replay_before_a_hook(worker: Worker, held: Workload, replayed: Workload, mode: str) -> None:
    """An eager send phase, the replay of a graph with one call, then the hook: each gets its own rows."""
    buffer = low_latency_buffer(worker)
    graph = GraphedTrip(worker, buffer, replayed, Manner(FP8, mode), has_combine=False)
    for seed in range(3):
        pending = LowLatencyPendingCall(worker, buffer, held, Manner(mode="hook"))
        pending.start_dispatch()
        graph.start(300 + seed)
        pending.finish_dispatch()
        graph.finish()
        rows = pending.expert_rows()
        pending.start_combine(rows)
        graph.start(400 + seed)
        pending.finish_combine()
        graph.finish()


def replay_of_two_calls_before_a_hook(worker: Worker, work: Workload) -> str:
    """A graph of a dispatch and a combine, replayed while a call is open: fails at once, long before the timeout."""
    buffer = worker.new_buffer(num_rdma_bytes=1 << 22, low_latency_mode=True, timeout_s=100)
    graph = GraphedTrip(worker, buffer, work, Manner())
    worker.barrier()
    held = LowLatencyPendingCall(worker, buffer, work, Manner(mode="hook")).start_dispatch()
    started = time.monotonic()
    graph.start(500)
    torch.cuda.synchronize()
    message = failure_of(buffer.check, deep_ep.InvalidArgument)
    assert time.monotonic() - started < 50, message
    worker.barrier()
    del held
    buffer.destroy()
    return message


def replays_after_a_failure(worker: Worker, work: Workload) -> Optional[str]:
    """A rank stops replaying: the other one's graph gives NaN and no rows from then on, not those of its last run."""
    buffer = impatient(worker)
    graph = GraphedTrip(worker, buffer, work, Manner(FP8))
    worker.barrier()
    graph.replay(600)
    message = None
    if worker.rank == 0:
        for _ in range(5):
            graph.start(601)
            torch.cuda.synchronize()
            (recv_x, scales), recv_count, handle = graph.received[:3]
            equal("recv_count", recv_count.tolist(), [0] * work.experts_per_rank)
            equal("layout_range", int(handle[1].abs().sum()), 0)
            assert recv_x.float().isnan().all() and scales.isnan().all() and graph.combined[0].isnan().all()
        message = failure_of(buffer.check, deep_ep.TimeoutError)
    worker.barrier()
    buffer.destroy()
    return message
