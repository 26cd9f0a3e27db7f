"""One low-latency dispatch and its combine on this rank, each checked against the reference."""

import functools
from dataclasses import dataclass
from typing import Any, Optional

import torch
from compare import equal, poisoned, same_bits, same_numbers
from reference import Cast, ExpertRows, Sent, logfmt, low_latency_combine, low_latency_dispatch
from utils import Worker
from workload import Workload, random_rows

BF16 = Cast()
FP8 = Cast(use_fp8=True)
FP8_ROUNDED = Cast(use_fp8=True, round_scale=True)
UE8M0 = Cast(use_fp8=True, round_scale=True, use_ue8m0=True)
CASTS = BF16, FP8, FP8_ROUNDED, UE8M0
STATS_START = 100


@dataclass(frozen=True)
class Manner:
    """How the calls are made."""

    cast: Cast = BF16
    mode: str = "sync"  # or "async", "hook"
    max_tokens: int = 0  # num_max_dispatch_tokens_per_rank; 0: the most that a rank of the workload has
    use_logfmt: bool = False
    zero_copy: bool = False
    has_out: bool = False
    has_stats: bool = False
    settles: bool = False  # raise what the kernels reported before looking at results: for calls that are to fail


@functools.lru_cache(maxsize=8)
def expected(work: Workload, cast: Cast) -> tuple[list[Sent], list[list[ExpertRows]]]:
    sent = work.sent()
    return sent, [low_latency_dispatch(sent, rank, work.num_experts, cast) for rank in range(work.num_ranks)]


def answers_of(work: Workload, arrivals: list[list[ExpertRows]]) -> list[list[torch.Tensor]]:
    """What the experts of each rank answer, one tensor for each expert."""
    answers = []
    for rank, experts in enumerate(arrivals):
        counts = [len(expert.rows) for expert in experts]
        rows = random_rows(sum(counts), work.hidden, torch.bfloat16, work.generator(rank, 5))
        answers.append(list(rows.split(counts)))
    return answers


def low_latency_buffer(worker: Worker, num_rdma_bytes: int = 1 << 22, **options: Any) -> Any:
    """A Buffer of this group for low-latency calls, shared by all cases that ask for the same."""
    key = ("low latency", worker.ranks, num_rdma_bytes, *sorted(options.items()))
    if key not in worker.buffers:
        worker.buffers[key] = worker.new_buffer(num_rdma_bytes=num_rdma_bytes, low_latency_mode=True, **options)
    return worker.buffers[key]


class LowLatencyPendingCall:
    """Call the steps in the order of the methods; every rank of the group must make the same ones."""

    def __init__(self, worker: Worker, buffer: Any, work: Workload, manner: Optional[Manner] = None) -> None:
        self.buffer, self.work, self.manner = buffer, work, manner or Manner()
        self.rank, self.device = worker.rank, worker.device
        self.sent, self.arrivals = expected(work, self.manner.cast)
        self.max_tokens = self.manner.max_tokens or max(1, *work.num_tokens)
        self.mine = self.sent[self.rank]
        self.x, self.topk_idx = self.mine.x.to(self.device), self.mine.topk_idx.to(self.device)
        assert self.mine.topk_weights is not None
        self.topk_weights = self.mine.topk_weights.to(self.device)
        self.handle: Any = None

    def mode_options(self) -> dict[str, Any]:
        return {"async_finish": self.manner.mode == "async", "return_recv_hook": self.manner.mode == "hook"}

    def landed(self, event: Any, hook: Any) -> None:
        equal("there is an event", event.event is not None, self.manner.mode == "async")
        equal("there is a hook", hook is not None, self.manner.mode == "hook")
        if hook is not None:
            hook()
        if event.event is not None:
            event.current_stream_wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.manner.settles:
            self.buffer.check()

    def stats(self, size: int, dtype: torch.dtype) -> Optional[torch.Tensor]:
        return torch.full((size, ), STATS_START, dtype=dtype, device=self.device) if self.manner.has_stats else None

    def start_dispatch(self) -> "LowLatencyPendingCall":
        cast, num_local = self.manner.cast, self.work.experts_per_rank
        self.counts, self.waits = self.stats(num_local, torch.int32), self.stats(self.work.num_ranks, torch.int64)
        with poisoned():
            self.received = self.buffer.low_latency_dispatch(self.x,
                                                             self.topk_idx,
                                                             self.max_tokens,
                                                             self.work.num_experts,
                                                             self.counts,
                                                             self.waits,
                                                             use_fp8=cast.use_fp8,
                                                             round_scale=cast.round_scale,
                                                             use_ue8m0=cast.use_ue8m0,
                                                             **self.mode_options())
        self.handle = self.received[2]
        return self

    def finish_dispatch(self) -> "LowLatencyPendingCall":
        recv_x, recv_count, handle, event, hook = self.received
        self.landed(event, hook)
        recv_x, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
        want = self.arrivals[self.rank]
        counts = [len(expert.rows) for expert in want]
        equal("recv_count", (recv_count.dtype, recv_count.tolist()), (torch.int32, counts))
        num_rows = self.work.num_ranks * self.max_tokens
        equal("shape of recv_x", list(recv_x.shape), [len(want), num_rows, self.work.hidden])
        equal("constants of the handle", handle[2:], (self.max_tokens, self.work.hidden, self.work.num_experts))
        if scales is not None:
            equal("strides of scales", scales.stride()[1:], (1, num_rows))
        for i, expert in enumerate(want):
            same_bits(f"recv_x of expert {i}", recv_x[i, :counts[i]], expert.x)
            if scales is not None:
                same_bits(f"scales of expert {i}", scales[i, :counts[i]], expert.scales)
            tokens = torch.tensor([token for _, token in expert.rows], dtype=torch.int32)
            same_bits(f"src_info of expert {i}", handle[0][i, :counts[i]], tokens)
            same_bits(f"layout_range of expert {i}", handle[1][i], expert.layout_range)
        if self.counts is not None and self.waits is not None:
            equal("cumulative counts", self.counts.tolist(), [STATS_START + count for count in counts])
            assert (self.waits >= STATS_START).all()
        return self

    def dispatch(self) -> "LowLatencyPendingCall":
        return self.start_dispatch().finish_dispatch()

    def expert_rows(self) -> torch.Tensor:
        """The answers where the dispatch put the rows; what nobody may read is NaN."""
        shape = (self.work.experts_per_rank, self.work.num_ranks * self.max_tokens, self.work.hidden)
        rows = torch.full(shape, float("nan"), dtype=torch.bfloat16)
        for i, answer in enumerate(answers_of(self.work, self.arrivals)[self.rank]):
            rows[i, :answer.shape[0]] = answer
        return rows.to(self.device)

    def start_combine(self, rows: Optional[torch.Tensor] = None) -> "LowLatencyPendingCall":
        """`rows`: what expert_rows() returned before, for callers that are in a hurry."""
        rows = self.expert_rows() if rows is None else rows
        if self.manner.zero_copy:
            self.buffer.get_next_low_latency_combine_buffer(self.handle).copy_(rows)
            rows = torch.full_like(rows, float("nan"))
        with poisoned():
            out = torch.empty_like(self.x) if self.manner.has_out else None
            self.waits = self.stats(self.work.num_ranks, torch.int64)
            self.combined = self.buffer.low_latency_combine(rows,
                                                            self.topk_idx,
                                                            self.topk_weights,
                                                            self.handle,
                                                            use_logfmt=self.manner.use_logfmt,
                                                            zero_copy=self.manner.zero_copy,
                                                            out=out,
                                                            combine_wait_recv_cost_stats=self.waits,
                                                            **self.mode_options())
        assert out is None or self.combined[0] is out
        return self

    def finish_combine(self) -> "LowLatencyPendingCall":
        combined, event, hook = self.combined
        self.landed(event, hook)
        want = low_latency_combine(answers_of(self.work, self.arrivals),
                                   self.arrivals,
                                   self.mine,
                                   self.rank,
                                   is_fused=self.device.type == "cuda",
                                   wire=logfmt if self.manner.use_logfmt else torch.Tensor.bfloat16)
        same_numbers("combined_x", combined, want)
        assert self.waits is None or (self.waits >= STATS_START).all()
        return self

    def combine(self) -> "LowLatencyPendingCall":
        return self.start_combine().finish_combine()

    def whole_trip(self) -> None:
        self.dispatch().combine()


def finish_together(pending_calls: list[LowLatencyPendingCall], landings: list[LowLatencyPendingCall]) -> None:
    """The rest of pending_calls whose dispatches have begun; rows are received in the order of `landings`."""
    for pending in landings:
        pending.finish_dispatch()
    for pending in pending_calls:
        pending.start_combine()
    for pending in landings:
        pending.finish_combine()
