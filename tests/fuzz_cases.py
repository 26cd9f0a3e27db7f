"""Random programs of calls: what they are, how one is drawn from a number, and how every rank plays it.

A `Case` is a value: its repr, as `code_of` writes it, is Python that a test can hold. All ranks play the same steps in
the same order, each checked against tests/reference.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Optional, Union

import torch
from low_latency_pending_call import CASTS, LowLatencyPendingCall, Manner
from low_latency_pressure import least_hidden
from pending_call import How, PendingCall
from pressure import Choice
from reference import Cast  # noqa: F401 - of the code of a case
from utils import Worker
from workload import SCALE_LAYOUTS, Workload

from deep_ep import supports

NUM_RDMA_BYTES = 1 << 22
AMPLE_LEND_BYTES = 1 << 24  # for the rows of every call of a case
NUM_BANKS = 2  # launches of low-latency calls that may be open at a time
FP8 = torch.float8_e4m3fn
BY_DEFAULT, SIMPLY = How(), Manner()


@dataclass(frozen=True)
class HighThroughput:
    """layout, dispatch, perhaps a dispatch with its handle, combine."""

    work: Workload
    how: How = BY_DEFAULT
    num_biases: int = 0
    has_cached: bool = False
    buffer_idx: int = 0

    @property
    def steps(self) -> tuple[str, ...]:
        cached = ("cached_dispatch", ) if self.has_cached else ()
        return ("layout", "start_dispatch", "finish_dispatch", *cached, "combine")


@dataclass(frozen=True)
class LowLatency:
    """low_latency_dispatch and low_latency_combine."""

    work: Workload
    manner: Manner = SIMPLY
    buffer_idx: int = 0
    steps = ("start_dispatch", "finish_dispatch", "start_combine", "finish_combine")

    @property
    def holds_bank(self) -> bool:
        return self.manner.mode == "hook"


@dataclass(frozen=True)
class Clean:
    """clean_low_latency_buffer, as engines call it between phases."""

    work: Workload
    buffer_idx: int = 0
    steps = ("clean", )


Call = Union[HighThroughput, LowLatency, Clean]


@dataclass(frozen=True)
class Case:
    """Calls on one or two Buffers, and whose next step comes when."""

    calls: tuple[Call, ...]
    order: tuple[int, ...] = ()  # indices of calls; what is left out comes at the end, one call after the other
    late_rank: int = -1  # sleeps before each of its steps
    num_nvl_bytes: int = 1 << 22
    num_lend_bytes: Optional[int] = None
    low_latency_mode: bool = True  # of the Buffers

    @property
    def num_ranks(self) -> int:
        return self.calls[0].work.num_ranks


@dataclass(frozen=True)
class Topology:
    """Of the processes that play: several nodes where ranks_per_node is less than num_processes."""

    num_processes: int
    ranks_per_node: int = 0  # 0: one node

    @property
    def is_one_node(self) -> bool:
        return self.ranks_per_node in {0, self.num_processes}

    @property
    def group_sizes(self) -> list[int]:
        unit = 1 if self.is_one_node else self.ranks_per_node
        return list(range(unit if self.is_one_node else 2 * unit, self.num_processes + 1, unit))


# The order of steps


class Banks:
    """Which launches of low-latency calls are open, on each Buffer: one may begin when the last but one has ended."""

    def __init__(self) -> None:
        self._launches: dict[int, list[bool]] = {}  # by Buffer: is it open?
        self._of_step: dict[int, int] = {}  # by call: its launch that is open

    def may(self, call: Call, step: str) -> bool:
        launches = self._launches.setdefault(call.buffer_idx, [])
        if step == "clean":
            return not any(launches)
        return not (isinstance(call, LowLatency) and step.startswith("start")
                    and any(launches[-NUM_BANKS:][:len(launches) + 1 - NUM_BANKS]))

    def note(self, idx: int, call: Call, step: str) -> None:
        if not isinstance(call, LowLatency):
            return
        launches = self._launches.setdefault(call.buffer_idx, [])
        if step.startswith("start"):
            self._of_step[idx] = len(launches)
            launches.append(call.holds_bank)
        else:
            launches[self._of_step.pop(idx)] = False


def schedule(case: Case) -> Iterator[tuple[int, str]]:
    """(call, step) in the order of the case. What is not legal at its place comes at the end; calls that have begun
    are ended first."""
    done, banks = [0] * len(case.calls), Banks()
    begun: list[int] = []

    def step_of(idx: int) -> Optional[str]:
        steps = case.calls[idx].steps
        found = steps[done[idx]] if done[idx] < len(steps) else None
        return found if found is not None and banks.may(case.calls[idx], found) else None

    def take(idx: int, step: str) -> tuple[int, str]:
        banks.note(idx, case.calls[idx], step)
        done[idx] += 1
        begun.extend([idx] if idx not in begun else [])
        return idx, step

    for idx in case.order:
        step = step_of(idx)
        if step is not None:
            yield take(idx, step)
    while True:
        ready = ((idx, step_of(idx)) for idx in (*begun, *range(len(case.calls))))
        following = next(((idx, step) for idx, step in ready if step is not None), None)
        if following is None:
            break
        yield take(*following)
    assert all(count == len(call.steps) for count, call in zip(done, case.calls)), "a call was left open"


# Drawing a case


def make_case(seed: int, topology: Topology) -> Case:
    has_low_latency = topology.is_one_node or supports("low_latency_internode")
    draw = Choice(seed, 0)
    num_ranks, num_lend_bytes = draw.of(*topology.group_sizes), draw.of(None, 0, AMPLE_LEND_BYTES)
    calls = tuple(
        _draw_call(draw, num_ranks, has_low_latency, num_lend_bytes == AMPLE_LEND_BYTES, seed * 8 + i)
        for i in range(draw.of(1, 1, 2, 3)))
    order = [idx for idx, call in enumerate(calls) for _ in call.steps]
    return Case(calls,
                order=shuffled(draw, order) if draw.of(True, True, False) else (),
                late_rank=draw.of(-1, -1, draw.of(*range(num_ranks))),
                num_nvl_bytes=draw.of(1 << 22, 1 << 22, 1 << 17 if topology.is_one_node else 1 << 20),
                num_lend_bytes=num_lend_bytes,
                low_latency_mode=has_low_latency)


def shuffled(draw: Choice, items: list[int]) -> tuple[int, ...]:
    rest, found = list(items), []
    while rest:
        found.append(rest.pop(draw.of(*range(len(rest)))))
    return tuple(found)


def _draw_call(draw: Choice, num_ranks: int, has_low_latency: bool, may_lend: bool, seed: int) -> Call:
    buffer_idx = draw.of(0, 0, 1)
    if not has_low_latency or draw.of(True, False):
        how = _draw_how(draw, may_lend)
        return HighThroughput(_draw_work(draw, num_ranks, seed), how, draw.of(0, 0, 1, 2), draw.of(True, False),
                              buffer_idx)
    manner = _draw_manner(draw)
    work = _draw_low_latency_work(draw, num_ranks, manner, seed)
    if draw.of(True, *[False] * 9):
        return Clean(work, buffer_idx)
    return LowLatency(work, manner, buffer_idx)


def _draw_work(draw: Choice, num_ranks: int, seed: int) -> Workload:
    kind = draw.of("bfloat16", "bfloat16", "bfloat16", "noise", "fp8", "other")
    dtype = {"fp8": FP8, "other": draw.of(torch.float32, torch.float16, torch.uint8)}.get(kind, torch.bfloat16)
    unit = 16 // dtype.itemsize
    hidden = draw.of(1, 3, 8, 33, 64, 129) * unit
    return Workload(tuple(draw.of(0, 1, 2, 7, 19, 40) for _ in range(num_ranks)),
                    hidden=hidden,
                    num_topk=draw.of(1, 2, 5, 8),
                    experts_per_rank=draw.of(1, 3, 8),
                    routing=_draw_routing(draw),
                    seed=seed,
                    dtype=dtype,
                    idx_dtype=draw.of(torch.int64, torch.int64, torch.int32),
                    num_scales=draw.of(1, 2, 7) if dtype.itemsize == 1 else 0,
                    scale_dtype=draw.of(torch.float32, torch.int32),
                    scale_layout=draw.of(*SCALE_LAYOUTS),
                    is_bit_noise=kind == "noise")


def _draw_routing(draw: Choice) -> str:
    return draw.of("random", "random", "holes", "duplicates", "one_rank", "one_expert", "spread", "none")


def _draw_how(draw: Choice, may_lend: bool) -> How:
    is_async, has_topk = draw.of(True, False), draw.of(True, True, True, False)
    return How(is_async=is_async,
               on_comm_stream=is_async and draw.of(True, False),
               has_previous=draw.of(True, False, False),
               has_topk=has_topk,
               expert_alignment=draw.of(1, 1, 2, 16, 128),
               worst_factor=draw.of(0, 0, 1, 3) if has_topk else 0,
               num_sms=draw.of(1, 2, 4, 7),
               lends=may_lend and draw.of(True, False))


def _draw_manner(draw: Choice) -> Manner:
    way = draw.of("bfloat16", "bfloat16", "logfmt", "zero copy")
    return Manner(draw.of(*CASTS),
                  mode=draw.of("sync", "async", "hook", "hook"),
                  max_tokens=draw.of(0, 0, 24),
                  use_logfmt=way == "logfmt",
                  zero_copy=way == "zero copy",
                  has_out=draw.of(True, False),
                  has_stats=draw.of(True, False))


def _draw_low_latency_work(draw: Choice, num_ranks: int, manner: Manner, seed: int) -> Workload:
    most, unit = draw.of(1, 3, 16, 24), least_hidden(manner.cast)
    return Workload(tuple(draw.of(0, 1, most // 2, most) for _ in range(num_ranks)),
                    hidden=draw.of(1, 2, 3) * max(1,
                                                  draw.of(8, 264) // unit) * unit,
                    num_topk=draw.of(1, 2, 5, 8),
                    experts_per_rank=draw.of(1, 3, 8),
                    routing=_draw_routing(draw),
                    idx_dtype=draw.of(torch.int64, torch.int32),
                    seed=seed)


# Playing it


def play(worker: Worker, case: Case) -> int:
    """Collective. The number of steps."""
    pending = [_pending(worker, case, call) for call in case.calls]
    num_steps = 0
    for idx, step in schedule(case):
        if worker.rank == case.late_rank:
            time.sleep(0.002)
        call = case.calls[idx]
        if isinstance(call, HighThroughput) and step == "combine":
            pending[idx].combine(call.num_biases)
        elif isinstance(call, HighThroughput) and step == "cached_dispatch":
            pending[idx].cached_dispatch(call.work.next())
        else:
            getattr(pending[idx], step)()
        num_steps += 1
    for buffer in {id(one.buffer): one.buffer for one in pending}.values():
        buffer.check()
    return num_steps


class _PendingClean:

    def __init__(self, buffer: Any, work: Workload) -> None:
        self.buffer, self._work = buffer, work

    def clean(self) -> None:
        work = self._work
        self.buffer.clean_low_latency_buffer(max(1, *work.num_tokens), work.hidden, work.num_experts)


def _pending(worker: Worker, case: Case, call: Call) -> Any:
    buffer = _buffer(worker, case, call.buffer_idx)
    if isinstance(call, HighThroughput):
        return PendingCall(worker, buffer, call.work, call.how)
    if isinstance(call, LowLatency):
        return LowLatencyPendingCall(worker, buffer, call.work, call.manner)
    return _PendingClean(buffer, call.work)


def _buffer(worker: Worker, case: Case, idx: int) -> Any:
    """Kept: a case finds what earlier ones left behind. Every rank has the same ones, as all play every case."""
    key = ("fuzz", worker.ranks, case.num_nvl_bytes, case.num_lend_bytes, case.low_latency_mode, idx)
    if key not in worker.buffers:
        worker.buffers[key] = worker.new_buffer(case.num_nvl_bytes,
                                                num_rdma_bytes=NUM_RDMA_BYTES if case.low_latency_mode else 0,
                                                low_latency_mode=case.low_latency_mode,
                                                num_lend_bytes=case.num_lend_bytes)
    return worker.buffers[key]


# As Python


def code_of(value: Any) -> str:
    """An expression for it, without what is as by default."""
    if isinstance(value, tuple):
        inner = ", ".join(code_of(each) for each in value)
        return f"({inner}, )" if len(value) == 1 else f"({inner})"
    if not is_dataclass(value):
        return repr(value)
    given = []
    for i, each in enumerate(fields(value)):
        got = getattr(value, each.name)
        if got != each.default:
            given.append(code_of(got) if i == 0 else f"{each.name}={code_of(got)}")
    return f"{type(value).__name__}({', '.join(given)})"


def test_of(case: Case, seed: int) -> str:
    """Ready for tests/test_fuzz.py: an entry of FOUND."""
    return f"    # seed {seed}\n    {code_of(case)},"


test_of.__test__ = False  # type: ignore[attr-defined]
# What the code of a case uses.
NAMES = ("Case", "Cast", "Clean", "HighThroughput", "How", "LowLatency", "Manner", "Workload", "torch")
