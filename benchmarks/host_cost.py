#!/usr/bin/env python3
"""What a call costs the thread that makes it, in microseconds.

    python benchmarks/host_cost.py                    on a GPU: one rank, 64 tokens, everything real
    python benchmarks/host_cost.py --num-ranks 2      a process and a GPU each; the figures are rank 0's
    python benchmarks/host_cost.py --python-only      anywhere: streams, events and the native Buffer do nothing
    python benchmarks/host_cost.py --compare old=../old new=.    built trees in turn on the same cores

Figures are of the calling thread: its CPU time, least and median, and the wall time. Cores of a host differ by half,
and go through slow spells of seconds, so trees are compared on one core, in turn: --compare keeps a process for each
tree (and rank), of which one measures while the others sleep. The time in which a fresh dispatch waits for the counts
is left out; freeing the results is not. `--python-only` is for work on the Python part where there is no GPU; it also
counts what a call asks of the device. LL is the low-latency mode.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import deep_ep_cpp
from deep_ep import Buffer
from deep_ep.bench.host import Clock, timed_waits, waits

# What else is imported, where it is needed, are internals of this tree; --compare takes older ones too.

HIDDEN, NUM_EXPERTS, NUM_TOPK, NUM_TOKENS = 7168, 64, 8, 64
NUM_NVL_BYTES = 64 << 20
NUM_LL_EXPERTS = 16  # outputs grow with them, and large ones cost the CPU's allocator a system call
CALLS_IN_A_ROW = 20  # then the device is let catch up, so that no queue fills
CURRENT_STREAM = 1000


class SingleRankComm:
    """A group of one rank."""

    def Get_rank(self) -> int:  # noqa: N802 - mpi4py's name
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 1

    def allgather(self, item: Any) -> list[Any]:
        return [item]


class Nothing:
    """Has every method; each counts its calls, does nothing, and returns what `results` has for it, or else `other`."""

    def __init__(self, counts: Counter[str], results: dict[str, Any], other: Any) -> None:
        self._counts, self._results, self._other = counts, results, other

    def __getattr__(self, name: str) -> Callable[..., Any]:
        counts, result = self._counts, self._results.get(name, self._other)

        def method(*_: Any) -> Any:
            counts[name] += 1
            return result

        setattr(self, name, method)
        return method


def measure(call: Callable[[], Any], settle: Callable[[], None], num_rounds: int) -> tuple[float, float, float]:
    """Least and median CPU time of a call, and median wall time."""
    cpu_us, wall_us = [], []
    for _ in range(num_rounds):
        settle()
        waits.take()
        start = Clock.now()
        for _ in range(CALLS_IN_A_ROW):
            call()
        spent = Clock.now().since(start).since(waits.take())
        cpu_us.append(spent.cpu / CALLS_IN_A_ROW / 1e3)
        wall_us.append(spent.wall / CALLS_IN_A_ROW / 1e3)
    return min(cpu_us), statistics.median(cpu_us), statistics.median(wall_us)


@dataclass
class Inputs:
    """Of one rank."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor

    @staticmethod
    def make(device: torch.device, num_experts: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        topk_idx = torch.rand((NUM_TOKENS, num_experts), generator=generator).topk(NUM_TOPK, dim=1).indices
        return Inputs(torch.ones((NUM_TOKENS, HIDDEN), dtype=torch.bfloat16, device=device), topk_idx.to(device),
                      torch.rand((NUM_TOKENS, NUM_TOPK), generator=generator).to(device))


def high_throughput_calls(buffer: Buffer, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    x, topk_idx, weights = inputs.x, inputs.topk_idx, inputs.weights
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    fresh: dict[str, Any] = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": topk_idx,
        "topk_weights": weights
    }
    recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(x, **fresh)

    def overlapped() -> dict[str, Any]:
        return {"previous_event": Buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}

    def dispatch_and_wait(**options: Any) -> None:
        buffer.dispatch(x, **fresh, **options)[5].current_stream_wait()

    def combine_and_wait(**options: Any) -> None:
        buffer.combine(recv_x, handle, **options)[2].current_stream_wait()

    return {
        "layout": lambda: buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS),
        "dispatch": lambda: buffer.dispatch(x, **fresh),
        "dispatch, worst case": lambda: buffer.dispatch(x, num_worst_tokens=NUM_TOKENS * buffer.group_size, **fresh),
        "dispatch, cached": lambda: buffer.dispatch(x, handle),
        "combine": lambda: buffer.combine(recv_x, handle),
        "combine with weights": lambda: buffer.combine(recv_x, handle, recv_weights),
        "dispatch, async": lambda: dispatch_and_wait(async_finish=True),
        "combine, async": lambda: combine_and_wait(async_finish=True),
        "dispatch, overlapped": lambda: dispatch_and_wait(**overlapped()),
        "combine, overlapped": lambda: combine_and_wait(**overlapped()),
    }


def lent_calls(buffer: Buffer, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Those whose outputs are lent, as where there are several ranks. (One rank has nobody to lend to.)"""
    from deep_ep._tensors import Lender
    session = buffer._session
    assert session is not None
    lender = Lender(LendingRuntime(deep_ep_cpp.Device(-1)), session.streams)  # type: ignore[arg-type]
    lender.index = -1  # memory of the CPU
    lender.noted[CURRENT_STREAM] = True

    def lending(call: Callable[[], Any]) -> None:
        session.lender = lender
        try:
            call()
        finally:
            session.lender = None

    calls = high_throughput_calls(buffer, inputs)
    return {
        f"{name}, lent": partial(lending, calls[name])
        for name in ("dispatch", "dispatch, worst case", "dispatch, cached")
    }


class LendingRuntime:
    """As much of a native Buffer as a Lender needs."""

    num_lend_bytes = 1 << 28

    def __init__(self, native: deep_ep_cpp.Device) -> None:
        self._buffer = deep_ep_cpp.Buffer(native,
                                          0,
                                          1,
                                          num_data_bytes=128,
                                          timeout_s=10.0,
                                          warn_s=5.0,
                                          num_lend_bytes=self.num_lend_bytes)
        self.lend = self._buffer.lend
        self.lend_address = self._buffer.lend_address

    def note_stream(self, stream: int, is_ours: bool) -> None:
        """None is noted, so that none is asked when the memory comes back."""


def low_latency_calls(buffer: Buffer, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    x, topk_idx, weights = inputs.x, inputs.topk_idx, inputs.weights
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, NUM_LL_EXPERTS, use_fp8=False)
    assert isinstance(rows, torch.Tensor)
    out = torch.empty_like(x)

    def dispatch(**options: Any) -> Any:
        return buffer.low_latency_dispatch(x, topk_idx, NUM_TOKENS, NUM_LL_EXPERTS, **options)

    def combine(**options: Any) -> Any:
        return buffer.low_latency_combine(rows, topk_idx, weights, handle, **options)

    def with_hook(call: Callable[..., Any]) -> None:
        call(return_recv_hook=True)[-1]()

    def asynchronous(call: Callable[..., Any]) -> None:
        call(async_finish=True)[-2].current_stream_wait()

    return {
        "LL dispatch": dispatch,
        "LL dispatch, BF16": lambda: dispatch(use_fp8=False),
        "LL dispatch, hook": lambda: with_hook(dispatch),
        "LL combine": combine,
        "LL combine, out": lambda: combine(out=out),
        "LL combine, hook": lambda: with_hook(combine),
        "LL dispatch, async": lambda: asynchronous(dispatch),
        "LL combine, async": lambda: asynchronous(combine),
    }


def time_all(parts: dict[str, Callable[[], Any]]) -> None:
    for name, part in parts.items():
        measure(part, torch.cuda.synchronize, 5)
        least, cpu, wall = measure(part, torch.cuda.synchronize, 30)
        print(f"{name:24} {least:8.2f} {cpu:8.2f} {wall:8.2f}")


def time_primitives(buffer: Buffer, device: torch.device) -> None:
    """What a call is made of, one by one: what remains when the Python part is nothing."""
    from deep_ep.utils import find_reinterpret
    from deep_ep_cpp import CombineArgs, LayoutArgs
    session = buffer._session
    assert session is not None
    native, runtime = session.streams.native, session.runtime
    stream = torch.cuda.current_stream()
    handle = stream.cuda_stream
    event = native.create_event()
    x = torch.ones((NUM_TOKENS, HIDDEN), dtype=torch.bfloat16, device=device)
    prefix = torch.full((1, 1), NUM_TOKENS, dtype=torch.int32, device=device)
    head = torch.arange(NUM_TOKENS, dtype=torch.int32, device=device)
    addresses = [tensor.data_ptr() for tensor in (x, prefix, head, torch.empty_like(x))]
    topk_idx = Inputs.make(device, NUM_EXPERTS).topk_idx
    counts = [
        tensor.data_ptr() for tensor in buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)[:4] if tensor is not None
    ]
    without_weights: dict[str, Any] = {"topk_weights": 0, "num_topk": 0, "bias": (0, 0), "combined_topk_weights": 0}

    def combine_record() -> CombineArgs:
        return CombineArgs(x=addresses[0],
                           num_rows=NUM_TOKENS,
                           hidden=HIDDEN,
                           rank_prefix_matrix=addresses[1],
                           send_head=addresses[2],
                           src_idx=addresses[2],
                           num_tokens=NUM_TOKENS,
                           combined_x=addresses[3],
                           **without_weights)

    combine_args = combine_record()
    layout_args = LayoutArgs(topk_idx=topk_idx.data_ptr(),
                             idx_bytes=topk_idx.element_size(),
                             num_tokens=NUM_TOKENS,
                             num_topk=NUM_TOPK,
                             num_experts=NUM_EXPERTS,
                             num_nodes=1,
                             num_tokens_per_rank=counts[0],
                             num_tokens_per_node=0,
                             num_tokens_per_expert=counts[1],
                             is_token_in_rank=counts[2])
    make, view = session.empty[torch.bfloat16], find_reinterpret()
    primitives: dict[str, Callable[[], Any]] = {
        "launch of combine":  # a cooperative one
        lambda: runtime.combine(combine_args, 20, handle),
        "launch of layout":  # an ordinary one
        lambda: runtime.get_dispatch_layout(layout_args, handle),
        "combine's record":
        combine_record,
        "native check":
        runtime.check,
        "torch.empty 2-D":
        lambda: torch.empty(NUM_TOKENS, HIDDEN, dtype=torch.bfloat16, device=device),
        "new_empty":
        lambda: x.new_empty(NUM_TOKENS, HIDDEN),
        "an output":
        lambda: make(NUM_TOKENS, HIDDEN),
        "torch.empty, tuple":
        lambda: torch.empty((NUM_TOKENS, HIDDEN), dtype=torch.bfloat16, device=device),
        "record_event":
        lambda: native.record_event(event, handle),
        "stream_kind":
        lambda: native.stream_kind(handle),
        "stream_wait_event":
        lambda: native.stream_wait_event(handle, event),
        "torch wait_stream":
        lambda: stream.wait_stream(session.streams.comm_stream),
        "torch.empty_strided":
        lambda: torch.empty_strided((NUM_TOKENS, HIDDEN), (1, NUM_TOKENS), dtype=torch.bfloat16, device=device),
        "as_strided":
        lambda: x.as_strided((2, HIDDEN), (HIDDEN, 1)),
        "slice":
        lambda: x[1:],
        "a view of an output":
        lambda: view(x, (2, HIDDEN), (HIDDEN, 1), 0),
        "record_stream":
        lambda: x.record_stream(session.streams.comm_stream),
        "torch current_stream":
        lambda: torch.cuda.current_stream(device),
    }
    time_all(primitives)


def time_low_latency_parts(buffer: Buffer, device: torch.device) -> None:
    """The same for a combine: its launches, its outputs and its record, and what asks the streams."""
    from deep_ep import _tensors
    session, inputs = buffer._session, Inputs.make(device, NUM_LL_EXPERTS)
    assert session is not None
    rows, _, handle, _, _ = buffer.low_latency_dispatch(inputs.x,
                                                        inputs.topk_idx,
                                                        NUM_TOKENS,
                                                        NUM_LL_EXPERTS,
                                                        use_fp8=False)
    assert isinstance(rows, torch.Tensor)
    plan = buffer._low_latency._plan_of(handle, NUM_TOPK)
    combined, number = torch.empty_like(inputs.x), torch.zeros(1, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream().cuda_stream

    def record() -> Any:
        return plan.combine_args.replace(wait_stats=0,
                                         number=number.data_ptr(),
                                         uses_logfmt=False,
                                         x=rows.data_ptr(),
                                         topk_idx=inputs.topk_idx.data_ptr(),
                                         idx_bytes=inputs.topk_idx.element_size(),
                                         topk_weights=inputs.weights.data_ptr(),
                                         num_tokens=NUM_TOKENS,
                                         row_of_entry=handle[0].data_ptr() + plan.entries_at,
                                         combined_x=combined.data_ptr())

    args, launch = record(), session.runtime.low_latency_combine
    parts: dict[str, Callable[[], Any]] = {
        "LL combine's launch": lambda: launch(args, deep_ep_cpp.Buffer.BOTH_PHASES, stream),
        "LL combine's two": lambda: launch(args, launch(args, deep_ep_cpp.Buffer.SEND_PHASE, stream), stream),
        "LL combine's record": record,
        "LL dispatch's outputs": plan.make_outputs,
        "LL stream's policy": lambda: session.streams.low_latency_operation(False, True),
        "LL begin_call": session.begin_call,
        "LL check of a tensor": lambda: _tensors.check_matrix("x", inputs.x, device, (torch.bfloat16, )),
    }
    time_all(parts)


def pretend_cuda(buffer: Buffer, counts: Counter[str]) -> None:
    """Gives a Buffer of the CPU the stream side of a GPU's, over a device that does nothing."""
    from deep_ep import _streams, utils
    native: Any = Nothing(counts, {"stream_kind": "plain"}, 1)
    comm_stream: Any = SimpleNamespace(cuda_stream=CURRENT_STREAM + 1, stream_id=1, device_index=0, device_type=1)
    session = buffer._session
    assert session is not None
    pool = utils.EventPool(native)
    session.streams = _streams.CudaStreams(0, native, pool, comm_stream)
    session.streams.device = torch.device("cpu")
    session.runtime = Nothing(counts, {"wait_counts": (NUM_TOKENS, [0] * NUM_EXPERTS, 0)},
                              None)  # type: ignore[assignment]
    session.direct = None  # it has the real ones

    def wait(event: Any) -> None:
        native.stream_wait_event(CURRENT_STREAM, event.cuda_event)

    _streams.current_stream_handle = lambda _: CURRENT_STREAM
    utils.record_on_current_stream = lambda: pool.record(CURRENT_STREAM)
    utils.wait_on_current_stream = wait


# -- Trees in turn -----------------------------------------------------------------------------------------------------

Figures = dict[str, tuple[float, float, float]]  # of each call what `measure` returns


class Tree:
    """A built tree, in a process for each rank, which sleeps until it is told to measure."""

    def __init__(self, path: Path, cores: list[int], num_rounds: int) -> None:
        meeting = Path(tempfile.mkdtemp()) / "ranks"
        command = [sys.executable, "-P", __file__, "--meeting", str(meeting), "--rounds", str(num_rounds)]
        environment = os.environ | {"PYTHONPATH": str(path.resolve())}
        self._ranks = [
            subprocess.Popen([*command, f"--num-ranks={len(cores)}", f"--serve={rank}", f"--core={core}"],
                             env=environment,
                             text=True,
                             stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE) for rank, core in enumerate(cores)
        ]

    def take_turn(self) -> Figures:
        """Of rank 0."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write("measure\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self._ranks if rank.stdout is not None]
        if not all(answers):
            raise SystemExit("a rank has ended: see above")
        figures: Figures = json.loads(answers[0])
        return figures

    def close(self) -> None:
        for rank in self._ranks:
            rank.communicate()


def compare(trees: dict[str, Path], cores: list[int], num_turns: int, num_rounds: int, save: str) -> None:
    """Each tree's least over all turns, and the median of its turns' least; of the first tree, the share that both are.

    Slow spells outlast a turn, so that a tree's turns differ; the least of many is what the code costs at best.
    """
    running = {name: Tree(path, cores, num_rounds) for name, path in trees.items()}
    found: dict[str, list[Figures]] = {name: [] for name in trees}
    for _ in range(num_turns):
        for name, tree in running.items():
            found[name].append(tree.take_turn())
    for tree in running.values():
        tree.close()
    if save:
        facts = {"command": sys.argv, "cores": cores, "trees": {name: str(path) for name, path in trees.items()}}
        columns = ["least us", "cpu us", "wall us"]
        Path(save).write_text(json.dumps({**facts, "columns": columns, "turns": found}), encoding="utf-8")
    first = next(iter(trees))
    print(f"{'call':24}" + "".join(f"{name[-14:]:>15}{'median':>8}" + ("" if name == first else f"{'of ' + first:>16}")
                                   for name in trees))
    for call in found[first][0]:
        text, base = f"{call:24}", (0.0, 0.0)
        for name, turns in found.items():
            leasts = [figures[call][0] for figures in turns if call in figures]
            if not leasts:
                continue
            both = min(leasts), statistics.median(leasts)
            base = both if name == first else base
            text += f"{both[0]:15.1f}{both[1]:8.1f}"
            text += "" if name == first else f"{both[0] / base[0]:8.0%}{both[1] / base[1]:8.0%}"
        print(text)


@contextlib.contextmanager
def open_buffer(rank: int, num_ranks: int, meeting: str) -> Iterator[Buffer]:
    num_bytes = Buffer.get_low_latency_rdma_size_hint(NUM_TOKENS, HIDDEN, num_ranks, NUM_LL_EXPERTS)
    group: dict[str, Any] = {"group": None, "comm": SingleRankComm()}
    if num_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_ranks)
        group = {"group": dist.group.WORLD}
    with Buffer(num_nvl_bytes=NUM_NVL_BYTES, num_rdma_bytes=num_bytes, low_latency_mode=True,
                **group) as buffer, timed_waits():
        yield buffer
    if num_ranks > 1:
        dist.destroy_process_group()


def all_calls(buffer: Buffer, device: torch.device) -> dict[str, Callable[[], Any]]:
    return {
        **high_throughput_calls(buffer, Inputs.make(device, NUM_EXPERTS)),
        **low_latency_calls(buffer, Inputs.make(device, NUM_LL_EXPERTS))
    }


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(rank: int, num_ranks: int, meeting: str, core: int, num_rounds: int) -> None:
    """Measures whenever a line comes, in the tree that Python finds."""
    os.sched_setaffinity(0, {core})
    answer, device = os.dup(1), torch.device("cpu")
    os.dup2(2, 1)  # whatever else is printed
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    with open_buffer(rank, num_ranks, meeting) as buffer:
        calls = all_calls(buffer, device)
        for call in calls.values():
            measure(call, settle, 1)
        for _ in sys.stdin:
            figures = {name: [round(us, 2) for us in measure(call, settle, num_rounds)] for name, call in calls.items()}
            os.write(answer, (json.dumps(figures) + "\n").encode())


def measure_here(is_real: bool, num_rounds: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if is_real else torch.device("cpu")
    with open_buffer(0, 1, "") as buffer:
        session = buffer._session
        assert session is not None
        real = session.streams, session.runtime
        counts: Counter[str] = Counter()
        if not is_real:
            pretend_cuda(buffer, counts)
        calls = all_calls(buffer, device)
        if not is_real:  # nothing to record on in torch
            calls.update(lent_calls(buffer, Inputs.make(device, NUM_EXPERTS)))
            calls = {name: call for name, call in calls.items() if name[-5:] not in ("async", "apped")}
        print(f"{'call':24} {'least us':>8} {'cpu us':>8} {'wall us':>8}")
        for name, call in calls.items():
            measure(call, settle, 5)
            counts.clear()
            call()
            asked = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
            least, cpu, wall = measure(call, settle, num_rounds)
            print(f"{name:24} {least:8.2f} {cpu:8.2f} {wall:8.2f}  {asked}")
        session.streams, session.runtime = real
        if is_real:
            time_primitives(buffer, device)
            time_low_latency_parts(buffer, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--num-ranks", type=int, default=1)
    parser.add_argument("--compare", nargs="+", metavar="NAME=PATH", help="built trees, the first one to compare with")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--cores", help="one for each rank; else the last ones that this process may use")
    parser.add_argument("--save", default="", help="a file for all figures of --compare, as JSON")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.num_ranks, options.meeting, options.core, options.rounds)
    elif options.compare or options.num_ranks > 1:
        named = [tree.split("=", 1) for tree in options.compare or [f"here={Path(__file__).parents[1]}"]]
        trees = {name: Path(path) for name, path in named}
        cores = list(map(int, options.cores.split(","))) if options.cores else sorted(os.sched_getaffinity(0))
        compare(trees, cores[-options.num_ranks:], options.turns, options.rounds, options.save)
    else:
        measure_here(not options.python_only, options.rounds)


if __name__ == "__main__":
    main()
