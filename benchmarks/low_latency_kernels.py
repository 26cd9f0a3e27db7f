"""Kernel times of the low-latency mode, launch by launch, as the profiler sees them; and what a call costs the host.

    python benchmarks/low_latency_kernels.py --num-processes 2 --tokens 128

Ranks are threads that share one GPU (each kernel on its share of the SMs): the figures show the chain of loads, flags
and stores of the kernels, and no link. All calls of a series are queued while the device sleeps, so that nothing of the
host is in the kernel times. Of every call the slowest rank counts; the figure is the median of the calls.
"""
import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import torch

from deep_ep import Buffer, _env
from deep_ep.bench.ranks import ThreadMeeting, ThreadRanks
from deep_ep.bench.routing import Shape, choose_experts

SLEEP_CYCLES = 60_000_000  # some 30 ms
POOL_BYTES = 12 << 30  # an allocation may not go to the driver while a kernel waits for this rank

Series = tuple[str, Callable[[int], Any], int]  # name, call, launches of a call


class Rank:
    """One thread: its Buffer, inputs, and the calls to measure."""

    def __init__(self, ranks: ThreadRanks, args: argparse.Namespace) -> None:
        self.ranks, self.args = ranks, args
        shape = Shape(ranks.size, args.tokens, args.hidden, args.topk, args.experts, "uniform")
        num_bytes = Buffer.get_low_latency_rdma_size_hint(args.max_tokens, args.hidden, ranks.size, args.experts)
        self.buffer = ranks.buffer(0, num_rdma_bytes=num_bytes, low_latency_mode=True)
        torch.manual_seed(ranks.rank)
        self.inputs = [torch.randn((args.tokens, args.hidden), device="cuda").bfloat16() for _ in range(3)]
        self.topk_idx = choose_experts(shape, ranks.rank, 0).cuda()
        self.weights = torch.rand((args.tokens, args.topk), device="cuda")
        self.received: list[Any] = []

    def dispatch(self, use_fp8: bool, is_hooked: bool, i: int) -> Any:
        result = self.buffer.low_latency_dispatch(self.inputs[i % 3],
                                                  self.topk_idx,
                                                  self.args.max_tokens,
                                                  self.args.experts,
                                                  use_fp8=use_fp8,
                                                  return_recv_hook=is_hooked)
        if is_hooked:
            result[-1]()
        return result

    def combine(self, use_logfmt: bool, is_hooked: bool, i: int) -> Any:
        rows, _, handle, _, _ = self.received[i % 3]
        result = self.buffer.low_latency_combine(rows,
                                                 self.topk_idx,
                                                 self.weights,
                                                 handle,
                                                 use_logfmt=use_logfmt,
                                                 return_recv_hook=is_hooked)
        if is_hooked:
            result[-1]()
        return result

    def series(self) -> list[Series]:
        found: list[Series] = []
        for hooked in (False, True):
            launches, name = (2, ", hook") if hooked else (1, "")
            found += [(f"dispatch FP8{name}", lambda i, h=hooked: self.dispatch(True, h, i), launches),
                      (f"dispatch BF16{name}", lambda i, h=hooked: self.dispatch(False, h, i), launches),
                      (f"combine BF16{name}", lambda i, h=hooked: self.combine(False, h, i), launches),
                      (f"combine logfmt{name}", lambda i, h=hooked: self.combine(True, h, i), launches)]
        return found

    def run(self) -> list[tuple[str, int, float]]:
        """Makes all calls; of each series its name, launches a call, and microseconds of the host a call."""
        for i in range(3):
            rows = self.dispatch(False, False, i)
            self.received.append((rows[0].nan_to_num_(), *rows[1:]))
        made = []
        for name, call, launches in self.series():
            for i in range(self.args.warmups):
                call(i)
            torch.cuda.synchronize()
            self.ranks.barrier()
            torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            start = time.perf_counter()
            for i in range(self.args.repeats):
                call(i)
            host_us = (time.perf_counter() - start) / self.args.repeats * 1e6
            torch.cuda.synchronize()
            self.ranks.barrier()
            made.append((name, launches, host_us))
        torch.cuda.synchronize()
        self.ranks.barrier()
        self.buffer.destroy()
        return made


def run_thread(meeting: ThreadMeeting, rank: int, args: argparse.Namespace) -> list[tuple[str, int, float]]:
    try:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            torch.empty(POOL_BYTES, dtype=torch.uint8, device="cuda")
            return Rank(ThreadRanks(meeting, rank), args).run()
    except BaseException:
        meeting.barrier.abort()
        raise


def kernels_of(trace: Path) -> list[list[dict[str, Any]]]:
    """The library's kernels in order of time, stream by stream."""
    streams: dict[int, list[dict[str, Any]]] = {}
    for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]:
        if event.get("cat") == "kernel" and "low_latency" in event["name"]:
            streams.setdefault(event["args"]["stream"], []).append(event)
    return [sorted(events, key=lambda event: event["ts"]) for events in streams.values()]


def report(streams: list[list[dict[str, Any]]], made: list[tuple[str, int, float]], args: argparse.Namespace) -> None:
    position = 3  # the dispatches that fill Rank.received
    print(f"{'':24} {'kernels, us':>24} {'p90':>8} {'period':>8} {'host':>8}")
    for name, launches, host_us in made:
        position += args.warmups * launches
        times, periods = [], []
        for call in range(args.repeats):
            at = position + call * launches
            times.append([max(events[at + i]["dur"] for events in streams) for i in range(launches)])
            if call:
                periods.append(max(events[at]["ts"] - events[at - launches]["ts"] for events in streams))
        position += args.repeats * launches
        medians = [statistics.median(column) for column in zip(*times)]
        whole = sorted(sum(row) for row in times)
        shown = " + ".join(f"{value:.1f}" for value in medians)
        p90, period = whole[len(whole) * 9 // 10], statistics.median(periods)
        print(f"{name:24} {shown:>24} {p90:8.1f} {period:8.1f} {host_us:8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for option, default in (("num-processes", 2), ("tokens", 128), ("max-tokens", 0), ("hidden", 7168), ("topk", 8),
                            ("experts", 288), ("warmups", 5), ("repeats", 40)):
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    args.max_tokens = args.max_tokens or args.tokens
    _env.set_device("cuda")
    _env.prepare_threaded_ranks()
    torch.cuda.init()
    meeting = ThreadMeeting(args.num_processes)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile, ThreadPoolExecutor(args.num_processes) as pool:
        workers = [pool.submit(run_thread, meeting, rank, args) for rank in range(args.num_processes)]
        made, *_ = [worker.result() for worker in workers]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        streams = kernels_of(trace)
    print(f"{args.num_processes} ranks on one GPU, {args.tokens} tokens, hidden {args.hidden}, top-{args.topk} of "
          f"{args.experts} experts")
    report(streams, made, args)


if __name__ == "__main__":
    main()
