"""From a case that fails to a small one that fails in the same way."""

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, Optional

import torch
from fuzz_cases import Case, Clean, HighThroughput, LowLatency
from low_latency_pressure import least_hidden
from workload import Workload


def shrink(case: Case,
           fails: Callable[[Case], bool],
           unit: int = 1,
           max_attempts: int = 200,
           seconds: float = 120.0) -> tuple[Case, int]:
    """The smallest case found for which `fails` is true, and the number of attempts. `unit`: ranks of a node.

    Greedy: the first simpler case that fails is taken, and everything is tried again from there, until nothing simpler
    fails (or time or attempts are over).
    """
    deadline, attempts, known = time.monotonic() + seconds, 0, {case}
    is_smallest = False
    while not is_smallest:
        is_smallest = True
        for candidate in simpler(case, unit):
            if candidate in known:
                continue
            if attempts == max_attempts or time.monotonic() > deadline:
                return case, attempts
            attempts += 1
            known.add(candidate)
            if fails(candidate):
                case, is_smallest = candidate, False
                break
    return case, attempts


def simpler(case: Case, unit: int = 1) -> Iterator[Case]:
    """Cases with less in them, those that save most first."""
    yield from _fewer_calls(case)
    if case.order:
        yield replace(case, order=())
    yield from _fewer_ranks(case, unit)
    yield from _with_defaults(case, ("late_rank", "num_nvl_bytes", "num_lend_bytes"))
    for i, call in enumerate(case.calls):
        for other in _simpler_call(call):
            yield replace(case, calls=(*case.calls[:i], other, *case.calls[i + 1:]))
    for i in range(len(case.order)):
        yield replace(case, order=case.order[:i] + case.order[i + 1:])


def _fewer_calls(case: Case) -> Iterator[Case]:
    if len(case.calls) == 1:
        return
    for keep in [(i, ) for i in range(len(case.calls))] + [
            tuple(j for j in range(len(case.calls)) if j != i) for i in range(len(case.calls))]:  # yapf: disable
        yield replace(case,
                      calls=tuple(case.calls[i] for i in keep),
                      order=tuple(keep.index(i) for i in case.order if i in keep))


def _fewer_ranks(case: Case, unit: int) -> Iterator[Case]:
    for num_ranks in range(unit if unit == 1 else 2 * unit, case.num_ranks, unit):
        calls = tuple(
            replace(call, work=replace(call.work, num_tokens=call.work.num_tokens[:num_ranks])) for call in case.calls)
        yield replace(case, calls=calls, late_rank=case.late_rank if case.late_rank < num_ranks else -1)


def _with_defaults(value: Any, names: Optional[tuple[str, ...]] = None) -> Iterator[Any]:
    """With one field as it is by default."""
    for each in fields(value):
        if (names is None or each.name in names) and getattr(value, each.name) != each.default:
            yield replace(value, **{each.name: each.default})


def _simpler_call(call: Any) -> Iterator[Any]:
    if isinstance(call, HighThroughput):
        yield from _with_defaults(call, ("has_cached", "num_biases", "buffer_idx"))
        yield from (replace(call, how=how) for how in _with_defaults(call.how)
                    if how.is_async or not how.on_comm_stream)
        if call.how.is_async and call.how.on_comm_stream:
            yield replace(call, how=replace(call.how, is_async=False, on_comm_stream=False))
        unit = 16 // call.work.dtype.itemsize
        if call.work.dtype != torch.bfloat16:
            yield replace(call, work=replace(call.work, dtype=torch.bfloat16, num_scales=0, hidden=8))
    else:
        yield from _with_defaults(call, ("buffer_idx", ))
        unit = least_hidden(call.manner.cast) if isinstance(call, LowLatency) else 8
    if isinstance(call, LowLatency):
        yield from (replace(call, manner=manner) for manner in _with_defaults(call.manner))
    if not isinstance(call, Clean):
        yield from (replace(call, work=work) for work in _simpler_work(call.work, unit))


def _simpler_work(work: Workload, unit: int) -> Iterator[Workload]:
    yield from (replace(work, num_tokens=tokens) for tokens in _fewer_tokens(work.num_tokens))
    for name, least in (("hidden", unit), ("num_topk", 1), ("experts_per_rank", 1)):
        value = getattr(work, name)
        for other in (least, value // 2 // least * least):
            if least <= other < value:
                yield replace(work, **{name: other})
    if work.num_scales > 1:
        yield replace(work, num_scales=1)
    yield from _with_defaults(work, ("routing", "idx_dtype", "scale_dtype", "scale_layout", "is_bit_noise", "seed"))


def _fewer_tokens(num_tokens: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    most = max(num_tokens)
    for limit in (1, most // 2):
        if 0 < limit < most:
            yield tuple(min(count, limit) for count in num_tokens)
    for rank, count in enumerate(num_tokens):
        for fewer in (0, count // 2, count - 1):
            if 0 <= fewer < count:
                yield (*num_tokens[:rank], fewer, *num_tokens[rank + 1:])
