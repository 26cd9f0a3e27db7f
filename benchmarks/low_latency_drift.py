"""Kernel times of combine with a hook when ranks drift apart: what a rank's send phase takes although a peer is late.

    python benchmarks/low_latency_drift.py --num-processes 2 --late-us 0,5,20,100,1000

One GPU for each rank. Before every combine the last rank sleeps on its device for so long; the figures are medians of
the kernels of both phases, of the ranks that are in time and of the late one. DeepEP V1's own test wants exactly one
line of a profile's table to name each operation; how many do is shown as well.
"""
import argparse
import os
import statistics
from typing import Any

import torch
import torch.distributed as dist

from deep_ep import Buffer

CYCLES_PER_US = 1755  # of the H100's clock, about


def kernels_of(profile: Any) -> list[Any]:
    events = [event for event in profile.events() if "low_latency" in event.name and "combine" in event.name]
    return sorted(events, key=lambda event: event.time_range.start)


def lines_with(profile: Any, word: str) -> int:
    return sum(word in line for line in profile.key_averages().table(max_name_column_width=100).split("\n"))


def call_hook(hook: Any) -> None:
    hook()


def measure(buffer: Buffer, args: argparse.Namespace, rank: int, late_us: float) -> tuple[list[float], list[int]]:
    """Medians of send and receive, in us; lines of the profile that name dispatch and combine."""
    x = torch.randn((args.tokens, args.hidden), device="cuda").bfloat16()
    scores = torch.rand((args.tokens, args.experts), device="cuda")
    topk_idx, weights = scores.topk(args.topk, dim=-1).indices, torch.rand((args.tokens, args.topk), device="cuda")
    received, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, args.tokens, args.experts, use_fp8=False)
    rows: Any = received
    rows.nan_to_num_()
    torch.cuda.synchronize()
    dist.barrier()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(args.repeats):
            *_, hook = buffer.low_latency_dispatch(x,
                                                   topk_idx,
                                                   args.tokens,
                                                   args.experts,
                                                   use_fp8=False,
                                                   return_recv_hook=True)
            call_hook(hook)
            if rank == dist.get_world_size() - 1 and late_us > 0:
                torch.cuda._sleep(int(late_us * CYCLES_PER_US))  # type: ignore[no-untyped-call]
            *_, hook = buffer.low_latency_combine(rows, topk_idx, weights, handle, return_recv_hook=True)
            torch.cuda._sleep(int(args.gemm_us * CYCLES_PER_US))  # type: ignore[no-untyped-call]
            call_hook(hook)
            torch.cuda.synchronize()
            dist.barrier()
    durations = [event.time_range.elapsed_us() for event in kernels_of(profile)]
    medians = [statistics.median(durations[phase::2]) for phase in range(2)]
    return medians, [lines_with(profile, "dispatch"), lines_with(profile, "combine")]


def run(rank: int, args: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29877")
    dist.init_process_group("gloo", rank=rank, world_size=args.num_processes)
    torch.manual_seed(rank)
    num_bytes = Buffer.get_low_latency_rdma_size_hint(args.tokens, args.hidden, args.num_processes, args.experts)
    buffer = Buffer(dist.group.WORLD, 0, num_bytes, low_latency_mode=True)
    for late_us in (float(word) for word in args.late_us.split(",")):
        medians, lines = measure(buffer, args, rank, late_us)
        found: list[Any] = [None] * args.num_processes
        dist.all_gather_object(found, medians)
        if rank == 0:
            shown = "   ".join(f"rank {i}: {send:6.1f} + {receive:5.1f}" for i, (send, receive) in enumerate(found))
            print(f"late {late_us:6.0f} us   {shown}   lines of the profile: {lines}", flush=True)
    buffer.destroy()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for option, default in (("num-processes", 2), ("tokens", 128), ("hidden", 7168), ("topk", 8), ("experts", 288),
                            ("repeats", 20), ("gemm-us", 50)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--late-us", default="0,5,20,100,1000", help="several, with commas")
    args = parser.parse_args()
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        run, args=(args, ), nprocs=args.num_processes)


if __name__ == "__main__":
    main()
