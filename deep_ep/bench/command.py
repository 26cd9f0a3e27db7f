"""`python -m deep_ep bench`: what is measured, one process for each rank, a table at the end, JSON on request."""
from __future__ import annotations

import argparse
import shlex
import signal
from dataclasses import dataclass

import torch

import deep_ep_cpp
from deep_ep import _env
from deep_ep.bench.internode import InternodeBenchmark
from deep_ep.bench.intranode import IntranodeBenchmark
from deep_ep.bench.low_latency import LowLatencyBenchmark
from deep_ep.bench.options import Options
from deep_ep.bench.plot import plot_file
from deep_ep.bench.results import Report, save
from deep_ep.bench.tables import format_findings
from deep_ep.bench.workers import MakeBenchmark, run_ranks


@dataclass(frozen=True)
class Defaults:
    """What is measured where nothing else is asked for. The CPU executor runs the same code a thousand times slower."""

    tokens: list[int]
    hidden: int
    experts: int
    repeats: int
    num_sms: int


BENCHMARKS: dict[str, MakeBenchmark] = {
    "intranode": IntranodeBenchmark,
    "internode": InternodeBenchmark,
    "low-latency": LowLatencyBenchmark
}
# By benchmark: on CUDA, on the CPU. Low latency uses all SMs; its number is for the ceiling alone.
HIGH_THROUGHPUT_DEFAULTS = (Defaults([4096], hidden=7168, experts=256, repeats=30,
                                     num_sms=16), Defaults([64], hidden=512, experts=32, repeats=3, num_sms=2))
DEFAULTS = {
    "intranode":
    HIGH_THROUGHPUT_DEFAULTS,
    "internode":
    HIGH_THROUGHPUT_DEFAULTS,
    "low-latency": (Defaults([2**i for i in range(10)], hidden=7168, experts=288, repeats=30,
                             num_sms=64), Defaults([1, 16], hidden=512, experts=32, repeats=3, num_sms=2)),
}
# What --sweep measures, where the option itself is not given.
HIGH_THROUGHPUT_TOKENS = [1, 16, 128, 512, 2048, 4096, 8192]
SWEPT_TOKENS = {
    "intranode": HIGH_THROUGHPUT_TOKENS,
    "internode": HIGH_THROUGHPUT_TOKENS,
    "low-latency": [2**i for i in range(10)]
}
SWEPT_SMS = [4, 8, 16, 24, 32]
SWEPT_ROUTINGS = ["uniform", "hot-rank"]


def choose_device(wanted: str) -> str:
    if wanted == "auto":
        wanted = str(deep_ep_cpp.get_environment().get("device") or "")
    if wanted in ("cpu", "cuda"):
        return wanted
    return "cuda" if deep_ep_cpp.is_cuda_built() and torch.cuda.is_available() else "cpu"


def make_options(args: argparse.Namespace, is_cuda: bool) -> Options:
    defaults = DEFAULTS[args.benchmark][0 if is_cuda else 1]
    num_gpus = torch.cuda.device_count() if is_cuda else 0
    num_ranks = args.num_processes or num_gpus or 2
    num_experts = args.experts or defaults.experts
    is_swept = bool(args.sweep)
    return Options(num_ranks=num_ranks,
                   is_cuda=is_cuda,
                   num_tokens=args.tokens or (SWEPT_TOKENS[args.benchmark] if is_swept else defaults.tokens),
                   hidden=args.hidden or defaults.hidden,
                   num_topk=args.topk,
                   num_experts=(num_experts + num_ranks - 1) // num_ranks * num_ranks,
                   routings=args.routing or (SWEPT_ROUTINGS if is_swept else ["uniform"]),
                   num_sms=args.num_sms or choose_budgets(args, defaults),
                   num_warmups=args.warmups if is_cuda else min(args.warmups, 1),
                   num_repeats=args.repeats or defaults.repeats,
                   num_sets=args.input_sets,
                   seed=args.seed,
                   with_graphs=args.graphs,
                   with_comparison=not args.no_comparison,
                   with_profile=args.profile,
                   is_threaded=args.ranks_as_threads,
                   num_gpus=num_gpus,
                   ranks_per_node=choose_nodes(args, num_ranks))


def choose_nodes(args: argparse.Namespace, num_ranks: int) -> int:
    """Ranks in each virtual node; 0: no such."""
    if args.benchmark == "intranode" or (args.benchmark == "low-latency" and args.ranks_per_node == 0):
        return 0
    if args.ranks_per_node < 1 or num_ranks <= args.ranks_per_node or num_ranks % args.ranks_per_node:
        raise SystemExit(f"--ranks-per-node must divide the {num_ranks} ranks into nodes, got {args.ranks_per_node}")
    return int(args.ranks_per_node)


def choose_budgets(args: argparse.Namespace, defaults: Defaults) -> list[int]:
    return SWEPT_SMS if args.sweep and args.benchmark != "low-latency" else [defaults.num_sms]


def command_of(arguments: list[str]) -> str:
    """What to type to measure the same again: without where the figures of this run went."""
    kept: list[str] = []
    skips_value = False
    for argument in arguments:
        is_value = skips_value and not argument.startswith("-")
        skips_value = argument in ("--save", "--commit")
        if not is_value and not argument.startswith(("--save", "--commit")):
            kept.append(argument)
    return shlex.join(["python", "-m", "deep_ep", *kept])


def num_devices(options: Options) -> int:
    if not options.is_cuda:
        return 0
    return 1 if options.is_threaded else min(options.num_ranks, options.num_gpus)


def run(args: argparse.Namespace, arguments: list[str]) -> int:
    """`args`, and what they were parsed from."""
    device = choose_device(args.device)
    _env.set_device(device)  # for the ranks
    if args.ranks_as_threads:
        _env.prepare_threaded_ranks()
    options = make_options(args, device == "cuda")
    if options.ranks_per_node:
        _env.set_ranks_per_node(options.ranks_per_node)
    signal.signal(signal.SIGTERM, end_early)
    report = Report(benchmark=args.benchmark,
                    command=command_of(arguments),
                    device=device,
                    num_ranks=options.num_ranks,
                    num_devices=num_devices(options),
                    is_threaded=options.is_threaded,
                    environment=_env.speed_settings(),
                    findings=run_ranks(options, BENCHMARKS[args.benchmark]))
    print(
        f"{options.num_ranks} ranks, hidden {options.hidden}, top-{options.num_topk} of {options.num_experts} experts, "
        f"{options.num_repeats} repeats: median of the slowest rank")
    print(format_findings(report.findings))
    for notice in report.notices:
        print(notice)
    if args.save is not None:
        path = save(report, args.save, args.commit)
        print(f"saved {path}")
        print(plot_file(path))
    return 1 if report.findings.failure else 0


def end_early(*_: object) -> None:
    """A time limit: what has been measured so far is still reported."""
    raise SystemExit("ended from outside")
