"""Which rank was late, at which stage, how often: counters that the kernels keep, and the sentences that they make."""

from dataclasses import dataclass

import torch

import deep_ep_cpp
from deep_ep._memory import view_memory

# Of a cell: the last call that is counted, calls in which the rank was late, nanoseconds waited.
CELL_WORDS = 3
LATE_US = deep_ep_cpp.Buffer.LATE_NS / 1e3

OPERATIONS, STAGES, AWAITED = deep_ep_cpp.wait_names()


@dataclass(frozen=True)
class WaitCounters:
    """How often, and how long, this rank has waited for each rank; see `Buffer.get_wait_counters`."""

    operations: tuple[str, ...]  # names along the first dimension
    stages: tuple[str, ...]  # along the second; "": nobody waits there
    times_late: torch.Tensor  # int64 [operations, stages, R]: calls in which a wait for the rank lasted 50 us or more
    waited_ns: torch.Tensor  # int64, the same shape: nanoseconds of each of these calls' longest wait, in sum

    def reset(self) -> None:
        """Sets both to zero, on the current stream. Waits of kernels that run meanwhile count before it or after it."""
        self.times_late.zero_()
        self.waited_ns.zero_()


def _cells(flat: torch.Tensor, num_ranks: int) -> torch.Tensor:
    return flat.view(torch.int64).view(len(OPERATIONS), len(STAGES), num_ranks, CELL_WORDS)


def _counters(cells: torch.Tensor) -> WaitCounters:
    return WaitCounters(tuple(OPERATIONS), tuple(STAGES), cells[..., 1], cells[..., 2])


def view_counters(runtime: deep_ep_cpp.Buffer, num_ranks: int, device: torch.device) -> WaitCounters:
    """Views of the memory that the kernels add to."""
    num_bytes = len(OPERATIONS) * len(STAGES) * num_ranks * CELL_WORDS * torch.int64.itemsize
    return _counters(_cells(view_memory(runtime.wait_cells_ptr, num_bytes, device), num_ranks))


def dump(runtime: deep_ep_cpp.Buffer, rank: int, num_ranks: int) -> str:
    """What the counters say, the longest waits first. Waits for no kernel."""
    memory, num_calls, num_low_latency_calls = runtime.read_waits()
    counters = _counters(_cells(torch.frombuffer(memory, dtype=torch.uint8), num_ranks))
    lines = describe(counters)
    calls = f"{num_calls} high-throughput and {num_low_latency_calls} low-latency calls"
    if not lines:
        return f"rank {rank}: no wait for another rank lasted {LATE_US:.0f} us in {calls}"
    return "\n".join([f"rank {rank} has waited, in {calls}, {LATE_US:.0f} us or more:", *lines])


def describe(counters: WaitCounters) -> list[str]:
    """A line for each operation, stage and rank that somebody has waited for, the longest in sum first."""
    times_late, waited_ns = counters.times_late.cpu(), counters.waited_ns.cpu()
    lines = []
    for operation, stage, rank in times_late.nonzero().tolist():
        cell = operation, stage, rank
        lines.append((int(waited_ns[cell]), _line(*cell, int(times_late[cell]), int(waited_ns[cell]))))
    return [line for _, line in sorted(lines, key=lambda one: -one[0])]


def _line(operation: int, stage: int, rank: int, times: int, waited_ns: int) -> str:
    mean_us = waited_ns / times / 1e3
    return (f"  for rank {rank} {AWAITED[operation][stage]} ({OPERATIONS[operation]}): in {times} calls, "
            f"{mean_us:.1f} us each, {waited_ns / 1e9:.3f} s in all")
