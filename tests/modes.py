"""Tests as scripts: every mode once with sizes from the command line, or random calls for as long as asked."""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any, Optional

import intranode_cases as cases
import pressure
import torch
from pending_call import How
from utils import Pool, Worker, member
from workload import Workload

# Runs a case on all ranks; the results of those that are here.
Runner = Callable[..., list[Any]]


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    for name, default in (("--num-processes", 4), ("--num-tokens", 128), ("--hidden", 7168), ("--num-topk", 8),
                          ("--num-experts", 64), ("--num-sms", 8)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--pressure-test",
                        type=float,
                        metavar="SECONDS",
                        help="random calls for so long, each several times, bits compared")
    parser.add_argument("--seed", type=int, default=0, help="of the pressure test")
    return parser


def run(args: argparse.Namespace,
        parser: argparse.ArgumentParser,
        environment: Optional[dict[str, str]] = None,
        has_members: bool = False) -> None:
    """`has_members`: where torchrun has started this process, it is one rank, and starts none."""
    if has_members and "RANK" in os.environ:
        worker = member()
        args.num_processes = worker.num_ranks
        check(args, parser)
        _run(args, functools.partial(run_here, worker), worker.rank == 0)
        worker.close()
        return
    check(args, parser)
    # Not by the Pool: its processes import this script, and with it the library, before they hear of an environment.
    os.environ.update(environment or {})
    pool = Pool(args.num_processes)
    _run(args, lambda case, *rest, **options: pool.run(case, args.num_processes, *rest, **options), True)
    pool.close()


def run_here(worker: Worker, case: Callable[..., Any], *args: Any, deadline_s: float, **options: Any) -> list[Any]:
    """Nobody watches the deadline: torchrun does not, and the Buffer has its own."""
    del deadline_s
    return [case(worker, *args, **options)]


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.num_experts % args.num_processes:
        parser.error(f"--num-experts must be a multiple of the {args.num_processes} processes")


def describe_nodes(worker: Worker) -> str:
    return str(worker.buffer()._session.topology)


def _run(args: argparse.Namespace, runner: Runner, is_speaker: bool) -> None:
    nodes = runner(describe_nodes, deadline_s=120)
    if is_speaker:
        print(nodes[0], flush=True)
    if args.pressure_test is None:
        _run_modes(args, runner, is_speaker)
        return
    sizes = pressure.Sizes(args.num_tokens, args.hidden, args.num_topk, args.num_experts // args.num_processes,
                           args.num_sms)
    seconds = args.pressure_test
    if is_speaker:
        pressure.announce(sizes, args.seed, seconds)
    found = runner(pressure.run, sizes, args.seed, seconds, deadline_s=seconds + 300)
    if is_speaker:
        print(pressure.summary(found))


def _run_modes(args: argparse.Namespace, runner: Runner, is_speaker: bool) -> None:
    base: dict[str, Any] = {
        "num_tokens": (args.num_tokens, ) * args.num_processes,
        "hidden": args.hidden,
        "num_topk": args.num_topk,
        "experts_per_rank": args.num_experts // args.num_processes
    }
    sms, num_scales = args.num_sms, max(1, args.hidden // 128)
    fp8 = Workload(**base, dtype=torch.float8_e4m3fn, num_scales=num_scales, scale_layout="column")
    modes: dict[str, Any] = {
        "bfloat16": (cases.whole_trip, Workload(**base), How(num_sms=sms)),
        "bfloat16, no top-k": (cases.whole_trip, Workload(**base), How(num_sms=sms, has_topk=False)),
        "bfloat16, asynchronous": (cases.whole_trip, Workload(**base), How(True, True, num_sms=sms)),
        "bfloat16, worst-case rows": (cases.whole_trip, Workload(**base), How(worst_factor=1, num_sms=sms)),
        "fp8 with scales": (cases.scaled_trip, fp8, How(num_sms=sms)),
        "handle reuse": (cases.reused_handle, Workload(**base)),
    }
    for name, (case, *case_args) in modes.items():
        options = {"num_nvl_bytes": 1 << 27} if case is cases.whole_trip else {}
        runner(case, *case_args, deadline_s=600, **options)
        if is_speaker:
            print(f"{name}: passed", flush=True)
